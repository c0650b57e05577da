"""CPU kernels (numba) of the balanced clustering: growing a start, and pairwise swaps on the true objective.

The objective is the within-cluster inertia  sum_i w_i ||x_i - c(i)||^2  with clusters of exactly m rows. Only the
Gram matrix G = X X^T is needed: with W_A = sum_{i,j in A} w_i w_j G_ij and M_A = sum_{i in A} w_i,

    inertia = sum_i w_i G_ii - sum_A W_A / M_A.

With S[A, i] = sum_{j in A} w_j G_ij kept up to date, exchanging i (in A) with j (in B) changes both terms by
something computed in O(1); without weights the inertia falls by

    2/m * [ (S[B,i] - S[A,i] + G_ii) + (S[A,j] - S[B,j] + G_jj) - 2 G_ij ],

the exact change, centroids moving included (an assignment with fixed centroids ignores the last terms). A sweep
offers every row its best partner among all others and takes the exchange when it gains: O(n^2), whatever the width
of X. Own derivation; compare Hartigan's exchange method (Clustering Algorithms, 1975, chapter 4).

Shapes: gram_FF float32 contiguous, expert_F int32, order_F int64 (the order rows are visited in). Kernels hold no
lock (nogil) and share nothing, so restarts run in threads and give the same result for any number of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from moefication_cli.compiled import Kernel, cached_njit

Array = np.ndarray[Any, Any]

_REFRESH_SWEEPS = 8  # sums are recomputed from the Gram matrix after so many sweeps: rounding must not accumulate
_LOWEST = np.float32(-3e38)


def compiled(function: Kernel) -> Kernel:
    """`function` compiled at its first call, kept in numba's cache, running without the interpreter's lock."""
    return cached_njit(Path(__file__).parent, nogil=True)(function)


@compiled
def grow_clusters(gram_FF: Array, num_experts: int, order_F: Array, max_rounds: int) -> Array:
    """A start, cluster by cluster: the m free rows most similar to a seed, then to their own sum, until it settles.

    Seeds are the first free row in `order_F`. Finds planted clusters whole, where plain k-means starts merge some
    and halve others; what is left over at the end is for the swaps. Returns expert_F int32.
    """
    n = gram_FF.shape[0]
    m = n // num_experts
    expert_F = np.full(n, -1, np.int32)
    total_F = np.empty(n, np.float32)
    members = np.empty(m, np.int64)
    at = 0
    for expert in range(num_experts):
        while expert_F[order_F[at]] >= 0:
            at += 1
        free = np.flatnonzero(expert_F < 0)
        if free.shape[0] == m or m == 1:
            members[:] = free[:m]
            if m == 1:
                members[0] = order_F[at]
        else:
            total_F[:] = gram_FF[order_F[at]]
            held = -np.inf
            for _ in range(max_rounds):
                near = free[np.argpartition(-total_F[free], m - 1)[:m]]
                total_F[:] = 0
                for t in near:
                    total_F += gram_FF[t]
                now = 0.0
                for t in near:
                    now += total_F[t]
                if now <= held + 1e-6 * abs(held):
                    break
                held = now
                members[:] = near
        for t in members:
            expert_F[t] = expert
    return expert_F


@compiled
def cluster_sums(gram_FF: Array, weights_F: Array, expert_F: Array, num_experts: int) -> Array:
    """S[A, i] = sum of w_j G_ij over j in A, float32 [E, F]."""
    n = gram_FF.shape[0]
    sums_EF = np.zeros((num_experts, n), np.float32)
    for j in range(n):
        row = sums_EF[expert_F[j]]
        w = weights_F[j]
        for i in range(n):
            row[i] += w * gram_FF[j, i]
    return sums_EF


@compiled
def _members(expert_F: Array, num_experts: int) -> tuple[Array, Array]:
    """The rows of each cluster, int64 [E, N], and every row's place in its list, int64 [F]."""
    n = expert_F.shape[0]
    members_EN = np.empty((num_experts, n // num_experts), np.int64)
    slot_F = np.empty(n, np.int64)
    filled = np.zeros(num_experts, np.int64)
    for i in range(n):
        c = expert_F[i]
        slot_F[i] = filled[c]
        members_EN[c, filled[c]] = i
        filled[c] += 1
    return members_EN, slot_F


@compiled
def swap_sweeps(
    gram_FF: Array, expert_F: Array, num_experts: int, order_F: Array, max_sweeps: int, max_swaps: int, tolerance: float
) -> tuple[int, float]:
    """Swap rows in place while the unweighted inertia falls; stops at a sweep without a swap or at a limit.

    A swap is taken when it lowers the inertia by more than 2 * `tolerance` / m. Returns (number of swaps, sum by
    which the inertia fell).
    """
    n = gram_FF.shape[0]
    m = n // num_experts
    ones_F = np.ones(n, np.float32)
    own_F = np.empty(n, np.float32)  # S[own cluster, i] - G_ii
    to_E = np.empty(num_experts, np.float32)
    sums_EF = cluster_sums(gram_FF, ones_F, expert_F, num_experts)
    scatter = num_experts * 16 > n  # small clusters: a strided column of S misses the cache at every step
    # A pair's gain depends on its two clusters alone: a row found without a gain need only look again at clusters
    # that changed since. The last sweeps, half of all, become cheap.
    members_EN, slot_F = _members(expert_F, num_experts)
    changed_E = np.zeros(num_experts, np.int64)  # number of the last swap that touched the cluster
    seen_F = np.full(n, -1, np.int64)  # number of swaps when the row was last found without a gain
    stale = np.empty(num_experts, np.int64)
    swaps = 0
    gained = 0.0
    for sweep in range(max_sweeps):
        if sweep % _REFRESH_SWEEPS == 0:
            if sweep > 0:
                sums_EF[:] = cluster_sums(gram_FF, ones_F, expert_F, num_experts)
            for i in range(n):
                own_F[i] = sums_EF[expert_F[i], i] - gram_FF[i, i]
        before = swaps
        for i in order_F:
            if swaps >= max_swaps:
                break
            a = expert_F[i]
            gram_i = gram_FF[i]
            sums_a = sums_EF[a]
            num_stale = num_experts
            if changed_E[a] <= seen_F[i]:
                num_stale = 0
                for c in range(num_experts):
                    if changed_E[c] > seen_F[i]:
                        stale[num_stale] = c
                        num_stale += 1
            best = _LOWEST
            j = -1
            if num_stale * 3 < num_experts:
                for c in stale[:num_stale]:
                    into = sums_EF[c, i]
                    for t in members_EN[c]:
                        value = into + sums_a[t] - own_F[t] - np.float32(2) * gram_i[t]
                        if value > best:
                            best = value
                            j = t
            else:
                if scatter:
                    to_E[:] = 0
                    for t in range(n):
                        to_E[expert_F[t]] += gram_i[t]
                else:
                    for c in range(num_experts):
                        to_E[c] = sums_EF[c, i]
                to_E[a] = _LOWEST
                for t in range(n):
                    value = to_E[expert_F[t]] + sums_a[t] - own_F[t] - np.float32(2) * gram_i[t]
                    if value > best:
                        best = value
                        j = t
            gain = np.float64(best) - np.float64(own_F[i])
            if not gain > tolerance:
                seen_F[i] = swaps
                continue
            b = expert_F[j]
            gram_j = gram_FF[j]
            sums_b = sums_EF[b]
            for t in range(n):
                change = gram_j[t] - gram_i[t]
                sums_a[t] += change
                sums_b[t] -= change
                if expert_F[t] == a:
                    own_F[t] += change
                elif expert_F[t] == b:
                    own_F[t] -= change
            expert_F[i] = b
            expert_F[j] = a
            own_F[i] = sums_b[i] - gram_FF[i, i]
            own_F[j] = sums_a[j] - gram_FF[j, j]
            members_EN[a, slot_F[i]] = j
            members_EN[b, slot_F[j]] = i
            slot_F[i], slot_F[j] = slot_F[j], slot_F[i]
            swaps += 1
            changed_E[a] = swaps
            changed_E[b] = swaps
            gained += 2.0 * gain / m
        if swaps == before or swaps >= max_swaps:
            break
    return swaps, gained


@compiled
def _ratio(numerator: float, weight: float) -> float:
    return numerator / weight if weight > 1e-9 else 0.0  # weights have mean 1; below this only rounding is left


@compiled
def weighted_swap_sweeps(
    gram_FF: Array,
    weights_F: Array,
    expert_F: Array,
    num_experts: int,
    order_F: Array,
    max_sweeps: int,
    max_swaps: int,
    tolerance: float,
) -> tuple[int, float]:
    """`swap_sweeps` for rows of different weight (float32 [F], not negative, mean 1): both parts of W_A / M_A change.

    A swap is taken when it lowers the weighted inertia by more than `tolerance`. Returns (number of swaps, sum by
    which the weighted inertia fell).
    """
    n = gram_FF.shape[0]
    sums_EF = cluster_sums(gram_FF, weights_F, expert_F, num_experts)
    own_F = np.empty(n, np.float32)  # S[own cluster, i]
    to_E = np.empty(num_experts, np.float32)
    within_E = np.zeros(num_experts, np.float64)
    mass_E = np.zeros(num_experts, np.float64)
    square_F = np.empty(n, np.float64)  # w_i^2 G_ii: what row i adds to W by itself
    for i in range(n):
        square_F[i] = np.float64(weights_F[i]) * weights_F[i] * gram_FF[i, i]
    swaps = 0
    gained = 0.0
    for sweep in range(max_sweeps):
        if sweep % _REFRESH_SWEEPS == 0:
            if sweep > 0:
                sums_EF[:] = cluster_sums(gram_FF, weights_F, expert_F, num_experts)
            within_E[:] = 0
            mass_E[:] = 0
            for i in range(n):
                own_F[i] = sums_EF[expert_F[i], i]
                within_E[expert_F[i]] += np.float64(weights_F[i]) * own_F[i]
                mass_E[expert_F[i]] += weights_F[i]
        before = swaps
        for i in order_F:
            if swaps >= max_swaps:
                break
            a = expert_F[i]
            wi = np.float64(weights_F[i])
            gram_i = gram_FF[i]
            sums_a = sums_EF[a]
            for c in range(num_experts):
                to_E[c] = sums_EF[c, i]
            left_a = within_E[a] - 2.0 * wi * own_F[i] + square_F[i]
            old_a = _ratio(within_E[a], mass_E[a])
            best = 0.0
            j = -1
            best_a = 0.0
            best_b = 0.0
            for t in range(n):
                b = expert_F[t]
                if b == a:
                    continue
                wt = np.float64(weights_F[t])
                cross = 2.0 * wi * wt * gram_i[t]
                new_a = left_a + 2.0 * wt * sums_a[t] - cross + square_F[t]
                new_b = within_E[b] - 2.0 * wt * own_F[t] + square_F[t] + 2.0 * wi * to_E[b] - cross + square_F[i]
                gain = _ratio(new_a, mass_E[a] - wi + wt) + _ratio(new_b, mass_E[b] - wt + wi)
                gain -= old_a + _ratio(within_E[b], mass_E[b])
                if gain > best:
                    best = gain
                    j = t
                    best_a = new_a
                    best_b = new_b
            if not best > tolerance:
                continue
            b = expert_F[j]
            sums_b = sums_EF[b]
            gram_j = gram_FF[j]
            for t in range(n):
                change = weights_F[j] * gram_j[t] - weights_F[i] * gram_i[t]
                sums_a[t] += change
                sums_b[t] -= change
                if expert_F[t] == a:
                    own_F[t] += change
                elif expert_F[t] == b:
                    own_F[t] -= change
            expert_F[i] = b
            expert_F[j] = a
            own_F[i] = sums_b[i]
            own_F[j] = sums_a[j]
            within_E[a] = best_a
            within_E[b] = best_b
            mass_E[a] += np.float64(weights_F[j]) - wi
            mass_E[b] += wi - np.float64(weights_F[j])
            swaps += 1
            gained += best
        if swaps == before or swaps >= max_swaps:
            break
    return swaps, gained
