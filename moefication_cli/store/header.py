"""The header of a safetensors file, read and written in one place: for files this program streams itself.

A file is an 8-byte length, a JSON header of that length (`name -> {dtype, shape, data_offsets}` and `__metadata__`) and
the tensors' bytes (https://huggingface.co/docs/safetensors, "Format"). The library writes a file only with all of its
tensors at hand, and accepts a name that is there twice; neither is enough here. torch is not imported.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefication_cli.store import jsonio

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LARGEST = 100_000_000  # bytes of a header: the limit of safetensors itself
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors, in the order of their bytes; `start` is the offset of the first of them."""

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @property
    def end(self) -> int:
        """The size the file must have, in bytes."""
        return self.start + max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size.

    Raises OSError, ValueError saying what is wrong with it, or CorruptArtifactError where it is no strict JSON.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(_LARGEST, size - 8):
            raise ValueError(f"truncated or no safetensors file ({size} bytes)")
        content = jsonio.parse(file.read(length), path)
    try:
        metadata = content.pop("__metadata__", None) or {}
        for entry in content.values():
            start, stop = entry["data_offsets"]
            if not (isinstance(entry["shape"], list) and 0 <= int(start) <= int(stop)):
                raise ValueError("offsets")
        entries = dict(sorted(content.items(), key=lambda item: tuple(item[1]["data_offsets"])))
        header = Header(entries, dict(metadata), 8 + length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no safetensors header: {error}") from error
    if size != header.end:
        raise ValueError(f"{size} bytes, its header promises {header.end}")
    return header


def encode(entries: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str], room: int | None = None) -> bytes:
    """Length and header, padded with blanks to a multiple of 8 bytes, or to `room` bytes in all.

    Raises ValueError when it needs more than `room`.
    """
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    size = 8 + len(header) + -len(header) % 8 if room is None else room
    if 8 + len(header) > size:
        raise ValueError(f"the header takes {8 + len(header)} bytes, more than {size}")
    return struct.pack("<Q", size - 8) + header.ljust(size - 8)


def entry(dtype: "torch.dtype", shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    """The header's entry for a tensor at these bytes after the header. Raises ValueError for a dtype not in the format."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name} cannot be written to safetensors")
    return {"dtype": _DTYPES[name], "shape": list(shape), "data_offsets": [start, stop]}


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor on the CPU, row by row; not copied where the tensor is contiguous."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
