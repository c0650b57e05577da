"""int8 weights in files: `apply --weights int8` writes them in place of the float ones, `load` reads them.

`moefication-int8.safetensors` holds a model as `int8.quantise_model` makes it: of every matrix its int8 rows [R, C] as MODULE.weight and
their scales [R] as MODULE.weight_scale, with a row per neuron for the projections of FFNs with experts, per output for other linear
layers, per token for embeddings; everything else, buffers that are computed too, under its name in the model. Names that share
a tensor are in the file's metadata, {"tied": JSON {other: name}}. Plain transformers finds no weights in such a folder and says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from moefication_cli.errors import ConfigError, CorruptArtifactError, first_line
from moefication_cli.models.folder.contents import INT8_WEIGHTS
from moefication_cli.models.folder.source import LOAD_ERRORS
from moefication_cli.models.int8 import Int8Linear, Rounded
from moefication_cli.models.projections import SCALE, rows_of
from moefication_cli.models.sites import FFNSite
from moefication_cli.store.tensorfile import write_tensors

_AGAIN = "write the folder again: moefication apply RUN --weights int8 --force"
_WEIGHT = ".weight"


def write_int8(folder: Path, model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Writes what `quantise_model` made of a model, whose FFNs are `sites`, synced."""
    tensors, tied = _named(model, sites)
    write_tensors(folder / INT8_WEIGHTS, tensors, {"format": "pt", "tied": json.dumps(tied, sort_keys=True)})


def _named(model: nn.Module, sites: Sequence[FFNSite]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the file, and the names of those that are another one."""
    rows: dict[str, Tensor] = {}
    for site in sites:
        for path in (site.up, site.gate, site.down):
            part: Any = None if path is None else model.get_submodule(path)
            if part is not None and not isinstance(part, Int8Linear) and not part.weight.is_floating_point():
                rows[f"{path}{_WEIGHT}"] = rows_of(part, path != site.down)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _held(model):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = rows.get(name, tensor)
    return tensors, tied


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, those that share a tensor under each of their names."""
    for path, part in model.named_modules(remove_duplicate=False):
        for kind, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                yield (f"{path}.{kind}" if path else kind), tensor


class StoredInt8:
    """The file of a folder, read tensor by tensor. Raises CorruptArtifactError where it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / INT8_WEIGHTS
        self._made: dict[str, Rounded] = {}
        self._given: dict[str, Tensor] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                self._keys = set(file.keys())
                self._tied: dict[str, str] = json.loads((file.metadata() or {})["tied"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CorruptArtifactError(f"{self.path} cannot be read: {first_line(error)}", _AGAIN) from None

    def matrix(self, module: str) -> Rounded:
        """The int8 matrix of the module of that name; of modules that share one, one and the same."""
        name = self._name(f"{module}{_WEIGHT}")
        if name not in self._made:
            rows, scale = self._tensor(name), self._tensor(f"{name.removesuffix(_WEIGHT)}.{SCALE}")
            if rows.dtype != torch.int8 or rows.dim() != 2 or scale.shape != rows.shape[:1]:
                raise CorruptArtifactError(f"{self.path}: {name} is no int8 matrix with a scale per row", _AGAIN)
            self._made[name] = Rounded(rows, scale)
        return self._made[name]

    def _name(self, name: str) -> str:
        return self._tied.get(name, name)

    def _is_matrix(self, name: str) -> bool:
        return name.endswith(_WEIGHT) and f"{name.removesuffix(_WEIGHT)}.{SCALE}" in self._keys

    def _tensor(self, name: str) -> Tensor:
        if name not in self._keys:
            raise ConfigError(f"{self.path} has no tensor {name}", "choose the --task that the model was converted for")
        with safe_open(self.path, framework="pt") as file:
            # A copy: where the tensor lies in the file is aligned to 8 bytes only
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor

    def empty_model(self, config: Any, kind: Any, options: Mapping[str, Any]) -> Any:
        """A model of the class `kind`, in evaluation mode, with everything but its matrices, whose memory was never touched.

        `options` are those of `from_pretrained` that do without weights: `attn_implementation`, `trust_remote_code`.
        Raises ConfigError for other options and for a class whose tensors these are not.
        """
        folder = self.path.parent
        options = {name: value for name, value in options.items() if value is not None}
        unknown = sorted(set(options) - {"attn_implementation", "trust_remote_code"})
        if unknown:
            raise ConfigError(
                f"{unknown[0]} does not go with stored int8 weights", f"load the folder without {unknown[0]}"
            )
        try:
            with no_init_weights():
                if hasattr(kind, "from_config"):
                    model = kind.from_config(config, dtype=torch.float32, **options)
                else:
                    options.pop("trust_remote_code", None)
                    model = kind._from_config(config, dtype=torch.float32, **options)
            if model.can_generate() and (folder / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except LOAD_ERRORS as error:
            raise ConfigError(f"{folder} cannot be loaded: {first_line(error)}", "check its config.json") from error
        self._fill(model)
        return model.eval()

    def _fill(self, model: nn.Module) -> None:
        for path, part in model.named_modules():
            for held in (part._parameters, part._buffers):
                for kind, tensor in held.items():
                    name = self._name(f"{path}.{kind}" if path else kind)
                    if tensor is None or self._is_matrix(name):
                        continue
                    if name not in self._given:
                        found = self._tensor(name)
                        if found.shape != tensor.shape:
                            raise CorruptArtifactError(
                                f"{self.path}: {name} has shape {list(found.shape)}, config.json says {list(tensor.shape)}",
                                _AGAIN,
                            )
                        self._given[name] = nn.Parameter(found, False) if held is part._parameters else found
                    held[kind] = self._given[name]  # type: ignore[assignment]

    def widen(self, model: nn.Module, experts: Sequence[FFNSite]) -> None:
        """Gives an `empty_model` the float32 matrices that the int8 ones stand for; `experts` are its FFNs with experts."""
        by_neuron = {site.down for site in experts}  # rows of others are those of a Linear: per output
        for path, part in list(model.named_modules()):
            name = self._name(f"{path}{_WEIGHT}")
            if not self._is_matrix(name):
                continue
            stored = self.matrix(path)
            wide = stored.rows.float() * stored.scale[:, None]
            like: Any = part
            turned = isinstance(part, Conv1D) != (path in by_neuron)  # the weight of a Conv1D is [in, out]
            like.weight = nn.Parameter(wide.t() if turned else wide, requires_grad=False)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors under the same names, bit for bit."""
    mine, theirs = dict(_held(one)), dict(_held(other))
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
