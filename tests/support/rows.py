"""The rows of the CPU's kernel table."""

from __future__ import annotations

import dwconv_ext

TABLE = dwconv_ext._C.kernel_table()


def label(row: dict) -> str:
    return f"{row['isa']}-{row['name']}-{row['dtype']}-f{row['filter']}-s{row['stride']}"
