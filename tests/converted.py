"""A converted folder as `apply` writes it, of a tiny model with random routers: what tests of loading need, without a run."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import save_tiny

from moefication_cli.ffn import Compensation
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import layer_tensors, write_moe_settings
from moefication_cli.models.folder.seal import sealed
from moefication_cli.routing.router import TwoLayerRouter


def orders_of(checkpoint: Checkpoint, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random order of the neurons of every FFN."""
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.randperm(site.num_neurons, generator=generator) for site in checkpoint.sites}


def convert(
    name: str,
    folder: Path,
    top_k: int,
    num_experts: int = 6,
    extra: bool = False,
    dense: tuple[int, ...] = (),
    pruned: tuple[int, ...] = (),
    shared: int = 0,
    **options: Any,
) -> Any:
    """Writes `folder` and returns the dense model it was made from, which is saved beside it as `source`.

    Layers in `dense` stay dense, those in `pruned` have no router and half of their experts always on; `extra` gives the
    others a compensation, `shared` neurons are always on. `options` are those of `save_tiny`.
    """
    model = save_tiny(name, folder.with_name("source"), **options)
    checkpoint = Checkpoint(folder.with_name("source"))
    checkpoint.write_permuted(folder, orders_of(checkpoint))
    layers: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for site in checkpoint.sites:
        entry = {"layer": site.name, "num_experts": num_experts, "num_shared": shared, "rule": {"top_k": top_k}}
        compensation = Compensation(torch.ones(16), torch.ones(2, 16), torch.ones(2, 16)) if extra else None
        if site.index in dense:
            layers.append({"layer": site.name, "dense": True})
        elif site.index in pruned:
            half = {"num_experts": num_experts // 2, "num_shared": site.num_neurons // 2, "rule": {"top_k": 0}}
            layers.append(entry | half | {"router": None})
            tensors |= layer_tensors(site.index, None, Compensation(torch.ones(16)))
        else:
            layers.append(entry | {"router": {"activation": "identity", "normalise": False}})
            tensors |= layer_tensors(site.index, TwoLayerRouter(torch.randn(num_experts, 16)), compensation)
    weights = sealed(Checkpoint(folder))
    write_moe_settings(folder, {"layers": layers, "fraction": 0.5, "weights": weights}, tensors)
    return model
