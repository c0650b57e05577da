"""The demo's data: the source text of Python's own standard library, which every user already has.

A module belongs to the held-out part when a hash of its top-level name says so, so the same modules are held
out on every machine and under every Python version; nothing the demo model was trained on is ever evaluated.
Left out: tests, generated tables (`encodings`, `pydoc_data`) and what newer Pythons no longer ship.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

_SKIP = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
    "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo", "lib-dynload", "__phello__",
}  # fmt: skip

Part = Literal["train", "heldout"]


def stdlib_files(part: Part) -> list[Path]:
    """Source files of one part of the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if any(name in _SKIP or name.startswith("config-") for name in folders):
            continue
        if _is_heldout(relative.parts[0].removesuffix(".py")) == (part == "heldout"):
            files.append(path)
    return files


def stdlib_documents(part: Part) -> list[str]:
    """The text of each module of one part: one document per source file, empty files left out."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(part))
    return [text for text in texts if text.strip()]


def _is_heldout(top_level_name: str) -> bool:
    return hashlib.sha256(top_level_name.encode()).digest()[0] < 26  # about a tenth of the modules
