"""The rows of `eval`: for each selection and fraction, what stands in for every FFN of one shared model.

    groundtruth   expert oracle: the experts that score highest for this token, every neuron computed to know
    neuron        neuron oracle: the neurons that write most, the bound of any split
    random        random experts of the same split
    static        pruning by importance, no router (FLAP, arXiv 2312.11983: variance x norm, mean compensation)
    paper         published split and router (MoEfication), from RUN/baseline/paper
    teal, cmoe    peers at the same multiply-adds: input sparsity and training-free experts, see `teal.py` and `cmoe.py`
    <router>      a trained router
    dense-finetuned   what RUN/model is with every neuron on, where fine-tuning changed its weights
    dense-int8, <router>-int8   the dense model and RUN/model with int8 weights (`--weights int8`)

Oracles and static pruning get the fraction as a share of the neurons: they have no router to pay for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.conversion.plan import LayerPlan, RoutedLayer, describe_rule
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.models.installed import FFNLayer
from moefication_cli.models.int8 import Int8Linear
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite
from moefication_cli.models.surgery import live_weights
from moefication_cli.routing.cost import overhead_flops
from moefication_cli.routing.scores import expert_scores
from moefication_cli.runs.inputs import layer_seed
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.tasks.examples import Scores


@dataclass(frozen=True)
class OwnModel:
    """A model with other weights than the run's, its neurons in the order of the split: a fine-tuned one, or one in int8."""

    loaded: LoadedModel
    mask: TokenMask


@dataclass
class SelectionRow:
    """One row: the layers to install, and what the row says about itself."""

    selection: str
    kind: str  # oracle | baseline | router
    fraction: float
    layers: Sequence[Any]  # FFNLayer, each with `active_fraction`; StockFFN where nothing is to be installed
    applied: bool = False
    meta: dict[str, Any] = field(default_factory=dict)  # top_k, rule, budget, score, seed
    plans: list[LayerPlan] = field(default_factory=list)  # of rows that route: what their routers cost
    own: OwnModel | None = None  # the model to install the layers in, where it is not the one of all rows
    seconds: float = 0.0
    measured: list[Scores] = field(default_factory=list)

    @property
    def backend(self) -> str:
        names = sorted({getattr(layer, "last_backend", "") for layer in self.layers} - {""})
        return "+".join(names) or "torch"


class NeuronOracleFFN:
    """Keeps, per token, the `top_k` neurons with the largest |h_n| * ||w_down_n||."""

    def __init__(self, dense: FFNWeights, top_k: int) -> None:
        self.dense, self.top_k = dense, top_k
        self.norm_F = dense.w_down_FD.norm(dim=1)
        self.active_fraction = top_k / dense.num_neurons

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        h = self.dense.hidden(x)
        kept = (h.abs() * self.norm_F).topk(self.top_k, dim=-1, sorted=False).indices
        y = torch.zeros_like(h).scatter_(-1, kept, h.gather(-1, kept)).to(self.norm_F.dtype) @ self.dense.w_down_FD
        return (y if self.dense.b_down_D is None else y + self.dense.b_down_D).to(x.dtype)


class DenseFFN:
    """A layer the plan leaves dense."""

    active_fraction = 1.0
    last_backend = "dense"

    def __init__(self, dense: FFNWeights) -> None:
        self.dense = dense

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.dense.forward(x)


class StockFFN:
    """Nothing stands in: the modules of the row's own model compute the FFN."""

    active_fraction = 1.0
    last_backend = "torch"


def dense_layer(model: nn.Module, site: FFNSite) -> DenseFFN | StockFFN:
    """What a layer without experts is: the FFN on the model's weights, or its own modules where those are int8."""
    if isinstance(model.get_submodule(site.up), Int8Linear):
        return StockFFN()
    return DenseFFN(live_weights(model, site).dequantised())


class PinnedFFN:
    """A layer with weights of its own: installing it does not exchange them for the model's.

    `overhead`: multiply-adds relative to the dense FFN that a selection without a `Router` costs while experts are off.
    """

    def __init__(self, layer: MoEFFN | PrunedFFN, overhead: float | None = None) -> None:
        self.layer, self.overhead = layer, overhead

    @property
    def flops_fraction(self) -> float | None:
        """Measured multiply-adds relative to dense; None where the row's plan knows what its router costs."""
        share = self.active_fraction
        return None if self.overhead is None else share + (self.overhead if share < 1 else 0.0)

    @property
    def active_fraction(self) -> float:
        return self.layer.active_fraction

    @property
    def last_backend(self) -> str:
        return self.layer.last_backend

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.layer(x, token_mask)


def oracle_selection(top_k: int, score: Any) -> Any:
    """`(x_TD, weights) -> ids_TK` of the experts that matter most by `score`."""

    def select(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
        return expert_scores(weights.ffn.hidden(x_TD), weights, score).topk(top_k, dim=-1, sorted=False).indices

    return select


def random_selection(top_k: int, seed: int) -> Any:
    """`(x_TD, weights) -> ids_TK` of experts drawn anew for every token."""
    generator = torch.Generator().manual_seed(seed)

    def select(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
        noise_TE = torch.rand(len(x_TD), weights.num_experts, generator=generator)
        return noise_TE.topk(top_k, dim=-1, sorted=False).indices.to(x_TD.device)

    return select


def prune(
    dense: FFNWeights,
    statistics: dict[str, Tensor],
    fraction: float,
    sample_TD: Tensor,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> tuple[FFNLayer, dict[str, Any]]:
    """The strongest static pruning we know at this fraction, judged by output error on a calibration sample.

    Tries importance by variance x norm^2 (FLAP) and by mean contribution, each with and without the dropped neurons'
    mean output as a bias: mean compensation helps GELU and SiLU models and destroys ReLU ones. The layer computes in `dtype`.
    """
    num_kept = max(1, round(fraction * dense.num_neurons))
    norm_F = dense.w_down_FD.norm(dim=1)
    scores = {
        "variance": statistics["variance_F"].to(norm_F) * norm_F.square(),
        "contribution": statistics["contribution_F"].to(norm_F),
    }
    h_TF = dense.hidden(sample_TD)
    full_TD = h_TF @ dense.w_down_FD
    best: tuple[float, FFNLayer, dict[str, Any]] | None = None
    for name, score_F in scores.items():
        kept_F = score_F.topk(num_kept).indices.sort().values
        dropped_F = torch.ones_like(score_F).index_fill_(0, kept_F, 0)
        mean_D = (statistics["mean_F"].to(norm_F) * dropped_F) @ dense.w_down_FD
        part_TD = h_TF[:, kept_F] @ dense.w_down_FD[kept_F]
        for compensated in (False, True):
            error = float((full_TD - part_TD - (mean_D if compensated else 0)).square().sum())
            if best is None or error < best[0]:
                extra = Compensation(constant_D=mean_D) if compensated else None
                kept = ExpertWeights(dense.permute(kept_F).to(dtype), 1, num_kept, extra)
                layer = PinnedFFN(PrunedFFN(kept, backend, dense.num_neurons))
                best = (error, layer, {"importance": name, "compensated": compensated})
    assert best is not None
    return best[1], best[2]


def routed_row(
    name: str,
    model: nn.Module,
    plans: Sequence[LayerPlan],
    fraction: float,
    backend: str,
    applied: bool = False,
    sharing: str | None = None,
) -> SelectionRow:
    """A trained router at a budget, through the real backend, on a model whose neurons are in expert order."""
    layers: list[FFNLayer | StockFFN] = []
    for plan in plans:
        if plan.rule is None:
            layers.append(dense_layer(model, plan.layer.site))
            continue
        dense = live_weights(model, plan.layer.site)
        weights = ExpertWeights(dense, plan.num_experts, plan.num_shared, plan.compensation)
        if plan.router is None:
            layers.append(PrunedFFN(weights, backend))
        else:
            # Quality is measured: a call that goes dense would compute more than the router selected.
            layers.append(MoEFFN(weights, plan.router, plan.rule, backend=backend, may_go_dense=False))
    meta = {"score": plans[0].layer.score} | describe_rule(plans, sharing)
    return SelectionRow(name, "router", fraction, layers, applied, meta=meta, plans=list(plans))


def selected_row(
    name: str, model: nn.Module, layers: Sequence[RoutedLayer], fraction: float, score: str, seed: int, backend: str
) -> SelectionRow:
    """`groundtruth` or `random` at this share of the experts, on the split of the run."""
    moe: list[FFNLayer] = []
    ks = []
    for layer in layers:
        partition = layer.partition
        top_k = max(1, round(fraction * partition.num_experts))
        ks.append(top_k)
        weights = ExpertWeights(live_weights(model, layer.site), partition.num_experts, partition.num_shared)
        select = (
            oracle_selection(top_k, score)
            if name == "groundtruth"
            else random_selection(top_k, layer_seed(seed, layer.index))
        )
        moe.append(MoEFFN(weights, select=select, backend=backend, may_go_dense=False))
    kind = "oracle" if name == "groundtruth" else "baseline"
    meta = {"score": score if name == "groundtruth" else None, "rule": "top_k", "top_k": sum(ks) / len(ks)}
    return SelectionRow(name, kind, fraction, moe, meta=meta | {"seed": seed})


def count_selections(row: SelectionRow) -> None:
    """Starts counting, from zero, what each layer of the row selects."""
    for layer in row.layers:
        counting = layer.layer if isinstance(layer, PinnedFFN) else layer
        if hasattr(counting, "count_selections"):
            counting.count_selections()


def flops_fractions(row: SelectionRow) -> list[float]:
    """Per layer, the multiply-adds really spent relative to dense: measured active neurons, router and correction.

    Oracles and pruning have no router to pay for: what they compute is their active share. Layers of peers measure it.
    """
    found = []
    for number, layer in enumerate(row.layers):
        own = getattr(layer, "flops_fraction", None)
        if own is not None:
            found.append(float(own))
            continue
        share = float(layer.active_fraction)
        plan = row.plans[number] if row.plans else None
        if plan is not None and plan.rule is not None and share < 1:
            site = plan.layer.site
            extra = overhead_flops(plan.router, plan.compensation)
            share += extra / (site.num_neurons * site.flops_per_neuron)
        found.append(share)
    return found
