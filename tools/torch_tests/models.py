"""timm's and torchvision's own model tests on converted and on compiled models of the depthwise families, and on plain ones.

    python tools/torch_tests/models.py timm FOLDER         # sources of the installed version, of which the tests alone are read
    python tools/torch_tests/models.py torchvision FOLDER

The tests need pytest-mock and pytest-timeout. Prints a row a model and each test that passes without us and not with us, and of
compiled ones whether torch.compile's own "eager" backend, which changes nothing, does any better; exits with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A small member or two of each family with depthwise convolutions.
MODELS = {
    "timm": [
        "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050", "efficientnet_lite0",
        "efficientnet_b0", "tf_efficientnet_lite0", "mnasnet_small", "mixnet_s", "fbnetc_100", "hardcorenas_a", "lcnet_035",
        "lcnetv2_small", "rexnet_100", "ghostnet_050", "ghostnetv3_050", "repghostnet_050", "mobileone_s0", "fastvit_t8",
        "repvit_m0_9", "starnet_s1", "shvit_s1", "convnext_atto", "inception_next_atto", "edgenext_xx_small", "hgnetv2_b0",
        "ese_vovnet19b_slim_dw", "cspnext_tiny", "mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0", "efficientvit_m0",
        "efficientformerv2_s0", "efficientvim_m1", "swiftformer_xs", "cpubone_nano", "pvt_v2_b0", "coat_lite_tiny",
        "tiny_vit_5m_224", "lowformer_b0", "mambaout_femto", "xception41p",
    ],
    "torchvision": [
        "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0",
        "efficientnet_v2_s", "convnext_tiny", "maxvit_t", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large",
        "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
    ],
}  # fmt: skip
FILES = {"timm": "tests/test_models.py", "torchvision": "test/test_models.py"}


def outcomes(file: Path, library: str, model: str, how: str, tests: Sequence[str] = ()) -> dict[str, dict]:
    """What became of the model's tests, or of these alone; those of pretrained weights, which are elsewhere, left out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.jsonl"
        asked = {"library": library, "models": [model], "how": how, "out": str(out)}
        path = [str(ROOT / "tools" / "torch_tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "DWCONV_BUILT": json.dumps(asked)}
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "built", "-p", "no:cacheprovider", "--show-capture=no"),
            *("-k", "not pretrained"),
            *([f"{file.name}::{test}" for test in tests] or [file.name]),
        ]
        done = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True)
        if not out.exists():
            sys.exit(f"models: {file} ran no test of {model}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line["test"]: line for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=MODELS)
    parser.add_argument("folder", type=Path, help="the library's sources")
    parser.add_argument("--only", action="append", help="these models alone")
    options = parser.parse_args()
    file = options.folder.resolve() / FILES[options.library]
    if not file.is_file():
        sys.exit(f"models: {file} is missing: the folder must hold {options.library}'s sources")
    print(f"{'model':38} {'tests':>6} {'pass: torch':>12} {'converted':>10} {'compiled':>9}   layers replaced, operations fused")
    count = 0
    for model in options.only or MODELS[options.library]:
        worse: list[str] = []
        found = {how: outcomes(file, options.library, model, how) for how in ("torch", "converted", "compiled")}
        passed = {how: {test for test, line in tests.items() if line["kind"] == "passed"} for how, tests in found.items()}
        ran = sum(line["kind"] != "skipped" for line in found["torch"].values())
        layers = sum(line["layers"] for line in found["converted"].values())
        fused = sum(line["fused"] for line in found["compiled"].values())
        counts = [len(tests) for tests in passed.values()]
        print(f"{model:38} {ran:6} {counts[0]:12} {counts[1]:10} {counts[2]:9}   {layers}, {fused}", flush=True)
        for how in ("converted", "compiled"):
            tests = sorted(passed["torch"] - passed[how])
            eager = outcomes(file, options.library, model, "eager", tests) if tests and how == "compiled" else {}
            for test in tests:
                also = f" (with torch.compile's eager backend: {eager[test]['kind']})" if eager else ""
                worse.append(f"{how}: {test}{also}: {found[how].get(test, {'why': 'not run'})['why']}")
        if not (layers and fused):
            worse.append("nothing replaced or nothing fused: its tests say nothing of us")
        print(*(f"    {line}\n" for line in worse), sep="", end="", flush=True)
        count += len(worse)
    if not count:
        print("no test that passes without us fails with us")
    return min(count, 100)


if __name__ == "__main__":
    sys.exit(main())
