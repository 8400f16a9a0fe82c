"""What nvcc made of the CUDA kernels, read from the built library by cuobjdump (Triton's, which comes with torch)."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import sass_counts

import dwconv_ext

pytestmark = pytest.mark.xdist_group("cuda_build")
if dwconv_ext._C_cuda is None:
    pytest.skip(f"no CUDA half: {dwconv_ext.cuda_status}", allow_module_level=True)


def cuobjdump(*arguments: str) -> str:
    text = sass_counts.cuobjdump(dwconv_ext._C_cuda.__file__, *arguments)
    if text is None:
        pytest.skip("no cuobjdump, neither Triton's nor a toolkit's")
    return text


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
    return sass_counts.functions(cuobjdump("--dump-sass", "--gpu-architecture", "sm_80"))


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


@pytest.fixture(scope="module")
def hopper() -> dict[str, str]:
    if not any(row["tensor"] == 2 for row in dwconv_ext._C_cuda.kernel_table()):
        pytest.skip("not built for sm_90")
    return sass_counts.functions(cuobjdump("--dump-sass", "--gpu-architecture", "sm_90a"))


def test_hopper_kernels_use_wgmma(hopper):
    code = {name: text for name, text in hopper.items() if "separable_group" in name}
    assert len(code) == 16
    for name, text in code.items():
        assert re.search(r"HGMMA\.64x128x16\.F32", text) and "HMMA.16816" not in text, name


def test_launches_that_begin_early_wait_before_they_read(hopper):
    second = {name: text for name, text in hopper.items() if re.search(r"(sum_parts|channels_last_values)I\w+Lb1E", name)}
    assert len(second) == 6
    for name, text in {**second, **{name: text for name, text in hopper.items() if "separable_group" in name}}.items():
        first = re.search(r"\b(ACQBULK|LDG|LDGSTS|LD|STG)\b", text)  # griddepcontrol.wait is ACQBULK
        assert first[1] == "ACQBULK", name
        if name in second:  # what the launch before wrote, not by the cache that is read-only for a launch
            assert "LDG.E" in text and ".CONSTANT" not in text, name


# Of the inner loops, per output. A 16-bit output moves 4 bytes and more: an H200 has time for 26 in all (docs/design/cuda.md).
MOST = {
    ("depthwise_rows_nhwc", 3, 1, 8): 16.5,
    ("depthwise_rows_nhwc", 3, 1, 4): 21,
    ("depthwise_rows_nhwc", 5, 1, 4): 41,
    ("depthwise_backward_weight_rows_nhwc", 3, 1, 8): 20,
    ("depthwise_backward_weight_rows_nhwc", 5, 1, 4): 43,
}


def test_instructions_per_output():
    if "9.0" not in dwconv_ext._C_cuda.architectures:
        pytest.skip("not built for sm_90")
    found = {}
    for each in sass_counts.count_file(dwconv_ext._C_cuda.__file__, "rows_nhwc"):
        assert each.exact, each
        bytes_at_once = each.kernel.numbers[0] * sass_counts.BYTES[each.kernel.dtype]
        if each.kernel.dtype in ("float16", "bfloat16"):
            found[each.kernel.name, each.kernel.filter, each.kernel.stride, bytes_at_once, each.kernel.dtype] = each.total
    for (*key, dtype), total in found.items():
        assert total <= MOST.get(tuple(key), 100), (key, dtype, total)
    assert {key[:4] for key in found} >= set(MOST)


def test_instructions_per_output_of_lines():
    if "9.0" not in dwconv_ext._C_cuda.architectures:
        pytest.skip("not built for sm_90")
    found = sass_counts.count_file(dwconv_ext._C_cuda.__file__, "weight_lines")
    assert len(found) == 18 and all(each.exact for each in found)
    for each in found:
        assert each.total <= (22 if each.kernel.dtype == "float32" else 16), each


def test_depthwise_kernels_copy_16_bytes(sass):
    tiled = {name: code for name, code in sass.items() if re.search(r"\d+depthwise_n(hwc|chw)I", name)}
    assert len(tiled) == 60
    assert all(re.search(r"LDGSTS.*\.128", code) for code in tiled.values())


def test_batch_norm_moves_16_bytes(sass):
    """Of every type and layout, reads and, where values are written, writes."""
    code = {name: text for name, text in sass.items() if re.search(r"\d+batch_norm_[^j]", name)}
    assert len(code) == 32
    for name, text in code.items():
        assert re.search(r"LDG\.E\.128", text), name
        assert re.search(r"STG\.E\.128", text) or "statistics" in name or "grad_sums" in name, name
