"""Rows to run a model on: a hub dataset or local files, read through `datasets` and memory-mapped.

Local files never touch the network. What `datasets` writes for them it maps into memory, and the folder is removed as
soon as it has: a process that is killed leaves nothing in the temporary folder. Every field of a .tsv/.csv is text. In a
.tsv quotes are ordinary characters, as in the GLUE files.
Does not tokenise (`language`, `classification`, `text2text` do) and does not choose the task.
"""

import errno
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import datasets
import huggingface_hub
import numpy as np
import numpy.typing as npt
from datasets.exceptions import DatasetGenerationError

from moefication_cli.errors import ConfigError, MoEficationError, first_line
from moefication_cli.tasks.data_files import PREFERRED, Purpose, expanded, find_files, local_digest, preferred_split
from moefication_cli.tasks.fields import guess_fields, split_fields
from moefication_cli.tasks.local_files import Documents, guess_documents, read_rows
from moefication_cli.tasks.streams import streamed

# Datasets of several configurations that users name as NAME/CONFIG, without the owner
_COLLECTIONS = {
    "glue": "nyu-mll/glue",
    "super_glue": "aps/super_glue",
    "wikitext": "Salesforce/wikitext",
    "tweet_eval": "cardiffnlp/tweet_eval",
    "c4": "allenai/c4",
}
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_FILE_SUFFIX = re.compile(r"\.(tsv|csv|jsonl|json|parquet|txt|gz|zip|arrow)$", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """Rows of text, with the fields that matter.

    `text_fields` is empty when nothing was named and nothing could be guessed (see `require_text`). `document_starts`
    are the rows where a document starts, for data whose rows are lines of longer documents (line ends kept); None:
    every row is a document. `notes` are sentences for the user about what was guessed. `files` are the local files
    read, none for hub data; `fingerprint` identifies hub data.
    """

    dataset: datasets.Dataset
    text_fields: tuple[str, ...]
    label_field: str | None = None
    notes: list[str] = field(default_factory=list)
    source: str = "data"
    files: tuple[Path, ...] = ()
    fingerprint: str | None = None
    document_starts: npt.NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        return int(self.dataset.num_rows)

    @property
    def fields(self) -> list[str]:
        """Names of all fields."""
        return list(self.dataset.column_names)

    def require_text(self) -> tuple[str, ...]:
        """The text fields, or ConfigError listing the fields there are."""
        if not self.text_fields:
            raise ConfigError(
                f"{self.source}: no field looks like the text; fields: {_listed(self.fields)}",
                "name it with --text-field (a,b for a pair); a file without a header needs --no-header",
            )
        return self.text_fields

    def require_fields(self, names: Sequence[str]) -> None:
        """ConfigError unless every name is a field of text."""
        for name in names:
            if name not in self.dataset.features:
                hint = f"fields: {_listed(self.fields)}"
                if name.isdigit():
                    hint += "; column numbers need --no-header"
                raise ConfigError(f"{self.source}: there is no field {name!r}", hint)
            kind = getattr(self.dataset.features[name], "dtype", "a structure")
            if kind not in ("string", "large_string", "string_view"):
                raise ConfigError(f"{self.source}: field {name!r} holds {kind}, not text", "name another --text-field")

    def take(self, names: Sequence[str], indices: npt.NDArray[np.int64]) -> list[tuple[Any, ...]]:
        """The values of some fields in the given rows, in that order."""
        order = np.argsort(indices, kind="stable")  # ascending access is what memory maps are good at
        block = self.dataset.select_columns(list(dict.fromkeys(names)))[indices[order]]
        found: list[tuple[Any, ...]] = [()] * len(indices)
        for place, values in zip(order, zip(*(block[name] for name in names), strict=True), strict=True):
            found[place] = values
        return found


def load_rows(
    ref: str | Path,
    *,
    split: str | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    header: bool = True,
    revision: str | None = None,
    documents: Documents = "auto",
    purpose: Purpose = "calibrate",
    stream: int | None = None,
) -> Rows:
    """Rows of a hub dataset (`glue/sst2` is configuration sst2 of glue), a local file or a folder of files.

    `split` picks a hub split, or the files of a folder that carry its name (train, dev, valid, ...); None picks by
    `purpose` and says so in the notes. `text_field` is `a` or `a,b`; with `header=False` fields are column numbers,
    from 0.
    `documents`: whether each line of a .txt is a document or each file (auto looks at the first file). `stream`: hub data
    is not downloaded, only its first `stream` rows are read (`streams`).
    Raises ConfigError: not found, empty, unreadable, offline, wrong field.
    """
    name = str(ref)
    path = expanded(ref)
    notes: list[str] = []
    if path.exists():
        files = find_files(path, split, PREFERRED[purpose], notes)
        if stream is not None:
            notes.append(f"--stream {stream} is ignored: {name} is local, and read in place")
        mode = guess_documents(files, documents, notes)
        with _quiet(), _readable(name), TemporaryDirectory(prefix="moefication-data-") as cache:
            dataset, starts = read_rows(files, header, mode, cache)
        rows = Rows(dataset, (), None, notes, name, tuple(files), None, starts)
    elif _FILE_SUFFIX.search(name) or name.startswith((".", "/", "~")):
        raise ConfigError(f"data {name} not found", "check the path given with --data")
    else:
        with _quiet(), _readable(name):
            dataset = _load_hub(name, split, revision, purpose, notes, stream)
        starts = _joined_lines(dataset, text_field, documents, notes)
        rows = Rows(dataset, (), None, notes, name, (), dataset._fingerprint, starts)
    if rows.num_rows == 0:
        raise ConfigError(f"{name} is empty", "name data with at least one row")
    return _with_fields(rows, text_field, label_field)


def data_digest(
    ref: str | Path, split: str | None, purpose: Purpose, sha256: Callable[[Path], str], stream: int | None = None
) -> str:
    """Identifies the content that `load_rows` would read: of local files their bytes, of hub data its fingerprint.

    One file counts whatever it is called, files of a folder under their names. Raises ConfigError as `load_rows`.
    """
    path = expanded(ref)
    if not path.exists():
        if _FILE_SUFFIX.search(str(ref)) or str(ref).startswith((".", "/", "~")):
            raise ConfigError(f"data {ref} not found", "check the path given with --data")
        with _quiet(), _readable(str(ref)):
            return str(_load_hub(str(ref), split, None, purpose, [], stream)._fingerprint)
    return local_digest(path, split, purpose, sha256)


def _with_fields(rows: Rows, text_field: str | None, label_field: str | None) -> Rows:
    guessed_text, guessed_label = guess_fields(rows.fields)
    text = split_fields(text_field, rows.fields) if text_field is not None else guessed_text
    rows.require_fields(text)
    if label_field is not None and label_field not in rows.fields:
        hint = f"fields: {_listed(rows.fields)}"
        raise ConfigError(f"{rows.source}: there is no label field {label_field!r}", hint)
    said = []
    if text and text_field is None and len(rows.fields) > 1:
        said.append("text " + " and ".join(map(repr, text)))
    label = label_field if label_field is not None else guessed_label
    if label is not None and label in text:
        label = None
    if label is not None and label_field is None:
        said.append(f"label {label!r}")
    notes = [*rows.notes, f"{rows.source}: guessed fields: {', '.join(said)}"] if said else rows.notes
    return replace(rows, text_fields=text, label_field=label, notes=notes)


def _load_hub(
    name: str, split: str | None, revision: str | None, purpose: Purpose, notes: list[str], stream: int | None
) -> Any:
    first, *rest = name.split("/")
    path, config = name, None
    if first in _COLLECTIONS and len(rest) == 1:
        path, config = _COLLECTIONS[first], rest[0]
    elif len(rest) == 2:
        path, config = f"{first}/{rest[0]}", rest[1]
    elif len(rest) > 2:
        raise ConfigError(f"{name} is neither a local file nor a hub dataset", "use NAME, OWNER/NAME or NAME/CONFIG")
    with _offline_if_unreachable():
        if stream is not None:
            return streamed(path, config, split, revision, purpose, stream, notes)
        loaded = datasets.load_dataset(path, config, split=split, revision=revision)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    chosen = preferred_split(loaded, purpose)
    if len(loaded) > 1:
        notes.append(f"{name}: reading split {chosen!r} of {', '.join(loaded)} (--split)")
    return loaded[chosen]


def _joined_lines(
    dataset: Any, text_field: str | None, documents: Documents, notes: list[str]
) -> npt.NDArray[np.int64] | None:
    """Hub language-modelling data is often one text cut into lines (WikiText); such rows are one document."""
    text = text_field or "text"
    if text not in dataset.column_names or len(dataset.column_names) > 1 or documents == "line":
        return None
    sample = [row for row in dataset[:1000][text] if row]
    if documents == "file" or (sample and sum(row.endswith("\n") for row in sample) > 0.9 * len(sample)):
        notes.append("rows are taken as the lines of one text (--documents line: each row a document)")
        return np.zeros(1, np.int64)
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever a reader trips over is a ConfigError with its first cause; a temporary folder that takes nothing is not."""
    try:
        yield
    except (DatasetGenerationError, ConnectionError) as error:
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        _raise_unwritable(cause)
        if isinstance(error, ConnectionError):
            hint = "check the spelling of a local path; hub data needs a network the first time"
            raise ConfigError(f"{name} is no local file, and the hub cannot be reached", hint) from error
        raise ConfigError(f"{name} cannot be read: {first_line(cause)}", "check the file's format") from error
    except (OSError, ValueError, KeyError) as error:  # datasets' own errors, pandas', pyarrow's and UnicodeDecodeError
        _raise_unwritable(error)
        if "corresponds to no data" in str(error):  # how the builders say that there is no row
            raise ConfigError(f"{name} is empty", "name data with at least one row") from error
        hint = "check --data, --split and --revision"
        raise ConfigError(f"{name} cannot be read: {first_line(error)}", hint) from error


def _raise_unwritable(error: BaseException) -> None:
    """Raise MoEficationError for a full or read-only temporary folder: nothing is wrong with the data then."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        raise MoEficationError(
            f"nothing can be written to the temporary folder: {error.strerror}",
            "free some space there, or name another folder in TMPDIR; then run the same command again",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' progress bars and log lines off, as they were afterwards: progress belongs to the caller."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without a network, use the cache at once: the hub client would retry for half a minute first."""
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    was = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    if not proxied and not was[0]:
        try:
            socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
        except OSError:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = was
