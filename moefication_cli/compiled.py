"""Where numba keeps compiled kernels: in a folder named after everything that goes into them.

numba itself looks at the time and size of the one file that a function stands in. A kernel that takes constants or
functions from another file would meet code compiled from the old ones after an edit there.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


@lru_cache
def source_key(folder: Path) -> str:
    """Hex digest of the names and contents of all Python files in `folder`, and of the versions of numba and llvmlite."""
    import llvmlite
    import numba

    digest = hashlib.sha256(f"numba {numba.__version__} llvmlite {llvmlite.__version__}".encode())
    for path in sorted(folder.glob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def cache_folder(folder: Path) -> Path:
    """Where kernels of the files in `folder` are kept: beside them, or below the user's cache where that is not writable.

    NUMBA_CACHE_DIR, where it is set, takes the place of both.
    """
    import numba

    if numba.config.CACHE_DIR:
        parent = Path(numba.config.CACHE_DIR)
    elif os.access(folder, os.W_OK):
        parent = folder / "__pycache__"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moefication"
    return parent / f"kernels-{source_key(folder)}"


@lru_cache
def cpu_features() -> frozenset[str]:
    """What numba compiles for, in LLVM's names (`avx512vnni`): the machine's features, or those of NUMBA_CPU_FEATURES.

    numba keys its cache of compiled kernels by the same.
    """
    from numba.core.registry import cpu_target

    said = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return frozenset(name[1:] for name in said if name.startswith("+"))


def processor() -> str:
    """The processor's name, as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cached_njit(folder: Path, *signature: str, **options: Any) -> Callable[[Kernel], Kernel]:
    """`numba.njit(*signature, **options)` for a function of a file in `folder`, its compiled code in `cache_folder`."""

    def decorate(function: Kernel) -> Kernel:
        import numba

        with _caching_in(cache_folder(folder)):
            return cast(Kernel, numba.njit(*signature, cache=True, **options)(function))

    return decorate


def cached_cfunc(folder: Path, signature: str, **options: Any) -> Callable[[Any], Any]:
    """`numba.cfunc(signature, **options)`, likewise."""

    def decorate(function: Any) -> Any:
        import numba

        with _caching_in(cache_folder(folder)):
            return numba.cfunc(signature, cache=True, **options)(function)

    return decorate


@contextmanager
def _caching_in(folder: Path) -> Iterator[None]:
    """numba reads its setting when a decorator runs; it is as before afterwards."""
    import numba

    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
