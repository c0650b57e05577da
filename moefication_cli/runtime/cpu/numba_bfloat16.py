"""The kernels of `numba_kernels` for bfloat16 weights; apart, so that float32 users never compile them."""

from pathlib import Path

import numpy as np

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu.numba_kernels import piece, project

HERE = Path(__file__).parent

BF16 = np.uint16(0)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 8) + ")", error_model="numpy")
def project_bfloat16(rows, m, w, row_bytes, n, length, h, h_bytes):
    """`project` for bfloat16 weights."""
    project(BF16, rows, m, w, row_bytes, n, length, h, h_bytes)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 16) + ")", error_model="numpy")
def piece_bfloat16(
    call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
):
    """`piece` for bfloat16 weights."""
    piece(BF16, call, rows, ys, m, up, gate, down, b_up, b_gate, n, length, row_bytes, act, scratch)
