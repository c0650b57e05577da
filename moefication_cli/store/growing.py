"""A layer file that grows on disk by rows of its largest tensor; the other tensors and the header come last.

So what a stage streams is written once. The rows stand first, behind room left for the header, and go to their place
whatever else is there: a piece that was cut short is simply written again. `complete` makes it a layer file as
`layerfile.read_layer` reads it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import files
from moefication_cli.store.header import encode, entry, tensor_bytes
from moefication_cli.store.layerfile import encoded_metadata, write_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_START = 16384  # bytes before the rows: the header's length (8) and the header, padded with blanks as the format allows


class GrowingLayer:
    """Rows [T, `width`] of one tensor in `path`, which is made when it is not there; a context manager."""

    def __init__(self, path: Path, width: int, dtype: "torch.dtype") -> None:
        self.path, self._width, self._dtype = path, width, dtype
        with files.writing(path):
            path.touch(mode=0o666)
            self._file = path.open("r+b", buffering=0)  # a full disk is met where rows are written, not when it closes

    def __enter__(self) -> "GrowingLayer":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, start: int, rows: "Tensor") -> None:
        """Put rows (on the CPU) at row number `start`. Raises `MoEficationError` when the disk does not take them."""
        data = tensor_bytes(rows.to(self._dtype))
        with files.writing(self.path, len(data)):
            self._put(_START + start * self._row_bytes, data)

    def sync(self) -> None:
        """Make what was written durable."""
        with files.writing(self.path):
            files.fsync(self.path)

    def rows(self, start: int, count: int) -> "Tensor":
        """These rows, mapped from the file: read when used. Raises `CorruptArtifactError` if it is too short."""
        import torch

        if self.path.stat().st_size < _START + (start + count) * self._row_bytes:
            raise CorruptArtifactError(f"{self.path} is truncated", "run the same command again, with --force")
        if count == 0:
            return torch.empty(0, self._width, dtype=self._dtype)
        # mode c: pages may be written to, which torch asks for, and never reach the file
        mapped = np.memmap(self.path, np.uint8, "c", _START + start * self._row_bytes, count * self._row_bytes)
        return torch.from_numpy(mapped).view(self._dtype).view(count, self._width)

    def complete(self, name: str, count: int, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any]) -> None:
        """The first `count` rows become tensor `name`; the others follow, and metadata (JSON, with `layer`)."""
        end = count * self._row_bytes
        if end % max((tensor.element_size() for tensor in tensors.values()), default=1):
            # What follows would not be aligned (2-byte rows of odd width): such a file is written anew
            write_layer(self.path, {name: self.rows(0, count), **tensors}, metadata)
            return
        entries = {name: entry(self._dtype, (count, self._width), 0, end)}
        pieces = []
        for other, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            pieces.append(tensor_bytes(tensor.detach().cpu()))
            entries[other] = entry(tensor.dtype, tuple(tensor.shape), end, end + len(pieces[-1]))
            end += len(pieces[-1])
        header = encode(entries, encoded_metadata(metadata), _START)
        with files.writing(self.path, end):
            at = _START + count * self._row_bytes
            self._file.truncate(at)
            for piece in pieces:
                self._put(at, piece)
                at += len(piece)
            self._put(0, memoryview(header))
        self.sync()

    def _put(self, at: int, data: memoryview) -> None:
        while len(data):  # a call may take only a part
            written = os.pwrite(self._file.fileno(), data, at)
            at, data = at + written, data[written:]

    @property
    def _row_bytes(self) -> int:
        return self._width * self._dtype.itemsize
