"""Tile products by AVX512-BF16; apart, because other processors cannot compile it. See `simd_tiles`."""

from pathlib import Path

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu import simd_tiles as t

HERE = Path(__file__).parent


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def nothing(unused):
    """There is no state to set up or give back."""


@cached_cfunc(HERE, "void(int64, int64, int64, int64, int64, int64, int64, int64)", error_model="numpy")
def product(a, b, c, steps, rows, add, unused, unused_too):
    """C[:rows] = A B, plus what C held if `add` is 1; groups of eight rows of C are written."""
    for r in range(0, rows, 8):
        t.product_avx512_8(a + 64 * r, b, c + 128 * r, steps, add)
