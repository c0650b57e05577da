"""Hub data too large to download: its first rows, read as a stream once and kept beside what `datasets` keeps.

One folder per dataset, configuration, split, revision and number of rows under `HF_DATASETS_CACHE/moefication-streams`: later
stages, other runs and machines without a network that share the cache read the same rows.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets

from moefication_cli.errors import ConfigError, MoEficationError
from moefication_cli.tasks.data_files import PREFERRED, Purpose, preferred_split

_ROOM = 10_000  # rows that are in memory at a time
_ELSEWHERE = "free some space there, or name another folder in HF_DATASETS_CACHE; then run the same command again"


def streamed(
    path: str,
    config: str | None,
    split: str | None,
    revision: str | None,
    purpose: Purpose,
    rows: int,
    notes: list[str],
) -> Any:
    """The first `rows` rows of a hub dataset's split; without `split`, of the one that fits `purpose`.

    Raises ConfigError (no such split), whatever `datasets.load_dataset` raises, MoEficationError (the cache is full or read-only).
    """
    asked = {"path": path, "config": config, "split": split or PREFERRED[purpose], "revision": revision, "rows": rows}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "moefication-streams" / key
    if not kept.is_dir():
        found = datasets.load_dataset(path, config, revision=revision, streaming=True)
        chosen = split or preferred_split(found, purpose)
        if chosen not in found:
            raise ConfigError(f"{path} has no split {chosen!r}", f"its splits: {', '.join(found)}")
        _keep(found[chosen].take(rows), chosen, kept)
    dataset = datasets.load_from_disk(str(kept))
    dataset._fingerprint = key
    chosen = json.loads((kept / "stream.json").read_text(encoding="utf-8"))["split"]
    notes.append(f"{path}: the first {dataset.num_rows} rows of split {chosen!r}, kept in {kept}")
    return dataset


def _keep(stream: Any, split: str, kept: Path) -> None:
    """Write what a stream gives to the folder `kept`, which is there whole or not at all."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(prefix=".partial-", dir=kept.parent)
    except OSError as error:
        raise MoEficationError(f"cannot write {kept.parent}: {error.strerror}", _ELSEWHERE) from error
    with scratch as name:
        made = datasets.Dataset.from_generator(
            _rows, features=stream.features, gen_kwargs={"stream": stream}, cache_dir=name, writer_batch_size=_ROOM
        )
        folder = Path(name) / "rows"
        try:
            made.save_to_disk(folder)
            (folder / "stream.json").write_text(json.dumps({"split": split}), encoding="utf-8")
            folder.rename(kept)
        except OSError as error:
            if not kept.is_dir():  # else another process was faster
                raise MoEficationError(f"cannot write {kept}: {error.strerror}", _ELSEWHERE) from error


def _rows(stream: Any) -> Iterator[dict[str, Any]]:
    yield from stream
