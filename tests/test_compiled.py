"""Compiled kernels are kept under the content of all their sources: an edit anywhere is never met by old code."""

import os
import subprocess
import sys
from pathlib import Path

from moefication_cli.compiled import cache_folder, source_key

KERNEL = """
from pathlib import Path
from {decorators} import {decorator}
from constants import FACTOR

{decorate}
def scaled(x):
    return FACTOR * x
"""
RUN = "import os, sys; sys.path.insert(0, sys.argv[1]); import kernel; print(kernel.scaled(10))"


def scaled(folder: Path, factor: int) -> str:
    """What the kernel gives in a process of its own after its constant was edited."""
    (folder / "constants.py").write_text(f"FACTOR = {factor}\n")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    return made.stdout.strip()


def test_an_edited_constant_is_compiled_again(tmp_path: Path) -> None:
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    for folder, decorators, decorator, decorate in (
        (ours, "moefication_cli.compiled", "cached_njit", "@cached_njit(Path(__file__).parent)"),
        (plain, "numba", "njit", "@njit(cache=True)"),
    ):
        folder.mkdir()
        text = KERNEL.format(decorators=decorators, decorator=decorator, decorate=decorate)
        (folder / "kernel.py").write_text(text)
    assert scaled(ours, 2) == "20"
    assert len(list((ours / "__pycache__").rglob("*.nbc"))) == 1  # it was kept
    assert scaled(ours, 3) == "30"
    assert scaled(plain, 2) == "20"
    assert scaled(plain, 3) == "20"  # negative control: numba alone looks at the kernel's own file


def test_the_key_covers_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("A = 1\n")
    first = source_key(tmp_path)
    source_key.cache_clear()
    assert source_key(tmp_path) == first
    (tmp_path / "b.py").write_text("")
    source_key.cache_clear()
    assert source_key(tmp_path) != first
    assert cache_folder(tmp_path).parent == tmp_path / "__pycache__"
    source_key.cache_clear()
