"""A model with ReLU in place of its FFNs' activation: by its configuration, so that plain `from_pretrained` gives it.

What ReLU does to a trained model, and that a little training mends it: Mirzadeh et al., "ReLU Strikes Back" (arXiv
2310.04564); the models of *MoEfication* were made so. Where the configuration names one activation for all, other parts of
the model that use it change as well (the transform before a masked language model's predictions).
"""

import copy
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefication_cli.errors import ConfigError, UnsupportedModelError
from moefication_cli.models.folder.source import meta_model
from moefication_cli.models.loading import progress_bars
from moefication_cli.models.sites import FFNSite, find_sites

SPARSE = ("relu", "relu2")  # activations that are exactly zero for half of their inputs
_NAMES = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")


def relu_config(config: Any, ffn: str | None = None, trust_remote_code: bool = False) -> Any:
    """A copy of a configuration whose FFNs compute ReLU; of a model whose activation already makes zeros, an equal one.

    Gated FFNs keep their gate, whose activation becomes ReLU. Raises UnsupportedModelError where the configuration has no
    name for the activation (BLOOM, MPT: it is written in the model's code), or another one is used in spite of it.
    """
    changed = copy.deepcopy(config)
    before = _activations(config, ffn, trust_remote_code)
    if before <= set(SPARSE):
        return changed
    for part in _parts(changed):
        _put_relu(part)
    try:
        after = _activations(changed, ffn, trust_remote_code)
    except ConfigError as error:  # a model that cannot be built with it
        raise UnsupportedModelError(f"{config.model_type} does not take ReLU: {error.message}", _OTHERS) from None
    if after != {"relu"}:
        named = [name for part in _parts(config) for name in _NAMES if hasattr(part, name)]
        why = (
            f"changing {', '.join(named)} does not reach its FFNs" if named else "its configuration has no name for it"
        )
        raise UnsupportedModelError(
            f"the activation of {config.model_type} models cannot be changed: it is {', '.join(sorted(before))} and {why}",
            _OTHERS,
        )
    return changed


_OTHERS = "use a model whose config.json names its activation (hidden_act, activation_function, ...)"


def _put_relu(part: Any) -> None:
    for name in _NAMES:
        if getattr(part, name, None) is not None:
            setattr(part, name, "relu")
    # T5 reads both from one text
    projection = getattr(part, "feed_forward_proj", None)
    if projection is not None:
        part.feed_forward_proj = "gated-relu" if str(projection).startswith("gated-") else "relu"


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and those of its parts (text and vision models in one)."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            yield part


def _activations(config: Any, ffn: str | None, trust_remote_code: bool) -> set[str]:
    return {site.activation for site in find_sites(meta_model(config, trust_remote_code), ffn)}


def activation_modules(model: nn.Module, sites: Sequence[FFNSite]) -> list[nn.Module]:
    """The module that computes each FFN's activation; of a gated one, the gate's. Raises UnsupportedModelError."""
    found = []
    for site in sites:
        module = attrgetter(site.act)(model) if site.act else None
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(f"{site.name}: its activation is a function and cannot be listened to")
        found.append(module)
    return found


def save_model(model: Any, folder: Path) -> None:
    """Write config.json and weights, readable as the umask says (safetensors writes for the owner alone)."""
    with progress_bars(False):
        model.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


@torch.no_grad()
def zero_intermediate_biases(model: nn.Module, sites: Sequence[FFNSite]) -> list[str]:
    """Set the biases before the activation to zero (of a gated FFN, both) and freeze them; returns their names."""
    names = {p.parameter for site in sites for p in site.slices() if p.kind == "bias" and p.part != "down"}
    for name in sorted(names):
        model.get_parameter(name).zero_().requires_grad_(False)
    return sorted(names)
