"""Refuses the interpreters of Python that torch or the compiled halves were not made for, before either is loaded."""

from __future__ import annotations

import ctypes
import sysconfig


def check_interpreter() -> None:
    """
    Raises:
        ImportError: Python without a global interpreter lock, or a subinterpreter.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("dwconv_ext does not support free-threaded Python: use an ordinary build of CPython (3.13, not 3.13t)")
    api = ctypes.pythonapi
    for function in (api.PyInterpreterState_Get, api.PyInterpreterState_Main):
        function.restype = ctypes.c_void_p
    if api.PyInterpreterState_Get() != api.PyInterpreterState_Main():
        raise ImportError("dwconv_ext does not support subinterpreters: import it in the main interpreter, or use processes")


check_interpreter()
