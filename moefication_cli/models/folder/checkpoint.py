"""A checkpoint read one FFN at a time: sites from the configuration alone, tensors straight from the weight files.

`read_ffn` turns one FFN's tensors into neuron-major `FFNWeights`. Names in files need not be names in the model (a
head's prefix, renames between versions of transformers): the mapping follows what `from_pretrained` does.
Axes as in `ffn`. Does not load or run models (`loading`).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.folder.contents import fingerprint, refuse_int8_files
from moefication_cli.models.folder.permuted import TensorPlan, copy_side_files, write_shards
from moefication_cli.models.folder.source import TensorFile, load_config, meta_model, resolve_source
from moefication_cli.models.heads import task_of
from moefication_cli.models.sites import FFNSite, ParamSlice, find_sites, refuse_quantised
from moefication_cli.split.partition import divisors
from moefication_cli.store.files import sha256 as file_sha256


class Checkpoint:
    """A model's files. Cheap to make: reads the configuration and the headers of the weight files, no weights.

    Raises ConfigError (model not found, shard missing, unreadable) or UnsupportedModelError (see `find_sites`).
    """

    def __init__(
        self,
        model_ref: str | Path,
        revision: str | None = None,
        ffn: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = resolve_source(model_ref, revision, trust_remote_code)
        self.trust_remote_code = trust_remote_code
        self.config: Any = load_config(self.source, trust_remote_code)
        refuse_quantised(self.config, self.source.ref)
        refuse_int8_files(self.source.ref, self.source.files)
        self._architecture: nn.Module = meta_model(self.config, trust_remote_code)
        self.sites: list[FFNSite] = find_sites(self._architecture, ffn)
        self._ffn = ffn
        self._fingerprint: str | None = None
        self._changed: TensorFile | None = None

    def with_weights(self, path: Path) -> "Checkpoint":
        """The same model with some tensors replaced by those in a safetensors file, under the model's parameter names.

        Their shapes and dtypes are those of the checkpoint. Raises ConfigError where the file cannot be read or a tensor is
        none of the model's.
        """
        changed = copy.copy(self)
        changed._changed = TensorFile(path)
        for name in changed._changed.keys:
            self.locate(name)
        return changed

    def stores(self, parameter: str) -> bool:
        """Whether the files hold a parameter of the model under a name of its own (tied weights are often stored once)."""
        return parameter in self._locations

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype a parameter has in the files. Raises ConfigError where they have no such tensor."""
        return self._tensor(parameter).dtype

    @property
    def folder(self) -> Path:
        """The local folder."""
        return self.source.folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self.source.files

    @property
    def resolved_revision(self) -> str | None:
        """The commit of a hub model, None for a local folder."""
        return self.source.revision

    def site(self, name: str) -> FFNSite:
        """The site of that name. Raises ConfigError, with the names there are, for another one."""
        for site in self.sites:
            if site.name == name:
                return site
        known = f"{self.sites[0].name} .. {self.sites[-1].name}"
        raise ConfigError(f"{self.source.ref} has no FFN {name!r} (it has {known})")

    def read_ffn(self, site: FFNSite, dtype: torch.dtype | None = torch.float32) -> FFNWeights:
        """The weights of one FFN, neuron-major, contiguous; reads only its tensors. `dtype=None` keeps the stored one.

        Raises ConfigError if a tensor is missing or has another shape than the configuration says.
        """

        def read(piece: ParamSlice) -> Tensor:
            name, tensor = piece.parameter, self._tensor(piece.parameter)
            expected = tuple(self._architecture.get_parameter(name).shape)
            if tuple(tensor.shape) != expected:
                shapes = f"shape {tuple(tensor.shape)}, the configuration says {expected}"
                raise ConfigError(f"{self.source.ref}: {name} has {shapes}", "download or save the model again")
            return piece.of(tensor).to(dtype or tensor.dtype)  # may be the mapped tensor itself

        weights = site.weights_of(read)
        # contiguous() copies transposed ones only
        rows: dict[str, Any] = {n: t.contiguous() for n, t in vars(weights).items() if isinstance(t, Tensor)}
        return replace(weights, **rows)

    def fingerprint(self, sha256: Callable[[Path], str] = file_sha256) -> str:
        """See `contents.fingerprint`; `sha256` may be `HashCache(run).sha256`."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.folder, self.files, self._ffn, sha256)
        return self._fingerprint

    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied with: all matrices but embedding tables (a tied output head counts)."""
        return sum(
            parameter.numel()
            for module in self._architecture.modules()
            if not isinstance(module, torch.nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() > 1
        )

    def describe(self) -> dict[str, Any]:
        """What `moefication inspect` shows: the model, one row per FFN, divisors of F, the FFNs' parameter share."""
        # parameters() yields tied weights once
        total = sum(parameter.numel() for parameter in self._architecture.parameters())
        in_ffns = sum(site.num_parameters for site in self.sites)
        rows = [
            {
                "layer": site.name,
                "d_model": site.d_model,
                "num_neurons": site.num_neurons,
                "activation": site.activation,
                "gated": site.gated,
                "bias": site.bias_up or site.bias_down,
                "parameters": site.num_parameters,
                "stack": site.stack,
                "family": site.family,
                "up": site.up,
                "gate": site.gate,
                "down": site.down,
            }
            for site in self.sites
        ]
        return {
            "model": self.source.ref,
            "revision": self.resolved_revision,
            "architecture": type(self._architecture).__name__,
            "model_type": self.config.model_type,
            "task": task_of(self.config),
            "dtype": str(self._tensor_dtype()).removeprefix("torch."),
            "files": [path.name for path in self.files],
            "bytes": sum(path.stat().st_size for path in self.files),
            "parameters": total,
            "ffn_parameters": in_ffns,
            "ffn_share": in_ffns / total,
            "divisors": {str(F): divisors(F) for F in sorted({site.num_neurons for site in self.sites})},
            "ffns": rows,
        }

    def write_permuted(self, out_dir: Path, orders: Mapping[str, Tensor]) -> list[Path]:
        """Copies the checkpoint to `out_dir` with neurons in another order: a dense model computing the same function.

        `orders` maps site names to order_F (new position -> old neuron); sites that are not named stay as they are.
        Tensors of `with_weights` are written in place of the checkpoint's.
        Same file names, tensor names, shapes and dtypes (`.bin` files become safetensors), one tensor in memory at a
        time; also copies configuration, tokenizer and licence files, and `*.py` only under `trust_remote_code`.
        Returns the files written, synced to disk. The caller makes the folder atomic. Raises ConfigError for a site that is
        not there, an order that is not a permutation, and weight files that lack a tensor or end early.
        """
        plan: dict[tuple[Path, str], TensorPlan] = {}
        for name, order_F in orders.items():
            site = self.site(name)
            if not torch.equal(order_F.long().sort().values.cpu(), torch.arange(site.num_neurons)):
                raise ConfigError(f"{name}: the order is not a permutation of its {site.num_neurons} neurons")
            for parameter, (axis, order) in site.parameter_orders(order_F.long().cpu()).items():
                file, key = self.locate(parameter)
                plan[file.path, key] = TensorPlan(axis, order)
        for parameter in () if self._changed is None else self._changed.keys:
            file, key = self.locate(parameter)
            found = plan.get((file.path, key), TensorPlan())
            plan[file.path, key] = replace(found, source=partial(self._tensor, parameter))
        out_dir.mkdir(parents=True, exist_ok=True)
        written = copy_side_files(self.folder, out_dir, code=self.trust_remote_code)
        return written + write_shards(list(self._tensor_files.values()), out_dir, plan)

    @cached_property
    def _tensor_files(self) -> dict[Path, TensorFile]:
        return {path: TensorFile(path) for path in self.files}

    @cached_property
    def _locations(self) -> dict[str, tuple[TensorFile, str]]:
        """Parameter name in the model -> the file and the name it has there."""
        rename = renamer(self._architecture)
        return {rename(key): (file, key) for file in self._tensor_files.values() for key in file.keys}

    def tensors(self) -> dict[str, TensorFile]:
        """The weight file of every stored tensor, by the tensor's name in it."""
        return {key: file for file in self._tensor_files.values() for key in file.keys}

    def locate(self, parameter: str) -> tuple[TensorFile, str]:
        """(weight file, name in it) of a parameter of the model. Raises ConfigError where the files have no such tensor."""
        found = self._locations.get(parameter)
        if found is None:
            raise ConfigError(
                f"{self.source.ref}: no tensor for {parameter} in {', '.join(path.name for path in self.files)}",
                "the checkpoint and its config.json do not belong together; download or save the model again",
            )
        return found

    def _tensor(self, parameter: str) -> Tensor:
        if self._changed is not None and parameter in self._changed.keys:
            return self._changed.get(parameter)
        file, key = self.locate(parameter)
        return file.get(key)

    def _tensor_dtype(self) -> torch.dtype:
        return self._tensor(f"{self.sites[0].up}.weight").dtype


def renamer(model: nn.Module) -> Callable[[str], str]:
    """Checkpoint name -> parameter name of `model`, as `from_pretrained` maps them: renames, then the head's prefix.

    A tensor that transformers would merge or split on loading gets a name no projection has, so it reads as missing.
    """
    names = set(model.state_dict())
    prefix = getattr(model, "base_model_prefix", "")
    convert = _version_renames(model)

    def fit(key: str) -> str:
        if key in names or not prefix:
            return key
        bare = key.removeprefix(f"{prefix}.")
        return bare if bare in names else f"{prefix}.{key}" if f"{prefix}.{key}" in names else key

    def rename(key: str) -> str:
        fitted = fit(convert(key))
        return fitted if fitted in names else fit(key)

    return rename


def _version_renames(model: nn.Module) -> Callable[[str], str]:
    try:  # private, and in flux since transformers 5.0; without it only checkpoints with today's names can be read
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
    except (ImportError, TypeError, AttributeError):
        return lambda key: key
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def convert(key: str) -> str:
        renamed, merged = rename_source_key(key, renamings, converters)
        return f"{renamed} (from {key})" if merged is not None else str(renamed)

    return convert
