"""Which local files `--data` names, and a digest of their content. Imports neither torch nor `datasets`."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from moefication_cli.errors import ConfigError

Purpose = Literal["calibrate", "evaluate"]

# The first of these splits a dataset has is taken when none is named
PREFERRED: dict[Purpose, tuple[str, ...]] = {
    "calibrate": ("train", "validation", "dev", "test"),
    "evaluate": ("validation", "dev", "test", "train"),
}
GENERATED = "generated:"  # data that a language model writes itself: `runs.generated` puts a file in its place
_SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".csv", ".txt")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test", "eval"),
}


def preferred_split(names: Iterable[str], purpose: Purpose) -> str:
    """The split of a dataset that fits the purpose best; the first where none does."""
    found = list(names)
    return next((name for wanted in PREFERRED[purpose] for name in found if name.startswith(wanted)), found[0])


def expanded(ref: str | Path) -> Path:
    """The path with `~` filled in. Raises ConfigError where there is no such user, and for text still to be generated."""
    if str(ref).startswith(GENERATED):
        raise ConfigError(
            f"{ref}: text is generated for calibration only, by collect-activations and run --data",
            "name data here, RUN/generated/text.jsonl where it was made",
        )
    try:
        return Path(ref).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"data not found: {ref}: there is no such user", "give a file, a folder or a hub dataset"
        ) from None


def named_data(text: str | None) -> dict[str, str]:
    """{name: data} of `--data valid=valid.txt,other=other.txt`; {"": data} of a plain path or hub dataset.

    A file that exists under the whole text is that file. Raises ConfigError: no data, parts without a name, a name twice.
    """
    if text is None:
        raise ConfigError("no data was named", "name a file or hub dataset with --data")
    parts = [part.partition("=") for part in text.split(",")]
    named = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", parts[0][0]) is not None and parts[0][1] == "="
    if not named or Path(text).exists():
        return {"": text}
    found: dict[str, str] = {}
    for name, _, data in parts:
        name = name.strip()
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or not data:
            raise ConfigError(f"--data {text}: {name!r} is not NAME=DATA", "write e.g. valid=valid.txt,other=other.txt")
        if name in found:
            raise ConfigError(f"--data {text}: two data sets are named {name}", "give each a name of its own")
        found[name] = data
    return found


def find_files(path: Path, split: str | None, preferred: Sequence[str], notes: list[str]) -> list[Path]:
    """The data files of a path: itself, or those of a folder that belong to the split. ConfigError if there is none."""
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ConfigError(f"{path}: unknown kind of data file", f"use one of {', '.join(_SUFFIXES)}")
        if split is not None:
            notes.append(f"--split {split} is ignored: {path} is one file")
        return [path]
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in _SUFFIXES and f.is_file() and _is_data(f, path)]
    if not files:
        raise ConfigError(f"{path} holds no data files", f"use files of kind {', '.join(_SUFFIXES)}")
    wanted = [split] if split is not None else [*preferred]
    chosen = next((found for name in wanted if (found := [f for f in files if _in_split(f, path, name)])), [])
    if split is not None and not chosen:
        listed = ", ".join(f.name for f in files[:10])
        raise ConfigError(f"{path}: no file of split {split!r}", f"files there: {listed}")
    if chosen and split is None and len(chosen) < len(files):
        notes.append(f"{path}: reading {', '.join(f.name for f in chosen[:5])} (--split)")
    chosen = chosen or files
    kinds = {f.suffix.lower() for f in chosen}
    if len(kinds) > 1:
        raise ConfigError(
            f"{path} mixes files of kind {', '.join(sorted(kinds))}", "name one file with --data, or a --split"
        )
    return chosen


def local_digest(path: Path, split: str | None, purpose: Purpose, sha256: Callable[[Path], str]) -> str:
    """Identifies what is read of a local file, whatever it is called, or of a folder's files and their names."""
    digest = hashlib.sha256()
    for file in find_files(path, split, PREFERRED[purpose], []):
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_data(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    return path.stem.lower() not in ("readme", "license", "dataset_info", "dataset_infos", "dataset_dict", "state")


def _in_split(path: Path, root: Path, split: str) -> bool:
    words = re.split(r"[^a-z0-9]+", str(path.relative_to(root).with_suffix("")).lower())
    return any(alias in words for alias in _SPLIT_WORDS.get(split.lower(), (split.lower(),)))
