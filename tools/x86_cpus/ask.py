"""Imports the package with each DWCONV_EXT_ISA of the arguments, which must fail, then with an empty one, and calls every op.

Prints, as JSON, the messages of those that failed, and the chosen set and the ops that agree with torch. One process for all: an
emulator takes half a minute to import torch.
"""

import json
import os
import sys

refused = {}
for name in sys.argv[1:]:
    os.environ["DWCONV_EXT_ISA"] = name
    try:
        import dwconv_ext
    except ImportError as error:
        refused[name] = str(error)
    for module in [module for module in sys.modules if module.split(".")[0] == "dwconv_ext"]:
        del sys.modules[module]
os.environ["DWCONV_EXT_ISA"] = ""

import each_op  # noqa: E402

import dwconv_ext  # noqa: E402

_C = dwconv_ext._C
found = {"supported": _C.supported_isas(), "selected": _C.selected_isa(), "flags": _C.cpu_flags()}
print(json.dumps({**found, "refused": refused, "agreed": sorted(each_op.check())}))
