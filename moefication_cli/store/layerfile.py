"""One layer's tensors as a safetensors file: written atomically, read strictly, whole or by rows.

Names carry axes (`inputs_TD`, `expert_F`). The single metadata key `moefication` holds canonical JSON with `layer`, the
FFN's module path: with one key the bytes are the same in every process (with several, the header's order is random).
Content is not hashed here: a flipped bit in a tensor is found by the manifest's sha256. torch is imported when tensors
are read or written, not before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import jsonio
from moefication_cli.store.header import Header, read_header
from moefication_cli.store.tensorfile import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEY = "moefication"
_HINT = "run the stage that wrote it again, with --force"


def write_layer(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any], tmp: Path | None = None
) -> None:
    """Write tensors (any device, any strides) and metadata (JSON, with `layer`) to `path`, atomically and durably.

    `tmp` replaces the temporary name `.NAME.tmp` beside `path`; it must be on the same file system.
    Raises `MoEficationError` naming path and size when the disk does not take it.
    """
    write_tensors(path, tensors, encoded_metadata(metadata), tmp)


def encoded_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as the header holds it. Raises ValueError unless it names its `layer`."""
    if not isinstance(metadata.get("layer"), str):
        raise ValueError("metadata must name its `layer`")
    return {KEY: jsonio.canonical(metadata).decode()}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata object of a layer file, without torch. Raises OSError, `CorruptArtifactError` naming the file."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[Header, dict[str, Any]]:
    try:
        header = read_header(path)
        metadata = jsonio.parse(header.metadata[KEY], path)
        if not isinstance(metadata["layer"], str):
            raise TypeError("layer")
    except (KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{path} is no layer file of this program: header lacks {error}", _HINT) from error
    except ValueError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}", _HINT) from error
    return header, metadata


@dataclass(frozen=True)
class LayerFile:
    """An open layer file; tensors are read when asked for."""

    path: Path
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    _handle: Any

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.shapes)

    def tensor(self, name: str) -> "Tensor":
        """One whole tensor."""
        self._check(name)
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows start <= r < stop of a tensor, reading only those."""
        self._check(name)
        tensor: Tensor = self._handle.get_slice(name)[start:stop]
        return tensor

    def _check(self, name: str) -> None:
        if name not in self.shapes:
            raise CorruptArtifactError(f"{self.path} holds no tensor {name!r}, only {', '.join(self.names)}", _HINT)


@contextmanager
def open_layer(path: Path) -> Iterator[LayerFile]:
    """Open a layer file for lazy reading. Raises `CorruptArtifactError` (also if it is missing), naming the file.

    The file is memory-mapped: replacing it (a rename) while it is open leaves the reader with the old content.
    """
    from safetensors import SafetensorError, safe_open

    try:
        header, metadata = _read_header(path)
        handle = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}", _HINT) from error
    with handle:
        try:
            yield LayerFile(path, metadata, {n: tuple(e["shape"]) for n, e in header.entries.items()}, handle)
        except SafetensorError as error:
            raise CorruptArtifactError(f"{path} cannot be read: {error}", _HINT) from error


def read_layer(path: Path, names: list[str] | None = None) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """(tensors, metadata) of a layer file; `names` limits what is read. Errors as `open_layer`."""
    with open_layer(path) as layer:
        return {name: layer.tensor(name) for name in (layer.names if names is None else names)}, layer.metadata


def expect(
    tensors: "Mapping[str, Tensor]",
    required: Mapping[str, Any],
    where: Path | str,
    optional: Mapping[str, Any] | None = None,
) -> None:
    """Check names, dtypes and shapes of what was read; `CorruptArtifactError` naming `where` otherwise.

    A spec is (dtype, dtypes or None for any; number of dimensions, or a shape with None for any size):
    `expect(tensors, {"expert_F": (torch.int32, 1), "centroids_ED": (None, (48, None))}, path)`.
    """
    specs = {**(optional or {}), **required}
    if lacking := sorted(required.keys() - tensors.keys()):
        raise CorruptArtifactError(f"{where} lacks the tensor {lacking[0]!r}", _HINT)
    if extra := sorted(tensors.keys() - specs.keys()):
        raise CorruptArtifactError(f"{where} holds an unknown tensor {extra[0]!r}", _HINT)
    for name, tensor in tensors.items():
        dtype, shape = specs[name]
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if dtype is not None and tensor.dtype not in dtypes:
            wanted = " or ".join(str(d) for d in dtypes)
            raise CorruptArtifactError(f"{where}: {name!r} is {tensor.dtype}, expected {wanted}", _HINT)
        actual = tuple(tensor.shape)
        sizes = (None,) * shape if isinstance(shape, int) else shape
        if len(actual) != len(sizes) or any(s is not None and s != a for s, a in zip(sizes, actual, strict=True)):
            wanted = "(" + ", ".join("*" if s is None else str(s) for s in sizes) + ")"
            raise CorruptArtifactError(f"{where}: {name!r} has shape {actual}, expected {wanted}", _HINT)
