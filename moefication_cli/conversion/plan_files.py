"""A plan on disk: what `moefication.json` and `routers.safetensors` say of planned layers, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import ApplyConfig
from moefication_cli.conversion.plan import Budget, LayerPlan, RoutedLayer
from moefication_cli.ffn import Compensation
from moefication_cli.models.folder.moe_folder import MoELayer, layer_tensors, read_moe_folder
from moefication_cli.routing.routers import router_settings
from moefication_cli.routing.rules import rule_setting


def budget_of(config: ApplyConfig) -> Budget:
    """The budget these options ask for."""
    return Budget(
        config.fraction,
        config.fraction_of,
        config.top_k,
        config.rule,
        config.budget,
        config.compensation,
        config.keep_dense,
        config.objective,
    )


def settings(plans: Sequence[LayerPlan], name: str, config: ApplyConfig, ffn: str | None) -> dict[str, Any]:
    """The content of moefication.json."""
    layers: list[dict[str, Any]] = []
    for plan in plans:
        rule, router = plan.rule, plan.router
        if rule is None:
            layers.append({"layer": plan.layer.name, "dense": True})
            continue
        entry: dict[str, Any] = {
            "layer": plan.layer.name,
            "dense": False,
            "num_experts": plan.num_experts,
            "num_shared": plan.num_shared,
            "rule": rule_setting(rule),
            "score": plan.layer.score,
            "ffn_flops_fraction": plan.flops_fraction,
        }
        if router is not None:
            entry["router"] = router_settings(router)
        layers.append(entry)
    recorded: dict[str, Any] = {
        "router": name,
        "fraction": config.fraction,
        "fraction_of": config.fraction_of,
        "layers": layers,
    }
    if config.objective != "flops":
        recorded["objective"] = config.objective
    return recorded | ({} if ffn is None else {"ffn": ffn})


def router_tensors(plans: Sequence[LayerPlan]) -> dict[str, Tensor]:
    """The tensors of routers.safetensors."""
    tensors: dict[str, Tensor] = {}
    for plan in plans:
        if plan.rule is not None:
            tensors |= layer_tensors(plan.layer.index, plan.router, plan.compensation)
    return tensors


def read_plans(folder: Path, layers: Sequence[RoutedLayer], device: torch.device) -> list[LayerPlan]:
    """The plans that were written below `folder`. Raises CorruptArtifactError, MissingArtifactError."""
    moe = read_moe_folder(folder)
    entries = moe.settings["layers"]
    return [_plan(*found, device) for found in zip(layers, moe.layers, entries, strict=True)]


def _plan(layer: RoutedLayer, moe: MoELayer, entry: dict[str, Any], device: torch.device) -> LayerPlan:
    if moe.dense:
        return LayerPlan(layer, None, 1.0)
    always = (moe.num_shared - layer.partition.num_shared) // layer.partition.expert_size
    router = None if moe.router is None else moe.router.to(device)
    extra = moe.compensation
    if extra is not None:
        extra = Compensation(**{name: None if t is None else t.to(device) for name, t in vars(extra).items()})
    return LayerPlan(layer, moe.rule, float(entry["ffn_flops_fraction"]), router, always, extra)
