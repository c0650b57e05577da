"""What each way of running one layer costs and how much of its output is lost: the layer's calibration curve.

A *way* is a candidate: a router (or none: the most important experts always run), an absolute threshold on its scores
(so easy tokens run few experts, D2DMoE section 3.3; calibrated as a quantile of held-out scores), and the rank of the
correction that stands in for what is dropped (see `compensation`).

Errors are weighted by `weight_T`, the Fisher information ||d log p / d y_t||^2 of each token's FFN output: to second
order the KL divergence to the dense model is half the sum over tokens of weight * squared error / D, so errors of
different layers add up in one unit and budgets can be shared between layers without running the whole model again.

Axes: T tokens, D model width, F neurons, E experts, R rank or router width, C candidates. Pure tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.compensation import Dropped, ReducedRank, ranks_for
from moefication_cli.routing.router import Router
from moefication_cli.routing.rules import quantiles
from moefication_cli.routing.tokens import Tokens

QUANTILES = (0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.16, 0.2, 0.25, 0.31, 0.38, 0.46, 0.56, 0.68, 0.82)


@dataclass(frozen=True)
class Curve:
    """Candidates of one layer, one row each. `router_C` is an index into the layer's routers, -1 for none."""

    router_C: Tensor  # int64
    threshold_C: Tensor  # score an expert needs; without a router 0
    experts_C: Tensor  # int64: without a router, how many experts always run; with one 0
    rank_C: Tensor  # int64: rank of the correction; 0 is the mean alone
    flops_C: Tensor  # of the dense FFN's multiply-adds, everything counted
    active_C: Tensor  # share of the neurons computed
    error_C: Tensor  # weighted squared output error per token, in nats of KL to second order

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "Curve":
        """The curve as stored. Versions before 0.2 kept the number of experts in `threshold_C` where there is no router."""
        columns = dict(tensors)
        if "experts_C" not in columns:
            alone_C, value_C = columns["router_C"] < 0, columns["threshold_C"]
            columns["experts_C"] = torch.where(alone_C, value_C.round(), 0.0).long()
            columns["threshold_C"] = torch.where(alone_C, 0.0, value_C)
        return cls(**columns)


def first_experts(num_experts: int, count: int, num_tokens: int, device: torch.device) -> Tensor:
    """keep_TE of a layer without a router: the first `count` experts run for every token."""
    return (torch.arange(num_experts, device=device) < count).expand(num_tokens, -1)


def calibration_curve(
    weights: ExpertWeights, routers: Sequence[Router], fit: Tokens, heldout: Tokens, rank_limit: int | None = None
) -> Curve:
    """Cost and held-out error of every candidate; compensations are fitted on `fit`.

    Experts must stand in order of importance: without a router the first ones run. `rank_limit` 0 leaves only the mean.
    """
    regression = ReducedRank(fit)
    ranks = [rank for rank in ranks_for(weights) if rank_limit is None or rank <= rank_limit]
    dense = weights.ffn.num_neurons * weights.ffn.flops_per_neuron
    shared = weights.num_shared / weights.ffn.num_neurons
    heldout_share_T = heldout.weight_T / (2 * weights.ffn.d_model * max(1, len(heldout.weight_T)))
    fit_h_TF, heldout_h_TF = weights.ffn.hidden(fit.x_TD), weights.ffn.hidden(heldout.x_TD)
    rows: list[tuple[float, ...]] = []
    for number, router in [(-1, None), *enumerate(routers)]:
        dropped, missing = Dropped(weights, fit_h_TF), Dropped(weights, heldout_h_TF)
        scores_TE, heldout_TE = (None if router is None else router.scores(part.x_TD) for part in (fit, heldout))
        shares = sorted((0.0, *QUANTILES) if router is None else QUANTILES, reverse=True)
        thresholds = [0.0] * len(shares) if scores_TE is None else quantiles(scores_TE, [1 - share for share in shares])
        for share, threshold in zip(shares, thresholds, strict=True):
            experts = 0
            if scores_TE is None or heldout_TE is None:
                experts = round(share * weights.num_experts)
                fit_keep_TE, keep_TE = (
                    first_experts(weights.num_experts, experts, len(part), part.x_TD.device) for part in (fit, heldout)
                )
            else:
                fit_keep_TE, keep_TE = scores_TE >= threshold, heldout_TE >= threshold
            residual_TD = dropped.output(fit_keep_TE)
            solution = regression.fit(residual_TD, ranks[-1])
            left_TD = missing.output(keep_TE) - solution.mean_D
            active = shared + (1 - shared) * float(keep_TE.float().mean())
            for previous, rank in pairwise([0, *ranks]):
                solution.subtract(left_TD, heldout.x_TD, previous, rank)
                error = float(heldout_share_T @ torch.linalg.vector_norm(left_TD, dim=1).square())
                flops = active + ((0 if router is None else router.flops) + 2 * rank * weights.ffn.d_model) / dense
                rows.append((number, threshold, experts, rank, flops, active, error))
    rows.sort(key=lambda row: (row[0], row[5]))  # cheapest first: among equals that one is taken
    rows.append((-1, 0.0, weights.num_experts, 0, 1.0, 1.0, 0.0))  # left dense
    table = torch.tensor(rows, dtype=torch.float64)
    router_C, threshold_C, experts_C, rank_C, flops_C, active_C, error_C = table.unbind(1)
    return Curve(router_C.long(), threshold_C, experts_C.long(), rank_C.long(), flops_C, active_C, error_C)
