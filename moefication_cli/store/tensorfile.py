"""Tensors as a safetensors file, written atomically and durably: for layer files and for checkpoints that others read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moefication_cli.store import files

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str], tmp: Path | None = None
) -> None:
    """Write tensors (any device, any strides, shared memory or not) and the header's metadata to `path`.

    `tmp` replaces the temporary name `.NAME.tmp` beside `path`; it must be on the same file system. The file gets the mode
    that the umask gives. Raises `MoEficationError` naming path and size when the disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tmp = files.temporary(path) if tmp is None else tmp
    stored = _storable(tensors)
    num_bytes = sum(t.numel() * t.element_size() for t in stored.values())
    with files.writing(path, num_bytes):
        try:
            # save_file gives mode 0600 whatever the umask: learn the umask's mode from a file made the ordinary way.
            tmp.unlink(missing_ok=True)
            tmp.touch(mode=0o666)
            mode = tmp.stat().st_mode & 0o777
            save_file(stored, tmp, metadata=dict(metadata))
            tmp.chmod(mode)
            files.fsync(tmp)
            files.replace(tmp, path)
        except SafetensorError as error:
            tmp.unlink(missing_ok=True)
            raise files.write_error(path, str(error), num_bytes=num_bytes) from error
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def _storable(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    # safetensors refuses tensors that share storage: those, and slices of something larger, are copied.
    stored: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored
