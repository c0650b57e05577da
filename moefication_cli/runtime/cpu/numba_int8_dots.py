"""The integer form of `numba_int8`; apart, because a CPU without the instruction cannot compile it."""

from pathlib import Path

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu.numba_int8 import make_piece, quantise

HERE = Path(__file__).parent

_piece = make_piece(True)


@cached_cfunc(HERE, "void(int64, int64, int64)", error_model="numpy")
def quantise_token(x, length, target):
    """One token x [length], float32, as the quantised row that `piece_integer` reads."""
    quantise(x, 0, length, target, (length + 63) // 64 * 64)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 16) + ")", error_model="numpy")
def piece_integer(
    call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
):
    """`piece` for quantised rows."""
    _piece(
        call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
    )  # fmt: skip
