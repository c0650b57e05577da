"""Tile products by AMX; apart, because other processors cannot compile it. See `simd_tiles`."""

from pathlib import Path

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu import simd_tiles as t

HERE = Path(__file__).parent


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def begin(unused):
    """Sets up this thread's tile registers."""
    t.tiles_begin()


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def end(unused):
    """Gives them back."""
    t.tiles_end()


@cached_cfunc(HERE, "void(int64, int64, int64, int64, int64, int64, int64, int64)", error_model="numpy")
def product(a, b, c, steps, rows, add, unused, unused_too):
    """C[:rows] = A B, plus what C held if `add` is 1; whole tiles of C are written."""
    if rows > 16:
        t.product_amx_2(a, b, c, steps, add)
    else:
        t.product_amx_1(a, b, c, steps, add)
