"""CPU kernels (numba) on CSR graphs: the symmetry check and the balance repair. Shapes as in `graph`."""

from typing import Any

import numpy as np

from moefication_cli.split.kmeans_cpu import compiled

Array = np.ndarray[Any, Any]


@compiled
def first_asymmetry(indptr_F1: Array, indices_M: Array, weights_M: Array) -> int:
    """The first row that is unsorted, has a self loop, or an edge its neighbour lacks or weighs otherwise; else -1.

    One pass: walking the rows in order meets the entries of every column in order, too.
    """
    n = indptr_F1.shape[0] - 1
    at = indptr_F1[:-1].copy()
    for i in range(n):
        for e in range(indptr_F1[i], indptr_F1[i + 1]):
            j = indices_M[e]
            if j == i or (e > indptr_F1[i] and indices_M[e - 1] >= j):
                return i
            if at[j] >= indptr_F1[j + 1] or indices_M[at[j]] != i or weights_M[at[j]] != weights_M[e]:
                return i
            at[j] += 1
    return -1


@compiled
def balance_parts(
    indptr_F1: Array, indices_M: Array, weights_M: Array, expert_F: Array, num_experts: int, size: int
) -> int:
    """Move neurons in place from parts above `size` to parts below until all are exactly `size`; returns the moves.

    Each move is the one that loses least co-activation weight inside parts: links to its own part less links to the
    part it goes to; ties by neuron, then part, in order. O(F + edges of the moved neuron) a move.
    """
    n = expert_F.shape[0]
    links_FE = np.zeros((n, num_experts), np.float32)
    sizes_E = np.zeros(num_experts, np.int64)
    for i in range(n):
        sizes_E[expert_F[i]] += 1
        for e in range(indptr_F1[i], indptr_F1[i + 1]):
            links_FE[i, expert_F[indices_M[e]]] += weights_M[e]
    target_F = np.full(n, -1, np.int64)  # the part with room that a neuron is linked to most; -1: look again
    moves = 0
    while True:
        chosen = -1
        least = np.inf
        for i in range(n):
            if sizes_E[expert_F[i]] <= size:
                continue
            if target_F[i] < 0:
                best = np.float32(-np.inf)  # rounding may leave less than 0
                for c in range(num_experts):
                    if sizes_E[c] < size and links_FE[i, c] > best:
                        best = links_FE[i, c]
                        target_F[i] = c
            loss = np.float64(links_FE[i, expert_F[i]]) - np.float64(links_FE[i, target_F[i]])
            if loss < least:
                least = loss
                chosen = i
        if chosen < 0:
            return moves
        a = expert_F[chosen]
        b = target_F[chosen]
        expert_F[chosen] = b
        sizes_E[a] -= 1
        sizes_E[b] += 1
        moves += 1
        for e in range(indptr_F1[chosen], indptr_F1[chosen + 1]):
            t = indices_M[e]
            links_FE[t, a] -= weights_M[e]
            links_FE[t, b] += weights_M[e]
            if target_F[t] >= 0 and links_FE[t, b] > links_FE[t, target_F[t]]:
                target_F[t] = b
        if sizes_E[b] == size:
            for t in range(n):
                if target_F[t] == b:
                    target_F[t] = -1


@compiled
def adopt_lower_weights(indptr_F1: Array, indices_M: Array, weights_M: Array) -> None:
    """Give entry (m, n) the weight of (n, m) where n < m, in place; the pattern is symmetric and rows are sorted.

    A pattern that is not symmetric is left for `first_asymmetry` to find.
    """
    n = indptr_F1.shape[0] - 1
    at = indptr_F1[:-1].copy()
    for i in range(n):
        for e in range(indptr_F1[i], indptr_F1[i + 1]):
            j = indices_M[e]
            if at[j] >= indptr_F1[j + 1]:
                return
            if i < j:
                weights_M[at[j]] = weights_M[e]
            at[j] += 1
