"""What a converted layer consists of at one compute budget: the common ground of `apply` and `eval`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moefication_cli.config import RouterConfig
from moefication_cli.config.option import option_types
from moefication_cli.conversion.times import LayerTimes
from moefication_cli.errors import ConfigError, did_you_mean
from moefication_cli.ffn import Compensation
from moefication_cli.models.sites import FFNSite
from moefication_cli.routing.budget import allocate, best_within
from moefication_cli.routing.calibrate import Curve, first_experts
from moefication_cli.routing.compensation import compensation_kind, fit_compensation
from moefication_cli.routing.cost import LayerCost, overhead_flops, top_k_within
from moefication_cli.routing.router import Router
from moefication_cli.routing.routers import read_router
from moefication_cli.routing.rules import Rule, Threshold, TopK, as_mask, rule_class
from moefication_cli.routing.tokens import Tokens
from moefication_cli.runs.control import chosen_layers
from moefication_cli.runs.costs import FIT_TOKENS
from moefication_cli.runs.inputs import RunModel, expert_weights, layer_seed, read_partition, read_tokens
from moefication_cli.split.partition import Partition
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

SAFETY = 0.97  # of the budget: thresholds are calibrated on other tokens than those they meet

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
    rule: str | None = None  # a name of `RULES`
    sharing: Literal["auto", "uniform"] | None = None
    compensation: str = "auto"  # a name of `COMPENSATIONS`
    keep_dense: Sequence[int] | None = None
    objective: Literal["flops", "time"] = "flops"
    times: Sequence[LayerTimes] | None = None  # of every layer, where the objective is time (`times.timed`)
    # Restrictions that `search` tries on the whole model, whose KL the curves of single layers do not show:
    only_router: int | None = None  # index into the layer's routers
    least_rank_cost: float = 0.0  # of the correction, relative to the dense FFN's multiply-adds


def choose_router(run: RunDir, name: str | None) -> str:
    """The trained router to use. Raises ConfigError unless the choice is clear."""
    trained = run.names("router")
    if name is not None:
        kinds = option_types(RouterConfig)["router"].choices
        if name not in (*trained, *kinds):
            hint = did_you_mean(name, (*trained, *kinds), f"there are {', '.join(trained or kinds)}")
            raise ConfigError(f"--router {name}: there is no such router", hint)
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
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.partition(".")
        parts.setdefault(owner, {})[part] = tensor
    routers = [
        read_router(parts[str(number)], form, settings["num_experts"])
        for number, form in enumerate(settings["routers"])
    ]
    return routers, settings["score"], Curve.read(parts["curve"]) if "curve" in parts else None


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
    plans: list[LayerPlan] = []
    for layer, choice in zip(layers, _choose(layers, activations, budget), strict=True):
        if isinstance(choice, LayerPlan):
            plans.append(choice)
            continue
        assert activations is not None
        make = _at_mean_count if choice is None else partial(_calibrated, row=choice)
        plans.append(make(model, activations, layer, budget=budget, seed=seed))
    return plans


def _choose(
    layers: Sequence[RoutedLayer], activations: Artifact | None, budget: Budget
) -> Sequence[LayerPlan | int | None]:
    """Per layer a finished plan of a fixed k, the row of its curve, or None for another rule set to a mean count."""
    dense = set(chosen_layers(budget.keep_dense, len(layers), "--keep-dense") or [])
    calibrated = all(layer.curve is not None for layer in layers) and activations is not None
    rule = None if budget.rule is None else rule_class(budget.rule)
    if rule is not None and rule.needs_calibrated and not calibrated:
        raise ConfigError(
            f"--rule {budget.rule} needs a calibrated router", "train one with --router regression or linear"
        )
    if budget.objective == "time" and (
        not calibrated or rule not in (None, Threshold) or budget.top_k is not None or budget.fraction_of != "flops"
    ):
        raise ConfigError(
            "--objective time needs a calibrated router and the threshold rule",
            "train one with --router regression, and leave out --rule, --top-k, --for and --fraction-of",
        )
    if budget.top_k is not None or rule is TopK or not calibrated:
        return [_fixed(layer, budget, layer.index in dense) for layer in layers]
    if rule is None or rule is Threshold:
        return _share_budget(layers, budget, dense)
    fixed = [_fixed(layer, budget, layer.index in dense) for layer in layers]  # raises where the budget cannot be met
    return [plan if plan.rule is None else None for plan in fixed]


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
    return LayerPlan(layer, TopK(top_k), cost.flops(top_k) / cost.dense_flops, layer.routers[-1])


def _share_budget(layers: Sequence[RoutedLayer], budget: Budget, dense: set[int]) -> list[int]:
    """One row of each layer's curve."""
    low_rank = compensation_kind(budget.compensation).low_rank
    costs, errors, work = [], [], []
    for number, layer in enumerate(layers):
        curve, times = layer.curve, None if budget.times is None else budget.times[number]
        assert curve is not None
        cost_C = (curve.flops_C if budget.fraction_of == "flops" else curve.active_C).clone()
        if times is not None:
            cost_C = times.of_curve(curve, layer.routers, layer.site.d_model)
        error_C = curve.error_C.clone() * layer.num_tokens
        is_dense_C = curve.flops_C >= 1.0
        is_dense_C[:-1] = False
        if not low_rank:
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
        of_one = layer.site.num_parameters if times is None else times.times.dense
        work.append(float(layer.num_tokens * of_one))
    target = budget.fraction * SAFETY if budget.fraction < 1 else 1.0
    if budget.sharing == "uniform":
        return [best_within(cost_C, error_C, target) for cost_C, error_C in zip(costs, errors, strict=True)]
    return allocate(costs, errors, [part / sum(work) for part in work], target)


def in_flops(budget: Budget, plans: Sequence[LayerPlan]) -> Budget:
    """What `settle` and `refine`, which count multiply-adds, hold: under the objective time, what these plans of it take."""
    if budget.objective == "flops":
        return budget
    work = [float(plan.layer.num_tokens * plan.layer.site.num_parameters) for plan in plans]
    spent = sum(w * plan.flops_fraction for w, plan in zip(work, plans, strict=True)) / sum(work)
    return replace(budget, fraction=min(1.0, spent / SAFETY), objective="flops", times=None)


def time_fraction(plans: Sequence[LayerPlan], budget: Budget) -> float | None:
    """Modelled time of these plans over the dense FFNs'; None where times are not known."""
    if budget.times is None:
        return None
    taken = total = 0.0
    for plan, times in zip(plans, budget.times, strict=True):
        seconds = plan.layer.num_tokens * times.times.dense
        correction = overhead_flops(None, plan.compensation) / times.dense_flops
        added = overhead_flops(plan.router, plan.compensation) / times.dense_flops
        share = 1.0 if plan.rule is None else times.share(plan.router, plan.flops_fraction - added, correction)
        taken, total = taken + seconds * share, total + seconds
    return taken / total


def _at_mean_count(model: RunModel, activations: Artifact, layer: RoutedLayer, budget: Budget, seed: int) -> LayerPlan:
    """The layer under a rule without a curve, set so that tokens run the budget's number of experts in the mean."""
    assert budget.rule is not None
    router, cost = layer.routers[-1], layer.cost()
    target = cost.experts_within(budget.fraction * SAFETY, budget.fraction_of)
    tokens = _fit_tokens(model, activations, layer, seed)
    scores_TE = router.scores(tokens.x_TD)
    rule = rule_class(budget.rule).calibrate(scores_TE, target)
    keep_TE = as_mask(rule.select(scores_TE), cost.num_experts)
    extra = _compensation(model, activations, layer, lambda _: keep_TE, 0, budget, seed)
    share = cost.flops(float(keep_TE.float().sum(1).mean())) / cost.dense_flops
    return LayerPlan(layer, rule, share, router, 0, extra)


def _calibrated(
    model: RunModel, activations: Artifact, layer: RoutedLayer, row: int, budget: Budget, seed: int
) -> LayerPlan:
    """The layer as one row of its curve says, its compensation fitted on calibration tokens."""
    curve = layer.curve
    assert curve is not None
    number, experts, flops = int(curve.router_C[row]), int(curve.experts_C[row]), float(curve.flops_C[row])
    if number < 0 and experts >= layer.partition.num_experts:
        return LayerPlan(layer, None, 1.0)
    rank = int(curve.rank_C[row])
    if number < 0:

        def first(tokens: Tokens) -> Tensor:
            return first_experts(layer.partition.num_experts, experts, len(tokens), model.device)

        extra = _compensation(model, activations, layer, first, rank, budget, seed)
        return LayerPlan(layer, TopK(0), flops, None, experts, extra)
    router, rule = layer.routers[number], Threshold(float(curve.threshold_C[row]))
    extra = _compensation(model, activations, layer, lambda t: rule.select(router.scores(t.x_TD)), rank, budget, seed)
    return LayerPlan(layer, rule, flops, router, 0, extra)


def _fit_tokens(model: RunModel, activations: Artifact, layer: RoutedLayer, seed: int) -> Tokens:
    return read_tokens(activations, layer.index, FIT_TOKENS, layer_seed(seed, layer.index)).to(model.device)


def _compensation(
    model: RunModel,
    activations: Artifact,
    layer: RoutedLayer,
    keep: Callable[[Tokens], Tensor],
    rank: int,
    budget: Budget,
    seed: int,
) -> Compensation | None:
    """Fitted on calibration tokens, of which `keep` gives the experts that run; without one nothing is read."""
    if not compensation_kind(budget.compensation).fitted:
        return None
    tokens = _fit_tokens(model, activations, layer, seed)
    weights = expert_weights(model.read_ffn(layer.index), layer.partition)
    return fit_compensation(weights, keep(tokens), rank, tokens)


def describe_rule(plans: Sequence[LayerPlan], sharing: str | None = None) -> dict[str, Any]:
    """What `metrics.json` says of a plan: its rule, top_k (the mean where layers differ) and how the budget is shared.

    `sharing` is what was asked for; without it thresholds share the budget between layers and other rules do not.
    """
    rules = [plan.rule for plan in plans if plan.rule is not None]
    ks = [rule.top_k for rule in rules if isinstance(rule, TopK)]
    names = [rule.name for rule in rules if not isinstance(rule, TopK)]
    if names or 0 in ks:  # layers without a router come from thresholds' curves
        name = names[0] if names else Threshold.name
        return {"rule": name, "top_k": None, "budget": (sharing or "auto") if name == Threshold.name else "uniform"}
    top_k = None if not ks else (ks[0] if len(set(ks)) == 1 else sum(ks) / len(ks))
    return {"rule": TopK.name, "top_k": top_k, "budget": "uniform"}
