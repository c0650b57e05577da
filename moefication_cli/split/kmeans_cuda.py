"""The balanced clustering of `kmeans_cpu` as torch operations, for CUDA: many exchanges at once, on the same objective.

A round computes every row's best partner (an n x n matrix of exact gains, in blocks), then takes the best
exchanges that touch each cluster at most once. Exchanges between different pairs of clusters do not influence each
other's gain, so the inertia falls by exactly the sum. Sums are formed by products with one-hot matrices, not by
atomic additions: the same input gives the same result.

Shapes and formulas: see `kmeans_cpu`. Runs on any device; on a CPU the compiled kernels are faster.
"""

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_BYTES = 256 * 2**20  # of one block of the gain matrix


def grow_clusters(gram_FF: Tensor, num_experts: int, order_F: Tensor, max_rounds: int) -> Tensor:
    """A start on `gram_FF`'s device, as `swaps.grow_clusters`; returns expert_F int64."""
    n = gram_FF.shape[0]
    m = n // num_experts
    if m == 1:
        return torch.empty(n, dtype=torch.int64, device=gram_FF.device).scatter_(
            0, order_F.to(gram_FF.device), torch.arange(n, device=gram_FF.device)
        )
    expert_F = torch.full((n,), -1, dtype=torch.int64, device=gram_FF.device)
    taken_F = torch.zeros(n, dtype=torch.bool, device=gram_FF.device)
    left = order_F.tolist()
    for expert in range(num_experts):
        taken = taken_F.tolist()
        left = [i for i in left if not taken[i]]
        total_F = gram_FF[left[0]]
        for _ in range(max_rounds):
            members_N = total_F.masked_fill(taken_F, -torch.inf).topk(m).indices
            total_F = gram_FF[members_N].sum(0)
        expert_F[members_N] = expert
        taken_F[members_N] = True
    return expert_F


def _ratio(numerator: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 1e-6, numerator / weight.clamp_min(1e-6), 0.0)


class SwapState:
    """Sums over the present assignment; `weights_F` is None for the unweighted objective."""

    def __init__(self, gram_FF: Tensor, expert_F: Tensor, num_experts: int, weights_F: Tensor | None) -> None:
        self.gram_FF, self.expert_F, self.num_experts = gram_FF, expert_F, num_experts
        self.weights_F = torch.ones_like(gram_FF[0]) if weights_F is None else weights_F
        self.unweighted = weights_F is None
        self.square_F = self.weights_F.square() * gram_FF.diagonal()
        self.refresh()

    def refresh(self) -> None:
        one_hot_FE = functional.one_hot(self.expert_F, self.num_experts).to(self.gram_FF.dtype)
        weighted_FE = one_hot_FE * self.weights_F[:, None]
        self.sums_FE = self.gram_FF @ weighted_FE
        self.own_F = self.sums_FE.gather(1, self.expert_F[:, None]).squeeze(1)
        self.mass_E = weighted_FE.sum(0)
        self.within_E = (weighted_FE * self.own_F[:, None]).sum(0)

    def best_partners(self) -> tuple[Tensor, Tensor]:
        """For every row the largest decrease of the inertia by one exchange, and its partner; float32, int64 [F]."""
        n = self.gram_FF.shape[0]
        size = max(1, _BLOCK_BYTES // (4 * n))
        found = [self._block(torch.arange(s, min(s + size, n), device=self.gram_FF.device)) for s in range(0, n, size)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        e_F, w_F, a_B = self.expert_F, self.weights_F, self.expert_F[rows]
        gram_BF = self.gram_FF[rows]
        into_b_BF = self.sums_FE[rows][:, e_F]  # S[b, i] for the partner's cluster b
        into_a_BF = self.sums_FE.t()[a_B]  # S[a, j]
        if self.unweighted:
            net_F = self.own_F - self.square_F
            gain_BF = into_b_BF + into_a_BF - net_F[rows, None] - net_F - 2 * gram_BF
            gain_BF *= 2 * self.num_experts / e_F.numel()
        else:
            w_B1, mass_F = w_F[rows, None], self.mass_E[e_F]
            cross_BF = 2 * w_B1 * w_F * gram_BF
            left_F = self.within_E[e_F] - 2 * w_F * self.own_F + self.square_F
            new_a_BF = left_F[rows, None] + 2 * w_F * into_a_BF - cross_BF + self.square_F
            new_b_BF = left_F + 2 * w_B1 * into_b_BF - cross_BF + self.square_F[rows, None]
            old_F = _ratio(self.within_E, self.mass_E)[e_F]
            gain_BF = _ratio(new_a_BF, mass_F[rows, None] - w_B1 + w_F) + _ratio(new_b_BF, mass_F - w_F + w_B1)
            gain_BF -= old_F[rows, None] + old_F
        gain_BF.masked_fill_(a_B[:, None] == e_F, -torch.inf)
        best = gain_BF.max(dim=1)
        return best.values, best.indices


def _disjoint(gain_F: Tensor, partner_F: Tensor, expert_F: Tensor, tolerance: float) -> list[tuple[int, int]]:
    """The best exchanges (row, partner) of which no two touch the same cluster."""
    rows = (gain_F > tolerance).nonzero().squeeze(1)
    rows = rows[gain_F[rows].argsort(descending=True, stable=True)]
    first, second = expert_F[rows].tolist(), expert_F[partner_F[rows]].tolist()
    used: set[int] = set()
    chosen = []
    for i, j, a, b in zip(rows.tolist(), partner_F[rows].tolist(), first, second, strict=True):
        if a not in used and b not in used:
            used.update((a, b))
            chosen.append((i, j))
    return chosen


def swap_rounds(
    gram_FF: Tensor,
    expert_F: Tensor,
    num_experts: int,
    weights_F: Tensor | None,
    max_rounds: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Exchange rows while the (weighted) inertia falls; returns (expert_F int64, number of exchanges).

    `tolerance` is the smallest decrease of the inertia that is taken. `weights_F` float32 [F], mean 1.
    """
    state = SwapState(gram_FF, expert_F.clone(), num_experts, weights_F)
    swaps = 0
    for _ in range(max_rounds):
        chosen = _disjoint(*state.best_partners(), state.expert_F, tolerance)
        if not chosen:
            break
        i, j = torch.tensor(chosen, device=gram_FF.device).unbind(1)
        state.expert_F[i], state.expert_F[j] = state.expert_F[j], state.expert_F[i]
        state.refresh()
        swaps += len(chosen)
    return state.expert_F, swaps
