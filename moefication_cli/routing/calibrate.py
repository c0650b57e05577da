"""What each way of running one layer costs and how much of its output is lost: the layer's calibration curve.

A *way* is a candidate: a router (or none: the most important experts always run), an absolute threshold on its scores
(so easy tokens run few experts, D2DMoE section 3.3; calibrated as a quantile of held-out scores), and a compensation
of what is dropped: its mean, or a low-rank linear function of the FFN's input fitted by reduced-rank regression
(Izenman 1975), which also stands in for FFNs whose neurons all fire a little.

Errors are weighted by `weight_T`, the Fisher information ||d log p / d y_t||^2 of each token's FFN output: to second
order the KL divergence to the dense model is half the sum over tokens of weight * squared error / D, so errors of
different layers add up in one unit and budgets can be shared between layers without running the whole model again.

Axes: T tokens, D model width, F neurons, E experts, R rank or router width, C candidates. Pure tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefication_cli.ffn import Compensation, ExpertWeights
from moefication_cli.routing.router import Router
from moefication_cli.routing.scores import token_chunks

QUANTILES = (0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.16, 0.2, 0.25, 0.31, 0.38, 0.46, 0.56, 0.68, 0.82)
RANK_COSTS = (0.005, 0.015, 0.04, 0.08)  # of the dense FFN's multiply-adds
_MOST_RANK = 512  # directions of more are found at a cost that grows with its square: minutes a layer at 7B
_RIDGE = 1e-2
_CHUNK_BYTES = 32 * 2**20  # of a copy of the hidden activations


@dataclass(frozen=True)
class Tokens:
    """Inputs of one FFN and how much each token's output matters (mean about 1 or absolute, only ratios count)."""

    x_TD: Tensor
    weight_T: Tensor


@dataclass(frozen=True)
class Curve:
    """Candidates of one layer, one row each. `router` is an index into the layer's routers, -1 for none."""

    router_C: Tensor  # int64
    threshold_C: Tensor  # score an expert needs; for router -1 the number of experts that always run
    rank_C: Tensor  # int64: rank of the correction; 0 is the mean alone
    flops_C: Tensor  # of the dense FFN's multiply-adds, everything counted
    active_C: Tensor  # share of the neurons computed
    error_C: Tensor  # weighted squared output error per token, in nats of KL to second order


class ReducedRank:
    """Weighted regression from FFN inputs to whatever was dropped; factorises the inputs once for many targets."""

    def __init__(self, tokens: Tokens) -> None:
        self._root_T1 = tokens.weight_T.clamp_min(0).sqrt().unsqueeze(1)
        self._weight_T1 = tokens.weight_T.unsqueeze(1)
        self._total = tokens.weight_T.sum().clamp_min(1e-30)
        self._mean_D = (self._weight_T1 * tokens.x_TD).sum(0) / self._total
        self._x_TD = (tokens.x_TD - self._mean_D) * self._root_T1
        gram_DD = self._x_TD.T @ self._x_TD
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        self._cholesky_DD = torch.linalg.cholesky(gram_DD)

    def fit(self, residual_TD: Tensor, max_rank: int) -> "Fit":
        """The best linear map of rank up to `max_rank` (plus a constant) from the inputs to `residual_TD`."""
        mean_D = (self._weight_T1 * residual_TD).sum(0) / self._total
        if max_rank == 0:
            return Fit(mean_D, self._mean_D, None, None)
        right_DD = self._x_TD.T @ ((residual_TD - mean_D) * self._root_T1)
        # Coefficients B = C^-1 right with C = L L^T; the fitted values' principal directions are those of L^T B.
        half_DD = torch.linalg.solve_triangular(self._cholesky_DD, right_DD, upper=False)
        basis_DR = _top_right_directions(half_DD, max_rank)
        slope_DR = torch.linalg.solve_triangular(self._cholesky_DD.T, half_DD @ basis_DR, upper=True)
        return Fit(mean_D, self._mean_D, slope_DR, basis_DR)


@dataclass(frozen=True)
class Fit:
    """residual ~ mean + (x - x_mean) slope basis^T, directions in order of what they explain."""

    mean_D: Tensor
    x_mean_D: Tensor
    slope_DR: Tensor | None
    basis_DR: Tensor | None

    def compensation(self, rank: int) -> Compensation:
        """The same as tensors of a converted layer."""
        if rank == 0 or self.slope_DR is None or self.basis_DR is None:
            return Compensation(constant_D=self.mean_D)
        w_in_RD, w_out_RD = self.slope_DR[:, :rank].T.contiguous(), self.basis_DR[:, :rank].T.contiguous()
        return Compensation(self.mean_D - (self.x_mean_D @ w_in_RD.T) @ w_out_RD, None, w_in_RD, w_out_RD)


def _top_right_directions(matrix: Tensor, rank: int, iterations: int = 3) -> Tensor:
    """The leading right singular vectors [D, rank] by subspace iteration from a fixed start; exact for small D."""
    columns = matrix.shape[1]
    if columns <= 512:
        return torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(columns, rank + 16), generator=generator).to(matrix)
    for _ in range(iterations):
        start = torch.linalg.qr(matrix.T @ (matrix @ start)).Q
    small = torch.linalg.svd(matrix @ start, full_matrices=False)
    return (start @ small.Vh.T)[:, :rank]


def ranks_for(weights: ExpertWeights) -> list[int]:
    """Ranks worth trying on this FFN: 0, and what RANK_COSTS of its multiply-adds pay for, at most half of D and 512."""
    dense, d_model = weights.ffn.num_neurons * weights.ffn.flops_per_neuron, weights.ffn.d_model
    most = min(d_model // 2, _MOST_RANK)
    return sorted({0, *(min(most, round(cost * dense / (2 * d_model))) for cost in RANK_COSTS)})


def dropped_output(weights: ExpertWeights, h_TF: Tensor, keep_TE: Tensor) -> Tensor:
    """What the experts that `keep_TE` (bool) leaves out would have written, [T, D], from all hidden activations."""
    w_down_FD = weights.ffn.w_down_FD[weights.num_shared :]
    out_TD = h_TF.new_empty(len(h_TF), w_down_FD.shape[1])
    for part in token_chunks(len(h_TF), len(w_down_FD), _CHUNK_BYTES):
        drop_TF = (~keep_TE[part]).repeat_interleave(weights.expert_size, dim=1)
        out_TD[part] = (h_TF[part, weights.num_shared :] * drop_TF) @ w_down_FD
    return out_TD


def kept_experts(weights: ExpertWeights, router: Router | None, threshold: float, x_TD: Tensor) -> Tensor:
    """keep_TE of one candidate: scores at or above the threshold, or the first `threshold` experts without a router."""
    if router is None:
        keep_E = torch.arange(weights.num_experts, device=x_TD.device) < round(threshold)
        return keep_E.expand(len(x_TD), -1)
    return router.scores(x_TD) >= threshold


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
    heldout_weight_T1 = (heldout.weight_T / max(1, len(heldout.weight_T))).unsqueeze(1) / (2 * weights.ffn.d_model)
    fit_h_TF, heldout_h_TF = weights.ffn.hidden(fit.x_TD), weights.ffn.hidden(heldout.x_TD)
    rows: list[tuple[float, ...]] = []
    for number, router in [(-1, None), *enumerate(routers)]:
        scores_TE = None if router is None else router.scores(fit.x_TD)
        for quantile in (0.0, *QUANTILES) if router is None else QUANTILES:
            if scores_TE is None:
                threshold = float(round(quantile * weights.num_experts))
            else:
                threshold = _quantile(scores_TE, 1 - quantile)
            residual_TD = dropped_output(weights, fit_h_TF, kept_experts(weights, router, threshold, fit.x_TD))
            keep_TE = kept_experts(weights, router, threshold, heldout.x_TD)
            missing_TD = dropped_output(weights, heldout_h_TF, keep_TE)
            solution = regression.fit(residual_TD, ranks[-1])
            active = shared + (1 - shared) * float(keep_TE.float().mean())
            for rank in ranks:
                extra = solution.compensation(rank)
                left_TD = missing_TD - apply_compensation(extra, heldout.x_TD)
                error = float((left_TD.square() * heldout_weight_T1).sum())
                flops = active + ((0 if router is None else router.flops) + 2 * rank * weights.ffn.d_model) / dense
                rows.append((number, threshold, rank, flops, active, error))
    rows.append((-1, float(weights.num_experts), 0, 1.0, 1.0, 0.0))  # left dense
    table = torch.tensor(rows, dtype=torch.float64)
    return Curve(table[:, 0].long(), table[:, 1], table[:, 2].long(), table[:, 3], table[:, 4], table[:, 5])


def apply_compensation(compensation: Compensation, x_TD: Tensor) -> Tensor:
    """What a compensation without per-expert vectors adds, [T, D] or [D]."""
    constant_D = compensation.constant_D
    assert constant_D is not None
    if compensation.w_in_RD is None or compensation.w_out_RD is None:
        return constant_D
    return constant_D + (x_TD @ compensation.w_in_RD.T) @ compensation.w_out_RD


def fit_compensation(weights: ExpertWeights, keep_TE: Tensor, rank: int, tokens: Tokens) -> Compensation:
    """What stands in for the experts that `keep_TE` (bool) leaves out at these tokens."""
    residual_TD = dropped_output(weights, weights.ffn.hidden(tokens.x_TD), keep_TE)
    return ReducedRank(tokens).fit(residual_TD, rank).compensation(rank)


def _quantile(values: Tensor, share: float) -> float:
    """The value a share of all entries lies below (torch.quantile stops at 2**24 entries)."""
    flat = values.flatten()
    return float(flat.kthvalue(min(max(1, round(share * flat.numel())), flat.numel())).values)
