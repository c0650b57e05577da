"""Tile products by AVX512-BF16; apart, because other processors cannot compile it. See `simd_tiles`."""

from pathlib import Path

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu import simd_tiles as t

HERE = Path(__file__).parent


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def nothing(unused):
    """There is no state to set up or give back."""


@cached_cfunc(HERE, "void(int64, int64, int64, int64, int64, int64, int64, int64)", error_model="numpy")
def product(a_rows, b, c_rows, steps, rows, a_step, c_at, unused):
    """C[:rows] += A B, rows of A and C wherever the two lists of addresses say; groups of eight rows are read and written."""
    for r in range(0, rows, 8):
        t.product_avx512_8(a_rows + 8 * r, b, c_rows + 8 * r, steps, a_step, c_at)
