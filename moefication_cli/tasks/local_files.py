"""Local data files as memory-mapped datasets: which files, in which format, and where documents start.

Through the builders of `datasets`, called directly: no network, no code from the data, one cache folder.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt

from moefication_cli.errors import ConfigError

Documents = Literal["auto", "file", "line"]

_SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".csv", ".txt")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test", "eval"),
}
_HEAD = 1 << 18  # bytes looked at to guess what a document is
_LONG_LINE = 200  # characters; a line wrapped for reading is shorter, a document on one line usually longer


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


def guess_documents(files: Sequence[Path], documents: Documents, notes: list[str]) -> Literal["file", "line"] | None:
    """How .txt files are read: each line a document (blank ones dropped), or each file. None for other kinds.

    auto: lines, if the head of the first file has no blank line and its lines are mostly longer than 200 characters.
    """
    if files[0].suffix.lower() != ".txt":
        return None
    if documents != "auto":
        return documents
    with files[0].open("rb") as file:
        head = file.read(_HEAD)
    lines = head.decode("utf-8", errors="replace").splitlines()
    if len(head) == _HEAD:
        lines = lines[:-1]
    one_per_line = len(lines) > 1 and all(map(str.strip, lines)) and float(np.median([*map(len, lines)])) > _LONG_LINE
    mode: Literal["file", "line"] = "line" if one_per_line else "file"
    other = "file" if one_per_line else "line"
    notes.append(f"{files[0].name}: each {mode} is read as one document (--documents {other} otherwise)")
    return mode


def read_rows(
    files: Sequence[Path], header: bool, documents: Literal["file", "line"] | None, cache: str
) -> tuple[Any, npt.NDArray[np.int64] | None]:
    """(dataset, rows where documents start or None). Lines keep their line ends in mode `file`."""
    empty = next((f for f in files if f.stat().st_size == 0), None)
    if empty is not None:
        raise ConfigError(f"{empty} is empty", "name data with at least one row")
    kind = files[0].suffix.lower()
    names = [str(f) for f in files]
    if kind in (".tsv", ".csv"):
        return _read_table(files, "\t" if kind == ".tsv" else ",", header, cache), None
    if kind == ".parquet":
        return datasets.Dataset.from_parquet(names, cache_dir=cache), None
    if kind in (".json", ".jsonl"):
        return datasets.Dataset.from_json(names, cache_dir=cache), None
    if documents == "line":
        lines = datasets.Dataset.from_text(names, cache_dir=cache)
        return _without_blank(lines, cache), None
    parts = [datasets.Dataset.from_text(name, cache_dir=cache, keep_linebreaks=True) for name in names]
    starts = np.cumsum([0] + [part.num_rows for part in parts[:-1]], dtype=np.int64)
    return datasets.concatenate_datasets(parts), starts


def _without_blank(lines: Any, cache: str) -> Any:
    keep: list[npt.NDArray[np.int64]] = []
    for start in range(0, lines.num_rows, 10_000):
        block = lines[start : start + 10_000]["text"]
        keep.append(np.array([start + i for i, text in enumerate(block) if text.strip()], np.int64))
    kept = np.concatenate(keep)
    if len(kept) == lines.num_rows:
        return lines
    return lines.select(kept).flatten_indices(cache_file_name=str(Path(cache) / "kept.arrow"))


def _read_table(files: Sequence[Path], separator: str, header: bool, cache: str) -> Any:
    columns = _columns(files[0], separator, header)
    return datasets.Dataset.from_csv(
        [str(f) for f in files],
        cache_dir=cache,
        # text throughout: guessed types differ between parts of a file, and "null" or "NA" are words here
        features=datasets.Features({name: datasets.Value("string") for name in columns}),
        names=columns,
        header=0 if header else None,
        sep=separator,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
        encoding="utf-8-sig",
        na_filter=False,
    )


def _columns(path: Path, separator: str, header: bool) -> list[str]:
    """Column names from the first line. ConfigError for repeated names or a second line of another width."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoting: Any = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        lines = (line for line in csv.reader(file, delimiter=separator, quoting=quoting) if line)
        try:
            first, second = next(lines, []), next(lines, None)
        except csv.Error as error:
            raise ConfigError(f"{path} cannot be read: {error}", "check the file's format") from error
    if not header:
        return [str(i) for i in range(len(first))]
    if len(set(first)) < len(first):
        raise ConfigError(f"{path}: the first line repeats column names", "a file without a header needs --no-header")
    # pandas would silently take the surplus first column for row names
    if second is not None and len(second) > len(first):
        raise ConfigError(
            f"{path}: the header names {len(first)} columns, the next line has {len(second)}", "check the file"
        )
    return first


def _is_data(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    return path.stem.lower() not in ("readme", "license", "dataset_info", "dataset_infos", "dataset_dict", "state")


def _in_split(path: Path, root: Path, split: str) -> bool:
    words = re.split(r"[^a-z0-9]+", str(path.relative_to(root).with_suffix("")).lower())
    return any(alias in words for alias in _SPLIT_WORDS.get(split.lower(), (split.lower(),)))
