"""Local data files as memory-mapped datasets: in which format, and where documents start.

Through the builders of `datasets`, called directly: no network, no code from the data, one cache folder.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt

from moefication_cli.errors import ConfigError

Documents = Literal["auto", "file", "line"]

_HEAD = 1 << 18  # bytes looked at to guess what a document is
_LONG_LINE = 200  # characters; a line wrapped for reading is shorter, a document on one line usually longer


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
