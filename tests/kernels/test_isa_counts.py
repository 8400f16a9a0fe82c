"""The counter of instructions in inner loops (tools/isa_counts.py), on code whose counts are known."""

from __future__ import annotations

from isa_counts import Instruction, inner_loop

# A loop over x (0x04) with one over planes in it (0x08); a row that may be skipped, an activation that is not applied.
CODE = """
00 mov x0, #0
04 movi v0.4s, #0x0
08 ldr q1, [x1]
0c cbz w2, 14 <f+0x14>
10 fmla v0.4s, v1.4s, v2.4s
14 subs x3, x3, #0x1
18 b.ne 8 <f+0x8>
1c cbnz w4, 28 <f+0x28>
20 bl 0 <f>
24 mov v0.16b, v3.16b
28 str q0, [x5]
2c cmp x0, x6
30 b.lt 4 <f+0x4>
34 ret
"""


def code(text: str) -> list[Instruction]:
    lines = [line.split(maxsplit=2) for line in text.strip().splitlines()]
    return [Instruction(int(line[0], 16), line[1], line[2] if len(line) > 2 else "") for line in lines]


def test_a_trip_is_the_path_with_all_multiply_adds_and_no_activation():
    trip = inner_loop(code(CODE), stores=True)
    assert [x.address for x in trip] == [0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C, 0x28, 0x2C, 0x30]
    assert [sum(getattr(x, kind) for x in trip) for kind in ("multiplies", "loads", "stores")] == [1, 1, 1]


def test_without_stores_it_is_the_loop_within():
    assert [x.address for x in inner_loop(code(CODE), stores=False)] == [0x08, 0x0C, 0x10, 0x14, 0x18]
    assert inner_loop(code("00 ret"), stores=False) == []


def test_operands_in_memory_count_as_loads_and_stores():
    at, both = Instruction(0, "vfmadd231ps", "0x20(%rsi),%ymm1,%ymm2"), Instruction(4, "vmovups", "%ymm1,(%rdi)")
    assert at.multiplies and at.loads and not at.stores and both.stores and not both.loads
