"""What nvcc made of the CUDA kernels, read from the built library by cuobjdump (Triton's, which comes with torch)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

import dwconv_ext

pytestmark = pytest.mark.xdist_group("cuda_build")
if dwconv_ext._C_cuda is None:
    pytest.skip(f"no CUDA half: {dwconv_ext.cuda_status}", allow_module_level=True)


def cuobjdump(*arguments: str) -> str:
    tool = shutil.which("cuobjdump")
    try:
        import triton

        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    if tool is None:
        pytest.skip("no cuobjdump, neither Triton's nor a toolkit's")
    return subprocess.run([tool, *arguments, dwconv_ext._C_cuda.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources() -> dict[str, list[dict[str, int]]]:
    """Registers, stack and local bytes of every kernel, one entry an architecture."""
    found = defaultdict(list)
    text = cuobjdump("--dump-resource-usage")
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        found[name].append({key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", numbers)})
    return found


def test_every_row_is_one_kernel(resources):
    kernels = {name for name in resources if "dwconv" in name}
    assert len(kernels) == len(dwconv_ext._C_cuda.kernel_table())


def test_no_spills_and_no_local_memory(resources):
    wrong = {name: uses for name, uses in resources.items() if any(use["STACK"] > 0 or use["LOCAL"] > 0 for use in uses)}
    assert not wrong


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    text = cuobjdump("--dump-sass", "--gpu-architecture", "sm_80")
    parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_fused_kernels_use_tensor_cores_and_wide_accesses(sass):
    fused = {name: code for name, code in sass.items() if "separable_tensor" in name and ("half" in name or "bfloat16" in name)}
    assert len(fused) == 16
    for name, code in fused.items():
        assert "HMMA.16816.F32" in code, name
        assert re.search(r"LDGSTS\.E\.BYPASS\.128|LDGSTS\.E.*\.128", code), name
        if "Lb1E" in name:  # channels_last
            assert re.search(r"LDG\.E\.64|LDGSTS\.E.*\.128", code) and re.search(r"STG\.E\.128", code), name


def test_inverted_residuals_use_tensor_cores_and_wide_accesses(sass):
    fused = {name: code for name, code in sass.items() if "inverted_tensor" in name and ("half" in name or "bfloat16" in name)}
    assert len(fused) == 12
    for name, code in fused.items():
        assert "HMMA.16816.F32" in code and "LDSM.16.M88.4" in code, name
        assert re.search(r"LDGSTS\.E\.BYPASS\.128|LDGSTS\.E.*\.128", code), name
        if "Lb1E" in name:  # channels_last
            assert re.search(r"STG\.E\.128", code), name


def test_hopper_kernels_use_wgmma():
    if not any(row["tensor"] == 2 for row in dwconv_ext._C_cuda.kernel_table()):
        pytest.skip("not built for sm_90")
    text = cuobjdump("--dump-sass", "--gpu-architecture", "sm_90a")
    parts = re.split(r"Function : (\S+)", text)
    code = {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if "separable_group" in name}
    assert len(code) == 16
    for name, text in code.items():
        assert re.search(r"HGMMA\.64x128x16\.F32", text) and "HMMA.16816" not in text, name


def test_depthwise_kernels_copy_16_bytes(sass):
    tiled = {name: code for name, code in sass.items() if re.search(r"\d+depthwise_n(hwc|chw)I", name)}
    assert len(tiled) == 54
    assert all(re.search(r"LDGSTS.*\.128", code) for code in tiled.values())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_batch_norm_moves_16_bytes(architecture):
    """Of every type and layout, reads and, where values are written, writes."""
    text = cuobjdump("--dump-sass", "--gpu-architecture", architecture)
    parts = re.split(r"Function : (\S+)", text)
    code = {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if re.search(r"\d+batch_norm_[^j]", name)}
    if not code:
        pytest.skip(f"not built for {architecture}")
    assert len(code) == 32
    for name, text in code.items():
        assert re.search(r"LDG\.E\.128", text), name
        assert re.search(r"STG\.E\.128", text) or "statistics" in name or "grad_sums" in name, name
