"""What stands in for experts that do not run: their mean output, or a low-rank linear function of the FFN's input.

The linear function is fitted by reduced-rank regression (Izenman 1975, "Reduced-rank regression for the multivariate
linear model") and also stands in for FFNs whose neurons all fire a little. Tokens are weighted by how much their FFN
output matters. `COMPENSATIONS` are the choices of `--compensation`.

Axes: T tokens, D model width, F neurons, E experts, R rank. Pure tensors.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import Compensation, ExpertWeights
from moefication_cli.routing.dropped_cpu import add_dropped
from moefication_cli.routing.scores import token_chunks
from moefication_cli.routing.tokens import Tokens

RANK_COSTS = (0.005, 0.015, 0.04, 0.08)  # of the dense FFN's multiply-adds
_MOST_RANK = 512  # directions of more are found at a cost that grows with its square: minutes a layer at 7B
RIDGE = 1e-2
_CHUNK_BYTES = 64 * 2**20  # of hidden activations, where not all are needed at once
BLOCK_NEURONS = 64  # computed together at least: smaller products are slower than what they save


@dataclass(frozen=True)
class CompensationKind:
    """A row of `COMPENSATIONS`: whether dropped experts are stood in for at all, and by more than their mean."""

    fitted: bool
    low_rank: bool


COMPENSATIONS: dict[str, CompensationKind] = {
    "auto": CompensationKind(fitted=True, low_rank=True),
    "mean": CompensationKind(fitted=True, low_rank=False),
    "none": CompensationKind(fitted=False, low_rank=False),
}


def compensation_kind(name: str) -> CompensationKind:
    """The choice of that name. Raises ConfigError naming those there are."""
    if name not in COMPENSATIONS:
        raise ConfigError(f"there is no compensation {name!r}", f"use one of {', '.join(COMPENSATIONS)}")
    return COMPENSATIONS[name]


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
        gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean() + 1e-12)
        cholesky_DD = torch.linalg.cholesky(gram_DD)
        white_DT = torch.linalg.solve_triangular(cholesky_DD, x_TD.T, upper=False).mul_(self._root_T)
        return (
            cholesky_DD,
            white_DT,
            x_TD,
        )  # the third is reused by every fit: memory that is new to the process costs as much time as filling it

    def fit(self, residual_TD: Tensor, max_rank: int) -> "Correction":
        """The best linear map of rank up to `max_rank` (plus a constant) from the inputs to `residual_TD`."""
        mean_D = self._share_T @ residual_TD
        if max_rank == 0:
            return Correction(mean_D, self._mean_D, None, None)
        cholesky_DD, white_DT, centred_TD = self._factors
        # Coefficients B = C^-1 X^T R with C = L L^T; the fitted values' principal directions are those of L^T B
        half_DD = white_DT @ torch.sub(residual_TD, mean_D, out=centred_TD)
        basis_DR = top_right_directions(half_DD, max_rank)
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
        return Compensation(self.mean_D - (self.x_mean_D @ w_in_RD.T) @ w_out_RD, w_in_RD=w_in_RD, w_out_RD=w_out_RD)


def top_right_directions(matrix: Tensor, rank: int, iterations: int = 3) -> Tensor:
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
    cost about one FFN: on the CPU by a kernel of its own (float32), elsewhere as products over blocks of at least
    `block_neurons`, which computes more than is left out.
    """

    def __init__(self, weights: ExpertWeights, h_TF: Tensor, block_neurons: int = BLOCK_NEURONS) -> None:
        self._weights, self._h_TF, self._block = weights, h_TF, block_neurons
        self._out_TD = h_TF.new_zeros(len(h_TF), weights.ffn.d_model)
        self._kept_TE = torch.ones(len(h_TF), weights.num_experts, dtype=torch.bool, device=h_TF.device)

    def output(self, keep_TE: Tensor) -> Tensor:
        """[T, D] without the experts that `keep_TE` (bool) leaves out; it may keep none that was left out before.

        The next call changes the result in place.
        """
        drop_TE = self._kept_TE & ~keep_TE
        self._kept_TE = keep_TE
        if self._h_TF.device.type == "cpu" and self._h_TF.dtype == torch.float32:
            add_dropped(drop_TE, self._h_TF, self._weights.ffn.w_down_FD, self._weights.num_shared, self._out_TD)
        else:
            self._add_blocks(drop_TE)
        return self._out_TD

    def _add_blocks(self, drop_TE: Tensor) -> None:
        size, start = self._weights.expert_size, self._weights.num_shared
        together = max(1, self._block // size)
        for drop_TB in drop_TE.split(together, dim=1):
            stop = start + drop_TB.shape[1] * size
            token_S = drop_TB.any(1).nonzero().squeeze(1)
            if len(token_S):
                h_SF = self._h_TF[:, start:stop].index_select(0, token_S)
                if together > 1:
                    h_SF *= drop_TB[token_S].repeat_interleave(size, dim=1)
                w_down_FD = self._weights.ffn.w_down_FD[start:stop]
                self._out_TD.index_add_(0, token_S, h_SF @ w_down_FD)
            start = stop


def fit_compensation(weights: ExpertWeights, keep_TE: Tensor, rank: int, tokens: Tokens) -> Compensation:
    """What stands in for the experts that `keep_TE` (bool) leaves out at these tokens."""
    residual_TD = torch.empty_like(tokens.x_TD)
    for part in token_chunks(len(residual_TD), weights.ffn.num_neurons, _CHUNK_BYTES):
        residual_TD[part] = Dropped(weights, weights.ffn.hidden(tokens.x_TD[part])).output(keep_TE[part])
    return ReducedRank(tokens).fit(residual_TD, rank).compensation(rank)
