"""What a converted layer consists of at one compute budget: the common ground of `apply` and `eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import Compensation
from moefication_cli.models.sites import FFNSite
from moefication_cli.routing.budget import allocate, best_within
from moefication_cli.routing.calibrate import Curve, fit_compensation, kept_experts
from moefication_cli.routing.cost import LayerCost, top_k_within
from moefication_cli.routing.router import Router, Rule
from moefication_cli.runs.control import parse_layers
from moefication_cli.runs.inputs import RunModel, expert_weights, layer_seed, read_partition, read_tokens
from moefication_cli.split.partition import Partition
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

SAFETY = 0.97  # of the budget: thresholds are calibrated on other tokens than those they meet
RELATIVE = ("max_ratio", "cumulative")
FIT_TOKENS = 16384
_HALVINGS = 20

FractionOf = Literal["flops", "neurons"]


@dataclass(frozen=True)
class RoutedLayer:
    """One layer with its trained routers and calibration curve, before a budget is chosen. Weights stay on disk."""

    site: FFNSite
    partition: Partition
    routers: list[Router]
    score: str
    curve: Curve | None
    num_tokens: int

    @property
    def index(self) -> int:
        return self.site.index

    @property
    def name(self) -> str:
        return self.site.name

    def cost(self) -> LayerCost:
        """What this layer costs per token with its widest router and no compensation."""
        return LayerCost(
            d_model=self.site.d_model,
            num_neurons=self.site.num_neurons,
            num_shared=self.partition.num_shared,
            num_experts=self.partition.num_experts,
            flops_per_neuron=self.site.flops_per_neuron,
            overhead=self.routers[-1].flops,
        )


@dataclass(frozen=True)
class LayerPlan:
    """One layer at a budget. Dense if `rule` is None; without `router` the first `always` experts run for every token."""

    layer: RoutedLayer
    rule: Rule | None
    flops_fraction: float
    router: Router | None = None
    always: int = 0
    compensation: Compensation | None = None

    @property
    def num_shared(self) -> int:
        """Always-on neurons: the split's shared ones, and the experts that always run."""
        return self.layer.partition.num_shared + self.always * self.layer.partition.expert_size

    @property
    def num_experts(self) -> int:
        """Experts that are not always on."""
        return self.layer.partition.num_experts - self.always


@dataclass(frozen=True)
class Budget:
    """What `apply` and `eval` are asked for; None leaves the choice to the router's kind."""

    fraction: float
    fraction_of: FractionOf = "flops"
    top_k: int | None = None
    rule: Literal["threshold", "top_k", "max_ratio", "cumulative"] | None = None
    sharing: Literal["auto", "uniform"] | None = None
    compensation: Literal["auto", "mean", "none"] = "auto"
    keep_dense: str | None = None
    # What a look at the whole model may rule out, because curves of single layers cannot know it:
    only_router: int | None = None  # index into the layer's routers
    least_rank_cost: float = 0.0  # of the correction, relative to the dense FFN's multiply-adds


def choose_router(run: RunDir, name: str | None) -> str:
    """The trained router to use. Raises ConfigError unless the choice is clear."""
    trained = run.names("router")
    if name is not None:
        return name
    if not trained:
        run.require("router/regression")  # raises, naming the command to run
    if len(trained) > 1:
        raise ConfigError(f"several routers are trained: {', '.join(trained)}", "choose one with --router")
    return trained[0]


def routed_layers(
    model: RunModel, split: Artifact, router: Artifact, tokens: Sequence[int] | None = None
) -> list[RoutedLayer]:
    """Every layer with its split, routers and curve; `tokens` are the calibration tokens each layer saw."""
    layers = []
    for index, site in enumerate(model.sites):
        routers, score, curve = read_routers(router, index)
        moved = [found.to(model.device) for found in routers]
        count = 1 if tokens is None else tokens[index]
        layers.append(RoutedLayer(site, read_partition(split, index), moved, score, curve, count))
    return layers


def read_routers(router: Artifact, index: int) -> tuple[list[Router], str, Curve | None]:
    """(routers, the one to use without a curve last, the score they predict, calibration curve) of one layer."""
    tensors, settings = router.read_layer(index)
    routers = []
    for number, form in enumerate(settings["routers"]):
        parts = {name: tensors.get(f"{number}.{name}") for name in ("w_in_RD", "b_in_R", "w_out_ER", "b_out_E")}
        routers.append(Router(**parts, **form))  # type: ignore[arg-type]
    curve = {name.removeprefix("curve."): value for name, value in tensors.items() if name.startswith("curve.")}
    return routers, settings["score"], Curve(**curve) if curve else None


def check_budget(layers: Sequence[RoutedLayer], activations: Artifact | None, budget: Budget) -> None:
    """Raise ConfigError unless `plan_layers` can meet this budget; nothing is fitted or read for it."""
    _choose(layers, activations, budget)


def plan_layers(
    model: RunModel, activations: Artifact | None, layers: Sequence[RoutedLayer], budget: Budget, seed: int
) -> list[LayerPlan]:
    """Every layer at one budget. Raises ConfigError when the budget cannot be met or k exceeds E.

    Layers with calibration curves share the budget by what it saves (threshold rule, compensation); the others, and all
    under `rule="top_k"`, get the same fixed fraction.
    """
    dense = set(parse_layers(budget.keep_dense, len(layers)) or [])
    if budget.rule in RELATIVE:
        _choose(layers, activations, budget)
        assert activations is not None
        return [
            _relative(model, activations, layer, budget, seed)
            if layer.index not in dense
            else LayerPlan(layer, None, 1.0)
            for layer in layers
        ]
    plans: list[LayerPlan] = []
    for layer, choice in zip(layers, _choose(layers, activations, budget), strict=True):
        if isinstance(choice, LayerPlan):
            plans.append(choice)
        else:
            assert activations is not None
            plans.append(_calibrated(model, activations, layer, choice, budget, seed))
    return plans


def _choose(layers: Sequence[RoutedLayer], activations: Artifact | None, budget: Budget) -> Sequence[LayerPlan | int]:
    """Finished plans of a fixed fraction, or one row of each layer's curve."""
    dense = set(parse_layers(budget.keep_dense, len(layers)) or [])
    calibrated = all(layer.curve is not None for layer in layers) and activations is not None
    if budget.rule in ("threshold", *RELATIVE) and not calibrated:
        raise ConfigError(
            f"--rule {budget.rule} needs a calibrated router", "train one with --router regression or linear"
        )
    if budget.top_k is not None or budget.rule in ("top_k", *RELATIVE) or not calibrated:
        return [_fixed(layer, budget, layer.index in dense) for layer in layers]
    return _share_budget(layers, budget, dense)


def _fixed(layer: RoutedLayer, budget: Budget, dense: bool) -> LayerPlan:
    """The same number of experts for every token."""
    if dense:
        return LayerPlan(layer, None, 1.0)
    cost = layer.cost()
    where = f"layer {layer.index} ({layer.name})"
    top_k = budget.top_k
    if top_k is None:
        top_k = top_k_within(cost, budget.fraction, budget.fraction_of, where)
    elif top_k > cost.num_experts:
        raise ConfigError(f"{where}: --top-k {top_k} exceeds its {cost.num_experts} experts")
    return LayerPlan(layer, Rule(top_k=top_k), cost.flops(top_k) / cost.dense_flops, layer.routers[-1])


def _share_budget(layers: Sequence[RoutedLayer], budget: Budget, dense: set[int]) -> list[int]:
    """One row of each layer's curve."""
    costs, errors, work = [], [], []
    for layer in layers:
        curve = layer.curve
        assert curve is not None
        cost_C = (curve.flops_C if budget.fraction_of == "flops" else curve.active_C).clone()
        error_C = curve.error_C.clone() * layer.num_tokens
        is_dense_C = curve.flops_C >= 1.0
        is_dense_C[:-1] = False
        if budget.compensation != "auto":
            error_C[(curve.rank_C > 0) & ~is_dense_C] = float("inf")
        if budget.only_router is not None:
            error_C[(curve.router_C != budget.only_router) & ~is_dense_C] = float("inf")
        rank_cost_C = 2 * curve.rank_C * layer.site.d_model / layer.cost().dense_flops
        error_C[(rank_cost_C < budget.least_rank_cost) & ~is_dense_C] = float("inf")
        if layer.index in dense:
            error_C[~is_dense_C] = float("inf")
        finite = torch.isfinite(error_C)
        cost_C[~finite] = float("inf")
        costs.append(cost_C)
        errors.append(error_C)
        work.append(float(layer.num_tokens * layer.site.num_parameters))
    target = budget.fraction * SAFETY if budget.fraction < 1 else 1.0
    if budget.sharing == "uniform":
        return [best_within(cost_C, error_C, target) for cost_C, error_C in zip(costs, errors, strict=True)]
    return allocate(costs, errors, [part / sum(work) for part in work], target)


def _relative(model: RunModel, activations: Artifact, layer: RoutedLayer, budget: Budget, seed: int) -> LayerPlan:
    """A rule that compares a token's scores with each other, set to the budget's mean number of experts."""
    router, cost = layer.routers[-1], layer.cost()
    target = cost.experts_within(budget.fraction * SAFETY, budget.fraction_of)
    tokens = read_tokens(activations, layer.index, FIT_TOKENS, layer_seed(seed, layer.index)).to(model.device)
    scores_TE = router.scores(tokens.x_TD)

    def at(value: float) -> Rule:
        return Rule(max_ratio=1 - value) if budget.rule == "max_ratio" else Rule(cumulative=value)

    low, high = 0.0, 1.0  # few experts, many
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        many = float(at(middle).select(scores_TE).float().sum(1).mean()) > target
        low, high = (low, middle) if many else (middle, high)
    rule = at(low)
    keep_TE = rule.select(scores_TE)
    weights = expert_weights(model.read_ffn(layer.index), layer.partition)
    extra = None
    if budget.compensation != "none":
        extra = fit_compensation(weights, keep_TE, 0, tokens.calibration())
    share = cost.flops(float(keep_TE.float().sum(1).mean())) / cost.dense_flops
    return LayerPlan(layer, rule, share, router, 0, extra)


def _calibrated(
    model: RunModel, activations: Artifact, layer: RoutedLayer, row: int, budget: Budget, seed: int
) -> LayerPlan:
    """The layer as one row of its curve says, its compensation fitted on calibration tokens."""
    curve = layer.curve
    assert curve is not None
    number, threshold = int(curve.router_C[row]), float(curve.threshold_C[row])
    flops = float(curve.flops_C[row])
    if number < 0 and round(threshold) >= layer.partition.num_experts:
        return LayerPlan(layer, None, 1.0)
    router = None if number < 0 else layer.routers[number]
    weights = expert_weights(model.read_ffn(layer.index), layer.partition)
    tokens = read_tokens(activations, layer.index, FIT_TOKENS, layer_seed(seed, layer.index)).to(model.device)
    compensation = None
    if budget.compensation != "none":
        keep_TE = kept_experts(weights, router, threshold, tokens.x_TD)
        compensation = fit_compensation(weights, keep_TE, int(curve.rank_C[row]), tokens.calibration())
    if router is None:
        return LayerPlan(layer, Rule(top_k=0), flops, None, round(threshold), compensation)
    return LayerPlan(layer, Rule(threshold=threshold), flops, router, 0, compensation)


def describe_rule(plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """What `metrics.json` says of a plan: its rule, top_k (the mean where layers differ) and how the budget is shared."""
    rules = [plan.rule for plan in plans if plan.rule is not None]
    relative = [name for rule in rules if rule.relative for name in rule.setting()]
    if relative:
        return {"rule": relative[0], "top_k": None, "budget": "uniform"}
    if any(rule.threshold is not None for rule in rules) or any(rule.top_k == 0 for rule in rules):
        return {"rule": "threshold", "top_k": None, "budget": "auto"}
    ks = [rule.top_k or 0 for rule in rules]
    top_k = None if not ks else (ks[0] if len(set(ks)) == 1 else sum(ks) / len(ks))
    return {"rule": "top_k", "top_k": top_k, "budget": "uniform"}
