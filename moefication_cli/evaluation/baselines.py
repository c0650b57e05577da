"""The rows of `eval` that are not ours: static pruning, and the published recipe built on the same activations.

The published recipe is a stage of its own, RUN/baseline/paper, cached like any other: balanced k-means on normalised
weight rows with experts of 32 neurons, and the two-layer router trained on sums of activations (MoEfication, section 3;
its defects mended as routing/routers/mlp.py says).
"""

from dataclasses import replace
from typing import Any

import torch

from moefication_cli.config import EvalConfig, RouterConfig, SplitConfig
from moefication_cli.conversion.plan import Budget, LayerPlan, describe_rule, plan_layers, routed_layers
from moefication_cli.evaluation.selections import PinnedFFN, SelectionRow, prune
from moefication_cli.routing.train import train_layer
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import (
    RunModel,
    expert_weights,
    layer_options,
    layer_seed,
    read_tokens,
    training_tokens,
)
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.split.methods import split_layer
from moefication_cli.split.partition import nearest_divisor
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

PAPER_EXPERT_SIZE = 32
_SAMPLE_TOKENS = 2048
_STATISTICS = ("variance_F", "contribution_F", "mean_F")


def static_row(
    model: RunModel, activations: Artifact, fraction: float, backend: str, dtype: torch.dtype, control: Control
) -> SelectionRow:
    """Static pruning at this share of the neurons; per layer the best of four ways, see `selections.prune`."""
    layers: list[Any] = []
    for index in range(len(model.sites)):
        with activations.open_layer(index) as stored:
            statistics = {name: stored.tensor(name) for name in _STATISTICS}
        sample = read_tokens(activations, index, _SAMPLE_TOKENS, layer_seed(control.seed, index)).x_TD
        layers.append(prune(model.read_ffn(index), statistics, fraction, sample.to(model.device), backend, dtype)[0])
    return SelectionRow("static", "baseline", fraction, layers, meta={"rule": "static", "score": "best of four"})


def paper_row(
    run: RunDir, model: RunModel, fraction: float, config: EvalConfig, dtype: torch.dtype, control: Control
) -> SelectionRow:
    """The published recipe at this fraction, everything counted as `config.fraction_of` says."""
    stage = build_paper(run, model, control)
    layers: list[Any] = []
    plans: list[LayerPlan] = []
    for layer in routed_layers(model, stage, stage):
        cost = layer.cost()
        # A narrow budget may not pay for this router at all: it then runs one expert and its real cost is reported.
        least = cost.flops(1) / cost.dense_flops
        budget = Budget(max(fraction, least) if config.fraction_of == "flops" else fraction, config.fraction_of)
        plan = plan_layers(model, None, [layer], budget, control.seed)[0]
        weights = expert_weights(model.read_ffn(layer.index).to(dtype), layer.partition)
        moe = MoEFFN(weights, layer.routers[0], plan.rule, backend=config.backend, may_go_dense=False)
        layers.append(PinnedFFN(moe))
        plans.append(plan)
    meta = {"score": "activation"} | describe_rule(plans)
    return SelectionRow("paper", "baseline", fraction, layers, meta=meta, plans=plans)


def build_paper(run: RunDir, model: RunModel, control: Control) -> Artifact:
    """RUN/baseline/paper: split and router of the published recipe for every layer."""
    activations = run.require("activations")
    router_config = RouterConfig(router="mlp")
    options = layer_options(router_config, control, model, {"activations": activations})
    options = replace(options, only=None)
    with run.begin("baseline/paper", options) as work:
        for index in control.track(work.pending(), "published recipe", len(model.sites)):
            seed = layer_seed(control.seed, index)
            site = model.sites[index]
            size = nearest_divisor(site.num_neurons, PAPER_EXPERT_SIZE)
            config = SplitConfig(method="kmeans", expert_size=size)
            dense = model.read_ffn(index)
            partition, metrics = split_layer(dense, config, seed)
            weights = expert_weights(dense, partition)
            train, heldout = training_tokens(router_config, weights, activations, index, seed)
            record = train_layer(router_config, weights, train, heldout, [0.2], seed)
            tensors = {"expert_F": partition.expert_F.to(torch.int32)} | record.tensors
            work.save(index, tensors, record.settings, metrics=metrics | record.metrics)
        work.finish()
    return run.read_stage("baseline/paper")
