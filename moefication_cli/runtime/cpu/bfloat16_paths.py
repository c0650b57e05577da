"""Which instructions bfloat16 layers are multiplied with on this machine, and the compiled functions for them.

`amx`           tiles, Sapphire Rapids and later; Linux gives a process the tile registers only when asked
`avx512_bf16`   `vdpbf16ps`, Cooper Lake, Sapphire Rapids, Zen 4 and later
`float32`       everywhere: weights are widened as they are read (`numba_kernels`)
"""

import ctypes
import sys
from functools import lru_cache

from moefication_cli.compiled import cpu_features
from moefication_cli.errors import UnavailableError

PATHS = ("amx", "avx512_bf16", "float32")
# x86-64 Linux: asm/unistd_64.h, asm/prctl.h, fpu/types.h
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache(maxsize=1)
def available_paths() -> tuple[str, ...]:
    """The paths this machine can run."""
    found = [PATHS[2]]
    if {"avx512bf16", "avx512bw"} <= cpu_features():
        found.insert(0, PATHS[1])
        if {"amx-tile", "amx-bf16"} <= cpu_features() and _may_use_tiles():
            found.insert(0, PATHS[0])
    return tuple(found)


def _may_use_tiles() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def default_path() -> str:
    """The first of PATHS that this machine can run."""
    return available_paths()[0]


def tile_functions(path: str) -> tuple[int, int, int]:
    """Addresses of the tile product of `path` and of what goes before and after it; zeros for `float32`.

    Raises UnavailableError where this machine cannot run it.
    """
    if path not in available_paths():
        known = ", ".join(available_paths())
        raise UnavailableError(f"bfloat16 path {path!r} does not run on this machine", f"use one of {known}")
    if path == "amx":
        from moefication_cli.runtime.cpu import numba_amx as amx

        return amx.product.address, amx.begin.address, amx.end.address
    if path == "avx512_bf16":
        from moefication_cli.runtime.cpu import numba_avx512bf16 as avx

        return avx.product.address, avx.nothing.address, avx.nothing.address
    return 0, 0, 0
