"""`cmoe`: shared and routed experts by activation rate, and a router made of neurons; a peer that trains nothing.

Source: CMoE (Pei et al., arXiv 2502.04416), section 3, and its code (github.com/JarvisPei/CMoE, CMoE_utils.py). Per layer:

1. Profile: h of the FFN with inputs and weight rows of length 1; a token marks the 10 neurons of largest |h|. A neuron's rate
   is the share of tokens that mark it.
2. Shared experts, always on: the neurons of highest rate.
3. Routed experts: centroids are the marks of the neurons of highest rate among the rest; one balanced assignment of
   least L1 distance between marks (their code makes one pass, and so does this).
4. Router: an expert's score is |h| of the member whose marks are nearest to the mean of its members, with weight rows of
   length 1. The best k run; the paper's softmax does not change their order and their scale starts at 1, which is weight 1.

The budget: 16 experts, as many shared as routed ones active, as published, sized so that everything, the router
included, fits the fraction. Small FFNs whose neurons 16 does not suit get what is nearest within 2 % of the budget.

Different here: layers are profiled on the dense model's activations and not on those of the layers converted before; the
assignment is a min-cost flow, which finds the same least cost as their LAPJV. The paper has gated SiLU FFNs without biases;
others follow the same formulas with their activation, and pre-activations are divided, biases included, by the row's length.
Axes: T tokens, D model width, F neurons, E routed experts, N neurons per expert, K marks of a token or active experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.conversion.plan import Budget
from moefication_cli.evaluation.selections import PinnedFFN, SelectionRow
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights, FFNWeights
from moefication_cli.routing.scores import token_chunks
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import RunModel, expert_weights, layer_seed, read_tokens
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.split.kmeans import balanced_assignment
from moefication_cli.split.partition import Partition, with_shared
from moefication_cli.store.artifact import Artifact

NUM_EXPERTS = 16  # shared ones included
_MARKS = 10
_PROFILE_TOKENS = 16384  # 8 sequences of 2048, as published
_SLACK = 0.02  # of the budget may stay unspent for the sake of the published proportions


@dataclass(frozen=True)
class Layout:
    """Shared neurons, routed experts of `size` neurons, and how many of them run."""

    num_shared: int
    num_experts: int
    size: int
    top_k: int


def choose_layout(num_neurons: int, wanted: float, router_cost: float) -> Layout:
    """The layout nearest to the published one that costs at most `wanted` neurons; `router_cost` is in neurons per expert.

    A budget that does not even pay for router and one expert gets the cheapest layout there is.
    """
    if wanted >= num_neurons:
        size = max(1, num_neurons // NUM_EXPERTS)
        experts = max(1, NUM_EXPERTS // 2)
        if experts * size <= num_neurons:
            return Layout(num_neurons - experts * size, experts, size, experts)
        return Layout(num_neurons - 1, 1, 1, 1)
    fits: list[tuple[float, float, Layout]] = []
    all_of_them: list[tuple[float, Layout]] = []
    most = max(2 * NUM_EXPERTS, math.ceil(2 * num_neurons / max(wanted, 1.0)))
    for experts in range(2, min(num_neurons, most) + 1):
        for top_k in range(1, experts):
            least_off = num_neurons - wanted + router_cost * experts
            size = max(1, math.ceil(least_off / (experts - top_k) - 1e-9))
            if experts * size > num_neurons:
                size = num_neurons // experts
            layout = Layout(num_neurons - experts * size, experts, size, top_k)
            cost = layout.num_shared + top_k * size + router_cost * experts
            all_of_them.append((cost, layout))
            if cost <= wanted + 1e-9:
                odd = abs(num_neurons / size - NUM_EXPERTS) + abs(layout.num_shared / size - top_k)
                fits.append((max(0.0, wanted * (1 - _SLACK) - cost), odd, layout))
    if fits:
        return min(fits, key=lambda found: found[:2])[2]
    return min(all_of_them, key=lambda found: found[0])[1]


def marks(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    """marked_TK (int64): the neurons of largest |h| of each token, all rows and inputs scaled to length 1."""
    count = min(_MARKS, ffn.num_neurons)
    parts = []
    for part in token_chunks(len(x_TD), ffn.num_neurons):
        length_T1 = x_TD[part].norm(dim=1, keepdim=True).clamp_min(1e-12)
        parts.append(_normalised_hidden(ffn, x_TD[part], length_T1).abs().topk(count, dim=1, sorted=False).indices)
    return torch.cat(parts)


def _normalised_hidden(ffn: FFNWeights, x_TD: Tensor, length_T1: Tensor | float = 1.0) -> Tensor:
    """h with every pre-activation divided by the length of its weight row, and of its input where given."""

    def product(weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        return functional.linear(x_TD, weight_FD, bias_F) / weight_FD.norm(dim=1).clamp_min(1e-12) / length_T1

    act, up_TF = ACTIVATIONS[ffn.activation], product(ffn.w_up_FD, ffn.b_up_F)
    return act(up_TF) if ffn.w_gate_FD is None else act(product(ffn.w_gate_FD, ffn.b_gate_F)) * up_TF


def carve(marked_TK: Tensor, num_neurons: int, layout: Layout) -> tuple[Partition, Tensor]:
    """(partition, representative_E): the members that stand for the routed experts, from the marks of all tokens."""
    count_F = torch.bincount(marked_TK.flatten(), minlength=num_neurons)
    by_rate_F = count_F.argsort(descending=True, stable=True)
    shared_idx, rest_F = by_rate_F[: layout.num_shared], by_rate_F[layout.num_shared :].sort().values
    centroid_E = by_rate_F[layout.num_shared :][: layout.num_experts]

    def overlap(other: Callable[[Tensor], Tensor]) -> Tensor:
        """[F, E]: how often each neuron is marked at the same tokens as what `other` makes of the marks."""
        return sum((marked_TF.T @ other(marked_TF) for marked_TF in _dense(marked_TK, num_neurons)), torch.zeros(()))  # type: ignore[return-value]

    both_FE = overlap(lambda marked_TF: marked_TF[:, centroid_E])
    distance_FE = count_F[:, None] + count_F[centroid_E] - 2 * both_FE
    expert_F = balanced_assignment(distance_FE[rest_F].round().long())
    member_FE = torch.zeros(num_neurons, layout.num_experts, device=marked_TK.device)
    member_FE[rest_F, expert_F.to(rest_F.device)] = 1 / layout.size
    # ||c_n - mean||_1 = sum of the mean + sum over n's marks of (1 - 2 mean)
    from_mean_FE = count_F[:, None] - 2 * overlap(lambda marked_TF: marked_TF @ member_FE)
    representative_E = from_mean_FE.masked_fill(member_FE == 0, float("inf")).argmin(0)
    return with_shared(Partition(expert_F.cpu()), shared_idx.cpu(), num_neurons), representative_E


def _dense(marked_TK: Tensor, num_neurons: int) -> Iterator[Tensor]:
    """The marks as zeros and ones [T, F], some tokens at a time."""
    for part in token_chunks(len(marked_TK), num_neurons):
        rows_TK = marked_TK[part]
        yield torch.zeros(len(rows_TK), num_neurons, device=rows_TK.device).scatter_(1, rows_TK, 1.0)


def representative_selection(ffn: FFNWeights, representative_E: Tensor, top_k: int) -> Any:
    """`(x_TD, weights) -> ids_TK` of the experts whose representative neurons are most active."""
    router = ffn.permute(representative_E)

    def select(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
        return _normalised_hidden(router, x_TD.to(router.w_up_FD.dtype)).abs().topk(top_k, -1, sorted=False).indices

    return select


def cmoe_layer(
    ffn: FFNWeights, x_TD: Tensor, budget: Budget, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PinnedFFN, Layout]:
    """One FFN as CMoE makes it of these calibration tokens; it computes in `dtype`, and everything from a fraction of 1."""
    # Rows that a representative has in the router, relative to a neuron's: all but that of down
    cost = (ffn.flops_per_neuron - ffn.d_model) / ffn.flops_per_neuron
    counted = cost if budget.fraction_of == "flops" else 0.0
    layout = choose_layout(ffn.num_neurons, budget.fraction * ffn.num_neurons, counted)
    partition, representative_E = carve(marks(ffn, x_TD), ffn.num_neurons, layout)
    ffn = ffn.to(dtype)
    select = representative_selection(ffn, representative_E, layout.top_k)
    moe = MoEFFN(expert_weights(ffn, partition), select=select, backend=backend, may_go_dense=False)
    return PinnedFFN(moe, overhead=cost * layout.num_experts / ffn.num_neurons), layout


def cmoe_row(
    model: RunModel, activations: Artifact, budget: Budget, backend: str, dtype: torch.dtype, control: Control
) -> SelectionRow:
    """CMoE at this budget, every layer by itself."""
    made = []
    for index in control.track(range(len(model.sites)), "CMoE", len(model.sites)):
        tokens = read_tokens(activations, index, _PROFILE_TOKENS, layer_seed(control.seed, index))
        made.append(cmoe_layer(model.read_ffn(index), tokens.x_TD.to(model.device), budget, backend, dtype))
    top_k = sum(layout.top_k for _, layout in made) / len(made)
    meta = {"rule": "top_k", "score": "representative", "top_k": top_k}
    return SelectionRow("cmoe", "baseline", budget.fraction, [layer for layer, _ in made], meta=meta)
