"""apply: write RUN/model, a normal Hugging Face folder that is also the MoE. Reads `split`, a router and the model."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moefication_cli.config import ApplyConfig, compared_values
from moefication_cli.conversion.plan import (
    LayerPlan,
    check_budget,
    choose_router,
    describe_rule,
    routed_layers,
    time_fraction,
)
from moefication_cli.conversion.plan_files import budget_of, read_plans, router_tensors, settings
from moefication_cli.conversion.search import PlanInputs, fraction_for, make_plans
from moefication_cli.errors import ConfigError, MoEficationError
from moefication_cli.export.write import check_hostable, check_source
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.contents import INT8_WEIGHTS
from moefication_cli.models.folder.embedded import embed_code
from moefication_cli.models.folder.moe_folder import FOLDER, ROUTERS, read_moe_folder, write_moe_settings
from moefication_cli.models.folder.seal import sealed, sealed_int8
from moefication_cli.models.loading import load_int8
from moefication_cli.models.stored_int8 import same_state, write_int8
from moefication_cli.routing.rules import TopK
from moefication_cli.runs.card import converted_card
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import apply_cost
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import RunModel, begin_options, layer_seed, open_model, read_tokens
from moefication_cli.runs.room import check_room
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.files import atomic_write
from moefication_cli.store.files import sha256 as file_sha256
from moefication_cli.store.rundir import RunDir
from moefication_cli.training.finetuned_files import conversion_options, said_of, weights_file

_CHECK_TOKENS = 16
_COUNTED_TOKENS = 2048
_TOLERANCE = 1e-3  # of the largest output; float16 weights round, a wrong permutation is off by orders of magnitude


def apply_experts(run: RunDir, config: ApplyConfig = ApplyConfig(), control: Control = Control()) -> Result:
    """Write the permuted checkpoint, the routers and the settings; check every FFN against the dense original.

        apply_experts(RunDir("RUN"), ApplyConfig(fraction=0.2)).path

    Plain `from_pretrained` of RUN/model gives the dense model, `moefication_cli.load` the MoE (DESIGN, decision 4).
    Raises ConfigError when the budget cannot be met, MissingArtifactError, StaleArtifactError.
    """
    model = open_model(run, None, control)
    tuned = None if config.finetuned is None else run.require(f"finetuned/{config.finetuned}")
    if tuned is not None:
        config = _as_finetuned(tuned, config, control)
    name = choose_router(run, config.router)
    split, router = run.require("split"), run.require(f"router/{name}")
    # What a router was trained on decides thresholds and compensation; one that was trained on nothing needs none
    needed = "activations" in router.manifest.inputs or run.manifest("activations") is not None
    activations = run.require("activations") if needed else None
    tokens = None if activations is None else [layer["tokens"] for layer in activations.metrics["layers"]]
    layers = routed_layers(model, split, router, tokens)
    config = replace(config.hosted(), router=name)
    _check_weights(config)
    if config.host is not None:
        counts = [(layer.partition.num_experts, layer.partition.num_shared) for layer in layers]
        check_source(config.host, model.checkpoint.config.to_dict(), [layer.site for layer in layers], counts)
    stages: dict[str, Artifact | None] = {"split": split, f"router/{name}": router, "activations": activations}
    inputs = PlanInputs(run, model, layers, stages, control)
    if tuned is not None:
        stages[tuned.manifest.stage] = tuned
    elif config.target_kl is not None and not control.dry_run:
        config = replace(config, fraction=fraction_for(inputs, config))
    budget = budget_of(config) if control.dry_run else inputs.budget(config)
    if config.objective == "flops" or not control.dry_run:  # times may have to be measured
        check_budget(layers, activations, budget)
    cost = apply_cost(model, config, activations is not None)
    if control.dry_run:
        return estimate("apply", model, run.path("model"), cost, {"split": split, "router": router})
    with run.begin("model", begin_options(config, control, model, stages)) as work:
        check_room(work, model, cost, control, "--refine 0")
        manifest = work.manifest
        if not work.up_to_date:
            if tuned is None:
                plans = make_plans(inputs, config)
            else:
                plans = read_plans(tuned.path, layers, model.device)
                if (changed := weights_file(tuned)) is not None:
                    model = replace(model, checkpoint=model.checkpoint.with_weights(changed))
            if config.host is not None:
                check_hostable(config.host, model.checkpoint.config.to_dict(), plans)
            orders = {plan.layer.name: plan.layer.partition.order_F() for plan in plans if plan.rule is not None}
            model.checkpoint.write_permuted(work.folder, orders)
            if config.embed_code:
                embed_code(work.folder)
            rows = [_row(plan) | _experts_per_token(plan, activations, control.seed) for plan in plans]
            atomic_write(work.folder / "README.md", converted_card(run, config, rows).encode())
            written = Checkpoint(work.folder, ffn=run.info.ffn, trust_remote_code=control.trust_remote_code)
            content = settings(plans, name, config, run.info.ffn)
            if tuned is not None:
                content["finetuned"] = said_of(tuned)
            if config.weights is None:
                content["weights"] = sealed(written, work.hashes.sha256)
            write_moe_settings(work.folder, content, router_tensors(plans))
            for index in control.track(range(len(plans)), "check", len(plans)):
                check_layer(model, written, index, control.seed)
            if config.weights is not None:
                make_int8(work.folder, control.trust_remote_code, work.hashes.sha256)
            found = {"layers": rows, "router": name} | describe_rule(plans, config.budget)
            if budget.times is not None:
                found["ffn_time_fraction"] = time_fraction(plans, budget)
                found["ffn_times"] = [asdict(each.times) for each in budget.times]
            manifest = work.finish(found)
    assert manifest is not None
    path = run.path("model")
    plain = "dense" if tuned is None or weights_file(tuned) is None else "as the fine-tuned dense model"
    notes = [
        f"{path} loads {plain} with transformers, and as the MoE with moefication_cli.load({str(path)!r})"
        if config.weights is None
        else f"{path} holds int8 weights: moefication_cli.load({str(path)!r}) gives the MoE, transformers cannot load it"
    ]
    modelled = manifest.metrics.get("ffn_time_fraction")
    if modelled is not None:
        notes.append(
            f"modelled on this machine: {modelled:.3f} of the dense FFNs' time at {config.objective_tokens} tokens a call"
        )
    payload = {"path": str(path), "digest": manifest.digest, "metrics": manifest.metrics}
    return Result("apply", manifest.metrics["layers"], payload, up_to_date=work.reason is None, notes=notes)


def _as_finetuned(tuned: Artifact, config: ApplyConfig, control: Control) -> ApplyConfig:
    """The options of the conversion that was fine-tuned. Raises ConfigError where others were asked for, or it was not kept."""
    name = config.finetuned
    if not tuned.metrics["kept"]:
        raise ConfigError(
            f"fine-tuning {name!r} did not help and was not kept: there is nothing to write",
            "fine-tune again with other options, or apply without --finetuned",
        )
    made = replace(conversion_options(tuned), finetuned=name, embed_code=config.embed_code, weights=config.weights)
    said = control.sources.get(ApplyConfig, {})
    for option, value in compared_values(made).items():
        if said.get(option, "default") != "default" and getattr(config, option) != value:
            raise ConfigError(
                f"{option} is {getattr(config, option)!r}, but {name!r} was fine-tuned with {value!r}",
                "leave it out, or convert and fine-tune with it",
            )
    return made


def _check_weights(config: ApplyConfig) -> None:
    """Raises ConfigError where int8 weights are asked for with what needs float ones."""
    for option, given in (("--embed-code", config.embed_code), ("--for", config.host is not None)):
        if config.weights is not None and given:
            raise ConfigError(f"{option} needs float weights, --weights int8 writes none", "leave out one of the two")


def make_int8(folder: Path, trust_remote_code: bool = False, sha256: Callable[[Path], str] = file_sha256) -> None:
    """Puts int8 weights in place of the float ones of a converted folder, and their seal into its settings.

    Raises MoEficationError where what was written is not what the float weights give when they are loaded as int8.
    """
    moe, options = read_moe_folder(folder), {"trust_remote_code": trust_remote_code}
    made, sites = load_int8(folder, moe, **options)
    write_int8(folder, made.model, sites)
    for path in (*made.source.files, folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    if not same_state(made.model, load_int8(folder, moe, **options)[0].model):
        raise MoEficationError(f"self-check failed: {folder / INT8_WEIGHTS} does not give the same int8 weights")
    content = moe.settings | {"weights": sealed_int8(folder, sites, sha256)}
    write_moe_settings(folder, content, load_file(folder / FOLDER / ROUTERS))


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
    rule = plan.rule
    return {
        "layer": plan.layer.index,
        "name": plan.layer.name,
        "num_experts": plan.num_experts,
        "expert_size": plan.layer.partition.expert_size,
        "always_on": plan.num_shared,
        "rule": "dense" if rule is None else "always on" if plan.router is None else rule.name,
        "top_k": rule.top_k if isinstance(rule, TopK) and plan.router is not None else None,
        "router_width": None if plan.router is None else plan.router.width,
        "correction_rank": _rank(plan),
        "ffn_flops_fraction": plan.flops_fraction,
    }


def _experts_per_token(plan: LayerPlan, activations: Artifact | None, seed: int) -> dict[str, float]:
    """Mean and 10 % and 90 % quantiles of the experts that calibration tokens select, where their number varies."""
    if activations is None or plan.router is None or plan.rule is None or isinstance(plan.rule, TopK):
        return {}
    device = next(iter(plan.router.tensors().values())).device
    x_TD = read_tokens(activations, plan.layer.index, _COUNTED_TOKENS, seed).x_TD.to(device)
    count_T = plan.rule.select(plan.router.scores(x_TD)).sum(1).float()
    low, high = count_T.quantile(torch.tensor([0.1, 0.9]).to(count_T)).tolist()
    return {"experts_mean": float(count_T.mean()), "experts_p10": low, "experts_p90": high}


def _rank(plan: LayerPlan) -> int | None:
    extra = plan.compensation
    return None if extra is None else 0 if extra.w_in_RD is None else len(extra.w_in_RD)
