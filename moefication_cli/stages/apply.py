"""apply: write RUN/model, a normal Hugging Face folder that is also the MoE. Reads `split`, a router and the model."""

from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import ApplyConfig, compared_values, recorded_values
from moefication_cli.errors import MoEficationError
from moefication_cli.models.checkpoint import Checkpoint
from moefication_cli.models.moe_folder import layer_tensors, write_moe_settings
from moefication_cli.stages.contract import Control, Result
from moefication_cli.stages.estimate import estimate, ffn_bytes
from moefication_cli.stages.inputs import RunModel, layer_seed, open_model
from moefication_cli.stages.plan import LayerPlan, choose_router, describe_rule, plan_layers, routed_layers
from moefication_cli.store.manifest import BASE_MODEL
from moefication_cli.store.rundir import RunDir

_CHECK_TOKENS = 16
_TOLERANCE = 1e-3  # of the largest output; float16 weights round, a wrong permutation is off by orders of magnitude


def apply(run: RunDir, config: ApplyConfig, control: Control) -> Result:
    """Write the permuted checkpoint, the routers and the settings; check every FFN against the dense original.

    Plain `from_pretrained` of RUN/model gives the dense model, `moefication_cli.load` the MoE (DESIGN, decision 4).
    Raises ConfigError when the budget cannot be met, MissingArtifactError, StaleArtifactError.
    """
    model = open_model(run, None, control)
    name = choose_router(run, config.router)
    split, router = run.require("split"), run.require(f"router/{name}")
    plans = plan_layers(
        routed_layers(model, split, router),
        config.fraction,
        config.fraction_of,
        top_k=config.top_k,
        keep_dense=config.keep_dense,
    )
    if control.dry_run:
        size = float(sum(path.stat().st_size for path in model.checkpoint.files))
        return estimate(
            "apply",
            run,
            model,
            writes=run.path("model"),
            num_bytes=size,
            flops=0.0,
            memory=2 * ffn_bytes(model),
            reads={"split": split, "router": router},
        )
    inputs = {BASE_MODEL: model.fingerprint, "split": split.digest, f"router/{name}": router.digest}
    options: dict[str, Any] = {
        "config": recorded_values(config) | {"router": name, "seed": control.seed},
        "compared": [*compared_values(config), "seed"],
        "sources": control.sources,
        "inputs": inputs,
        "force": control.force,
        "device": str(model.device),
    }
    rows = [_row(plan) for plan in plans]
    with run.begin("model", **options) as work:
        manifest = work.manifest
        if not work.up_to_date:
            orders = {plan.layer.name: plan.layer.partition.order_F() for plan in plans if plan.rule is not None}
            model.checkpoint.write_permuted(work.folder, orders)
            write_moe_settings(work.folder, settings(plans, name, config, run.info.ffn), router_tensors(plans))
            written = Checkpoint(work.folder, ffn=run.info.ffn)
            for index in control.track(range(len(plans)), "check", len(plans)):
                check_layer(model, written, index, control.seed)
            manifest = work.finish({"layers": rows, "router": name} | describe_rule(plans))
    assert manifest is not None
    path = run.path("model")
    notes = [
        f"{path} loads dense with transformers, and as the MoE with moefication_cli.load({str(path)!r})",
    ]
    payload = {"path": str(path), "digest": manifest.digest, "metrics": manifest.metrics}
    return Result("apply", rows, payload, up_to_date=work.reason is None, notes=notes)


def settings(plans: list[LayerPlan], router: str, config: ApplyConfig, ffn: str | None) -> dict[str, Any]:
    """The content of RUN/model/moefication/moefication.json."""
    layers: list[dict[str, Any]] = []
    for plan in plans:
        partition, rule = plan.layer.partition, plan.rule
        if rule is None:
            layers.append({"layer": plan.layer.name, "dense": True})
            continue
        layers.append(
            {
                "layer": plan.layer.name,
                "dense": False,
                "num_experts": partition.num_experts,
                "num_shared": partition.num_shared,
                "rule": {"top_k": rule.top_k} if rule.threshold is None else {"threshold": rule.threshold},
                "router": {"activation": plan.layer.router.activation, "normalise": plan.layer.router.normalise},
                "score": plan.layer.score,
                "ffn_flops_fraction": plan.flops_fraction,
            }
        )
    recorded = {"router": router, "fraction": config.fraction, "fraction_of": config.fraction_of, "layers": layers}
    return recorded | ({} if ffn is None else {"ffn": ffn})


def router_tensors(plans: list[LayerPlan]) -> dict[str, Tensor]:
    """The tensors of RUN/model/moefication/routers.safetensors."""
    tensors: dict[str, Tensor] = {}
    for plan in plans:
        if plan.rule is not None:
            tensors |= layer_tensors(plan.layer.index, plan.layer.router, plan.compensation)
    return tensors


def check_layer(model: RunModel, written: Checkpoint, index: int, seed: int) -> None:
    """The written FFN computes what the dense one does. Raises MoEficationError: a folder that fails is never committed."""
    dense, permuted = model.read_ffn(index), written.read_ffn(written.sites[index]).to(model.device)
    generator = torch.Generator().manual_seed(layer_seed(seed, index))
    x_TD = torch.randn(_CHECK_TOKENS, dense.d_model, generator=generator).to(model.device)
    expected_TD, found_TD = dense.forward(x_TD), permuted.forward(x_TD)
    error = float((expected_TD - found_TD).abs().max() / expected_TD.abs().max().clamp_min(1e-12))
    if not error < _TOLERANCE:
        raise MoEficationError(f"self-check failed: the written {model.names[index]} differs from dense by {error:.2e}")


def _row(plan: LayerPlan) -> dict[str, Any]:
    partition = plan.layer.partition
    return {
        "layer": plan.layer.index,
        "name": plan.layer.name,
        "num_experts": partition.num_experts,
        "expert_size": partition.expert_size,
        "top_k": None if plan.rule is None else plan.rule.top_k,
        "ffn_flops_fraction": plan.flops_fraction,
    }
