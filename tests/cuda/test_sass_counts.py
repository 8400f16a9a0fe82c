"""tools/sass_counts.py on a loop written by hand; tests/cuda/test_cuda_build.py counts the built kernels."""

from __future__ import annotations

import sass_counts

CODE = [
    "S2R R0, SR_TID.X",
    "LDC R1, c[0x0][0x210]",
    "LDG.E.64 R2, desc[UR4][R4.64]",  # 0x20: the loop, of which the load and an activation may be skipped
    "@P1 BRA 0x50",
    "LDG.E R3, desc[UR4][R4.64]",
    "HADD2.F32 R6, -RZ, R2.H0_H0",  # 0x50
    "FFMA R7, R6, R3, R7",
    "FFMA R8, R6, R3, R8",
    "@!P0 BRA 0xb0",
    "FADD R7, R7, 3",
    "FMUL R7, R7, R8",
    "@P2 STG.E.U16 desc[UR4][R4.64], R7",  # 0xb0
    "IADD3 R4, R4, 0x10, RZ",
    "@!P3 BRA 0x20",
    "EXIT",
]


def test_a_trip_loads_and_multiplies_all_and_applies_no_activation():
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;  /* 0x0 */" for i, line in enumerate(CODE))
    trip, before = sass_counts.Function(text).inner_loop(stored=2)
    assert [i.address for i in trip] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xB0, 0xC0, 0xD0]
    kinds = [i.kind for i in trip]
    expected = {"global": 3, "conversions": 1, "sums": 2, "control": 3, "addresses": 1}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    assert [i.name for i in before] == ["S2R", "LDC"]


def test_outputs_come_from_names_and_constants():
    name = "_ZN6dwconv4cuda19depthwise_rows_nhwcI6__halfNS0_7ForwardILi3ELi2EEELi2EEEvNS0_17DepthwiseTileArgsE"
    kernel = sass_counts.kernel_of(name)
    assert (kernel.name, kernel.dtype, kernel.filter, kernel.stride) == ("depthwise_rows_nhwc", "float16", 3, 2)
    assert kernel.outputs() == (2 * 4 * 2, 9)  # rows in progress, columns of a strip, channels; taps
    assert sass_counts.kernel_of("_ZN6dwconv4cuda9sum_partsI6__halfLb1EEEvNS0_12SumPartsArgsE") is None
