"""Writes a copy of a checkpoint with some tensors' neurons permuted or values replaced, one tensor in memory at a time.

That changes neither shapes nor dtypes, so the copy keeps the source's layout and all other bytes are copied
without being interpreted. `safetensors.save_file` would need all tensors of a file at once, writes mode 0600 and does
not sync. Knows nothing of models: `checkpoint` says what is permuted along which axis.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.sentence import MODULES, module_folders
from moefication_cli.models.folder.source import TensorFile
from moefication_cli.store import files, jsonio
from moefication_cli.store.header import Header, encode, entry, tensor_bytes

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    MODULES,
    "*sentence_*.json",
)
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class TensorPlan:
    """Reorder a tensor along `axis`: position i of the copy is position order_F[i] of the source.

    `source` gives the tensor where it is not the file's own; it has the same shape and dtype.
    """

    axis: int = 0
    order_F: Tensor | None = None
    source: Callable[[], Tensor] | None = None


def is_side_file(path: Path) -> bool:
    """Whether it belongs to a model's folder beside the weights: configuration, tokenizer, processor, licence."""
    wanted = any(path.match(pattern) for pattern in SIDE_FILES) and path.suffix not in (".safetensors", ".bin")
    return wanted and path.is_file()


def copy_side_files(folder: Path, out_dir: Path, code: bool) -> list[Path]:
    """Copies configuration, tokenizer, processor and licence files, and the modules of a sentence-transformers folder.

    `*.py` only if `code`.
    """
    written = []
    for source in sorted(folder.iterdir()):
        if is_side_file(source) or (code and source.suffix == ".py" and source.is_file()):
            target = out_dir / source.name
            files.atomic_write(target, source.read_bytes())
            written.append(target)
    for module in module_folders(folder):
        for source in sorted(path for path in module.iterdir() if path.is_file() and (code or path.suffix != ".py")):
            target = out_dir / module.name / source.name
            files.make_dirs(target.parent)
            files.atomic_write(target, source.read_bytes())
            written.append(target)
    return written


def write_shards(shards: list[TensorFile], out_dir: Path, plan: Mapping[tuple[Path, str], TensorPlan]) -> list[Path]:
    """Writes every weight file, and the index if there are several. `x.bin` becomes `x.safetensors`."""
    written, weight_map, total = [], {}, 0
    for shard in shards:
        name = shard.path.name.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors")
        target = out_dir / f"{name}.safetensors"
        mine = {key: plan[shard.path, key] for key in shard.keys if (shard.path, key) in plan}
        with files.writing(target):
            total += _write_file(shard, target, mine)
        weight_map.update(dict.fromkeys(shard.keys, target.name))
        written.append(target)
    if len(shards) > 1:
        index = out_dir / "model.safetensors.index.json"
        jsonio.write(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(index)
    return written


def _write_file(shard: TensorFile, target: Path, plan: Mapping[str, TensorPlan]) -> int:
    """Writes one file, synced, with the permissions the umask gives; returns the bytes of its tensors."""
    pickled = shard.path.suffix == ".bin"
    header = _layout(shard) if pickled else shard.header()
    with target.open("wb") as out, shard.path.open("rb") as raw:
        out.write(encode(header.entries, {"format": "pt", **header.metadata}))
        for key, described in header.entries.items():
            begin, end = described["data_offsets"]
            if key in plan or pickled:
                change = plan.get(key, TensorPlan())
                tensor = shard.get(key) if change.source is None else change.source()
                if change.order_F is not None:
                    tensor = tensor.index_select(change.axis, change.order_F)
                out.write(tensor_bytes(tensor))
            else:
                _copy_range(raw, out, header.start + begin, end - begin)
        out.flush()
        os.fsync(out.fileno())
    return header.end - header.start


def _layout(shard: TensorFile) -> Header:
    """The safetensors header for the tensors of a `.bin` file."""
    entries, offset = {}, 0
    for key in shard.keys:
        tensor = shard.get(key)
        end = offset + tensor.numel() * tensor.element_size()
        try:
            entries[key] = entry(tensor.dtype, tuple(tensor.shape), offset, end)
        except ValueError as error:
            raise ConfigError(f"{shard.path}: {key}: {error}") from None
        offset = end
    return Header(entries, {}, 0)


def _copy_range(raw: BinaryIO, out: BinaryIO, start: int, size: int) -> None:
    raw.seek(start)
    while size > 0:
        chunk = raw.read(min(size, _CHUNK))
        if not chunk:
            raise ConfigError(f"{raw.name} ends early", "download the model again")
        out.write(chunk)
        size -= len(chunk)
