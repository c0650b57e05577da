"""Data in two parts, one to learn from and one to judge by."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.examples import TaskOptions
from moefication_cli.tasks.reading import Rows

Part = tuple[Rows, TaskOptions]
_TOO_SMALL = "name more data, or other data to judge by with --eval-data"


def split_rows(rows: Rows, options: TaskOptions, text: bool, share: float, most: int) -> tuple[Part, Part]:
    """(what stays, what is held out): `share` of the rows, at most `most` examples of them. `limit` counts what stays.

    Rows are drawn by `seed`; of `text`, whose rows may be the lines of one document, the last ones are held out.
    Raises ConfigError where either part would be empty.
    """
    count = round(share * rows.num_rows) if text else min(most, round(share * rows.num_rows))
    if count < 1 or count >= rows.num_rows:
        raise ConfigError(f"{rows.source}: {rows.num_rows} rows are too few to hold out some to judge by", _TOO_SMALL)
    kept = rows.num_rows - count
    heldout = replace(options, limit=most if text else None)
    if text:
        first, last = _cut(rows, 0, kept), _cut(rows, kept, rows.num_rows)
        return (first, options), (last, heldout)
    order = np.random.default_rng(options.seed).permutation(rows.num_rows).astype(np.int64)
    return (rows, replace(options, rows=np.sort(order[:kept]))), (rows, replace(heldout, rows=np.sort(order[kept:])))


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    """Rows start <= i < stop; a document that is cut starts anew."""
    dataset, starts = rows.dataset.select(range(start, stop)), rows.document_starts
    if starts is not None:
        starts = np.array(list(_starts_within(starts.tolist(), start, stop)), np.int64)
    return replace(rows, dataset=dataset, document_starts=starts, notes=[])


def _starts_within(starts: list[int], start: int, stop: int) -> Iterator[int]:
    yield 0
    yield from (number - start for number in starts if start < number < stop)
