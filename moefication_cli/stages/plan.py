"""What a converted layer consists of at one compute budget: the common ground of `apply` and `eval`."""

from dataclasses import dataclass
from typing import Any, Literal

from moefication_cli.errors import ConfigError
from moefication_cli.models.sites import FFNSite
from moefication_cli.routing.plan import LayerCost, overhead_flops, top_k_within
from moefication_cli.routing.router import Router, Rule
from moefication_cli.runtime.weights import Compensation
from moefication_cli.split.partition import Partition
from moefication_cli.stages.contract import parse_layers
from moefication_cli.stages.inputs import RunModel, read_partition
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.stage import Stage

FractionOf = Literal["flops", "neurons"]


@dataclass(frozen=True)
class RoutedLayer:
    """One layer with its trained router, before a budget is chosen."""

    site: FFNSite
    partition: Partition
    router: Router
    score: str

    @property
    def index(self) -> int:
        return self.site.index

    @property
    def name(self) -> str:
        return self.site.name

    def cost(self, compensation: Compensation | None = None) -> LayerCost:
        """What this layer costs per token; needs no weights."""
        return LayerCost(
            d_model=self.site.d_model,
            num_neurons=self.site.num_neurons,
            num_shared=self.partition.num_shared,
            num_experts=self.partition.num_experts,
            flops_per_neuron=self.site.d_model * (3 if self.site.gated else 2),
            overhead=overhead_flops(self.router, compensation),
        )


@dataclass(frozen=True)
class LayerPlan:
    """One layer at a budget: which experts run. `rule` is None where the layer stays dense."""

    layer: RoutedLayer
    rule: Rule | None
    compensation: Compensation | None
    flops_fraction: float


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


def routed_layers(model: RunModel, split: Stage, router: Stage) -> list[RoutedLayer]:
    """Every layer with its split and router; FFN weights stay on disk."""
    layers = []
    for index, site in enumerate(model.sites):
        found, score = read_router(router, index)
        layers.append(RoutedLayer(site, read_partition(split, index), found.to(model.device), score))
    return layers


def read_router(router: Stage, index: int) -> tuple[Router, str]:
    """(router, the score it predicts) of one layer."""
    tensors, settings = router.read_layer(index)
    parts = {name: tensors[name] for name in ("w_in_RD", "b_in_R", "w_out_ER", "b_out_E") if name in tensors}
    return Router(**parts, activation=settings["activation"], normalise=settings["normalise"]), settings["score"]


def plan_layers(
    layers: list[RoutedLayer],
    fraction: float,
    fraction_of: FractionOf,
    *,
    top_k: int | None = None,
    keep_dense: str | None = None,
) -> list[LayerPlan]:
    """Every layer at one budget. Raises ConfigError when a budget cannot be met or k exceeds E."""
    dense = set(parse_layers(keep_dense, len(layers)) or [])
    plans = []
    for layer in layers:
        cost = layer.cost()
        where = f"layer {layer.index} ({layer.name})"
        if layer.index in dense:
            plans.append(LayerPlan(layer, None, None, 1.0))
            continue
        if top_k is not None and top_k > cost.num_experts:
            raise ConfigError(f"{where}: --top-k {top_k} exceeds its {cost.num_experts} experts")
        k = top_k if top_k is not None else top_k_within(cost, fraction, fraction_of, where)
        plans.append(LayerPlan(layer, Rule(top_k=k), None, cost.flops(k) / cost.dense_flops))
    return plans


def describe_rule(plans: list[LayerPlan]) -> dict[str, Any]:
    """What `metrics.json` says of a plan: rule and top_k (the mean over routed layers when they differ)."""
    ks = [plan.rule.top_k for plan in plans if plan.rule is not None and plan.rule.top_k is not None]
    return {"rule": "top_k", "top_k": None if not ks else (ks[0] if len(set(ks)) == 1 else sum(ks) / len(ks))}
