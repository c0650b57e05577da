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
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from moefication_cli.ffn import Compensation, ExpertWeights
from moefication_cli.routing.router import Router
from moefication_cli.routing.scores import token_chunks

QUANTILES = (0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.16, 0.2, 0.25, 0.31, 0.38, 0.46, 0.56, 0.68, 0.82)
RANK_COSTS = (0.005, 0.015, 0.04, 0.08)  # of the dense FFN's multiply-adds
_MOST_RANK = 512  # directions of more are found at a cost that grows with its square: minutes a layer at 7B
_RIDGE = 1e-2
_CHUNK_BYTES = 64 * 2**20  # of hidden activations, where not all are needed at once
_BLOCK_NEURONS = 64  # computed together at least: smaller products are slower than what they save


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
        self._x_TD, self._root_T = tokens.x_TD, tokens.weight_T.clamp_min(0).sqrt()
        self._share_T = tokens.weight_T / tokens.weight_T.sum().clamp_min(1e-30)
        self._mean_D = self._share_T @ tokens.x_TD

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(L of C = X^T X = L L^T, weighted L^-1 X^T, memory of one residual)."""
        x_TD = (self._x_TD - self._mean_D) * self._root_T.unsqueeze(1)
        gram_DD = x_TD.T @ x_TD
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        cholesky_DD = torch.linalg.cholesky(gram_DD)
        white_DT = torch.linalg.solve_triangular(cholesky_DD, x_TD.T, upper=False).mul_(self._root_T)
        return cholesky_DD, white_DT, x_TD  # taking as much memory anew for every fit takes as long as filling it

    def fit(self, residual_TD: Tensor, max_rank: int) -> "Correction":
        """The best linear map of rank up to `max_rank` (plus a constant) from the inputs to `residual_TD`."""
        mean_D = self._share_T @ residual_TD
        if max_rank == 0:
            return Correction(mean_D, self._mean_D, None, None)
        cholesky_DD, white_DT, centred_TD = self._factors
        # Coefficients B = C^-1 X^T R with C = L L^T; the fitted values' principal directions are those of L^T B
        half_DD = white_DT @ torch.sub(residual_TD, mean_D, out=centred_TD)
        basis_DR = _top_right_directions(half_DD, max_rank)
        slope_DR = torch.linalg.solve_triangular(cholesky_DD.T, half_DD @ basis_DR, upper=True)
        return Correction(mean_D, self._mean_D, slope_DR, basis_DR)


@dataclass(frozen=True)
class Correction:
    """residual ~ mean + (x - x_mean) slope basis^T, directions in order of what they explain."""

    mean_D: Tensor
    x_mean_D: Tensor
    slope_DR: Tensor | None
    basis_DR: Tensor | None

    def subtract(self, left_TD: Tensor, x_TD: Tensor, start: int, stop: int) -> None:
        """Take from `left_TD` what directions start <= r < stop add for these inputs."""
        if self.slope_DR is not None and self.basis_DR is not None:
            slope_DR = self.slope_DR[:, start:stop]
            left_TD.addmm_(x_TD @ slope_DR - self.x_mean_D @ slope_DR, self.basis_DR[:, start:stop].T, alpha=-1)

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
    small = matrix @ start
    return start @ torch.linalg.eigh(small.T @ small).eigenvectors.flip(1)[:, :rank]


def ranks_for(weights: ExpertWeights) -> list[int]:
    """Ranks worth trying on this FFN: 0, and what RANK_COSTS of its multiply-adds pay for, at most half of D and 512."""
    dense, d_model = weights.ffn.num_neurons * weights.ffn.flops_per_neuron, weights.ffn.d_model
    most = min(d_model // 2, _MOST_RANK)
    return sorted({0, *(min(most, round(cost * dense / (2 * d_model))) for cost in RANK_COSTS)})


class Dropped:
    """What left-out experts would have written, [T, D], while more and more of them are left out.

    Each (token, expert) pair is computed once, when it is first left out, so that all candidates of one router together
    cost about one FFN; experts of fewer than _BLOCK_NEURONS are computed in blocks of so many, which saves less.
    """

    def __init__(self, weights: ExpertWeights, h_TF: Tensor) -> None:
        self._weights, self._h_TF = weights, h_TF
        self._out_TD = h_TF.new_zeros(len(h_TF), weights.ffn.d_model)
        self._added_TD = torch.empty_like(self._out_TD)
        self._kept_TE = torch.ones(len(h_TF), weights.num_experts, dtype=torch.bool, device=h_TF.device)

    def output(self, keep_TE: Tensor) -> Tensor:
        """[T, D] without the experts that `keep_TE` (bool) leaves out; it may keep none that was left out before.

        The next call changes the result in place.
        """
        drop_TE = self._kept_TE & ~keep_TE
        self._kept_TE = keep_TE
        size, start = self._weights.expert_size, self._weights.num_shared
        together = max(1, _BLOCK_NEURONS // size)
        for drop_TB in drop_TE.split(together, dim=1):
            stop = start + drop_TB.shape[1] * size
            token_S = drop_TB.any(1).nonzero().squeeze(1)
            if len(token_S):
                h_SF = self._h_TF[:, start:stop].index_select(0, token_S)
                if together > 1:
                    h_SF *= drop_TB[token_S].repeat_interleave(size, dim=1)
                w_down_FD = self._weights.ffn.w_down_FD[start:stop]
                self._out_TD.index_add_(0, token_S, torch.mm(h_SF, w_down_FD, out=self._added_TD[: len(token_S)]))
            start = stop
        return self._out_TD


def kept_experts(weights: ExpertWeights, router: Router | None, threshold: float, x_TD: Tensor) -> Tensor:
    """keep_TE of one candidate: scores at or above the threshold, or the first `threshold` experts without a router."""
    return _kept(weights, None if router is None else router.scores(x_TD), threshold, x_TD)


def _kept(weights: ExpertWeights, scores_TE: Tensor | None, threshold: float, x_TD: Tensor) -> Tensor:
    if scores_TE is not None:
        return scores_TE >= threshold
    return (torch.arange(weights.num_experts, device=x_TD.device) < round(threshold)).expand(len(x_TD), -1)


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
        for quantile in reversed((0.0, *QUANTILES) if router is None else QUANTILES):
            if scores_TE is None:
                threshold = float(round(quantile * weights.num_experts))
            else:
                threshold = _quantile(scores_TE, 1 - quantile)
            keep_TE = _kept(weights, heldout_TE, threshold, heldout.x_TD)
            residual_TD = dropped.output(_kept(weights, scores_TE, threshold, fit.x_TD))
            solution = regression.fit(residual_TD, ranks[-1])
            left_TD = missing.output(keep_TE) - solution.mean_D
            active = shared + (1 - shared) * float(keep_TE.float().mean())
            for previous, rank in pairwise([0, *ranks]):
                solution.subtract(left_TD, heldout.x_TD, previous, rank)
                error = float(heldout_share_T @ torch.linalg.vector_norm(left_TD, dim=1).square())
                flops = active + ((0 if router is None else router.flops) + 2 * rank * weights.ffn.d_model) / dense
                rows.append((number, threshold, rank, flops, active, error))
    rows.sort(key=lambda row: (row[0], row[4]))  # cheapest first: among equals that one is taken
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
    residual_TD = torch.empty_like(tokens.x_TD)
    for part in token_chunks(len(residual_TD), weights.ffn.num_neurons, _CHUNK_BYTES):
        residual_TD[part] = Dropped(weights, weights.ffn.hidden(tokens.x_TD[part])).output(keep_TE[part])
    return ReducedRank(tokens).fit(residual_TD, rank).compensation(rank)


def _quantile(values: Tensor, share: float) -> float:
    """The value a share of all entries lies below (torch.quantile stops at 2**24 entries)."""
    flat = values.flatten()
    return float(flat.kthvalue(min(max(1, round(share * flat.numel())), flat.numel())).values)
