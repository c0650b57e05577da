"""The co-activation graph of one FFN's neurons, in compressed rows (CSR), and its plain METIS text.

Source: MoEfication (arXiv 2110.01786), section 3.2; METIS manual 5.1, section 4.1.1 (graph file format).
Shapes: indptr_F1 int64 [F+1], indices_M int32 [M], weights_M float32 [M]; every edge stands in both of its rows, so
M is twice the number of edges. Building one from activations: `coactivation`; partitioning it: `metis`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.split.graph_kernels import first_asymmetry

_METIS_TOTAL = 2**30  # a gpmetis built with 32-bit integers sums all edge weights without overflow


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected weighted graph of F neurons: symmetric, positive finite weights, no self loops, sorted rows.

    Raises ConfigError when the arrays are not such a graph.
    """

    indptr_F1: Tensor
    indices_M: Tensor
    weights_M: Tensor

    def __post_init__(self) -> None:
        ptr, idx, w = self.indptr_F1, self.indices_M, self.weights_M
        if ptr.dtype != torch.int64 or idx.dtype != torch.int32 or w.dtype != torch.float32:
            raise ConfigError(
                f"a graph has int64 indptr, int32 indices, float32 weights, not {ptr.dtype, idx.dtype, w.dtype}"
            )
        shaped = ptr.dim() == idx.dim() == w.dim() == 1 and ptr.numel() >= 2 and idx.numel() == w.numel()
        if not shaped or int(ptr[0]) != 0 or int(ptr[-1]) != idx.numel() or bool((ptr.diff() < 0).any()):
            raise ConfigError("the row pointers of the graph do not fit its edges", "build the graph again")
        if idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= self.num_neurons):
            raise ConfigError(
                f"an edge of the graph leads outside its {self.num_neurons} neurons", "build the graph again"
            )
        if not bool(torch.isfinite(w).all()) or bool((w <= 0).any()):
            raise ConfigError("edge weights must be positive and finite", "build the graph again")
        row = int(first_asymmetry(ptr.numpy(), idx.numpy(), w.numpy()))
        if row >= 0:
            raise ConfigError(
                f"row {row} of the graph has a self loop, unsorted neighbours or an edge its neighbour lacks",
                "build the graph again",
            )

    @property
    def num_neurons(self) -> int:
        return self.indptr_F1.numel() - 1

    @property
    def num_edges(self) -> int:
        """Undirected edges: half the stored entries."""
        return self.indices_M.numel() // 2

    def rows_M(self) -> Tensor:
        """The row of every stored entry, int64 [M]."""
        return torch.repeat_interleave(torch.arange(self.num_neurons), self.indptr_F1.diff())


def graph_from_edges(row_M: Tensor, col_M: Tensor, weights_M: Tensor, num_neurons: int) -> Graph:
    """The graph of the edges (row, col, weight) given once or in both directions; the first weight given counts.

    Self loops and weights that are not positive are left out. int64 [M], int64 [M], float32 [M].
    """
    keep = (row_M != col_M) & (weights_M > 0)
    row_M, col_M, weights_M = row_M[keep].cpu(), col_M[keep].cpu(), weights_M[keep].cpu()
    key = (torch.minimum(row_M, col_M) * num_neurons + torch.maximum(row_M, col_M)).numpy()
    key, first = np.unique(key, return_index=True)
    w = weights_M.numpy()[first]
    low, high = key // num_neurons, key % num_neurons
    both = np.concatenate([key, high * num_neurons + low])
    order = np.argsort(both, kind="stable")
    both = both[order]
    counts = np.bincount(both // num_neurons, minlength=num_neurons)
    return Graph(
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        torch.from_numpy((both % num_neurons).astype(np.int32)),
        torch.from_numpy(np.concatenate([w, w])[order].astype(np.float32)),
    )


def subgraph(graph: Graph, keep_idx: Tensor) -> Graph:
    """The graph among the neurons `keep_idx` (int64, ascending, distinct), renumbered 0, 1, ... in that order."""
    new_F = torch.full((graph.num_neurons,), -1, dtype=torch.int64)
    new_F[keep_idx] = torch.arange(keep_idx.numel())
    row_M, col_M = new_F[graph.rows_M()], new_F[graph.indices_M.long()]
    inside = (row_M >= 0) & (col_M >= 0)
    counts = torch.bincount(row_M[inside], minlength=keep_idx.numel())
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Graph(ptr, col_M[inside].to(torch.int32), graph.weights_M[inside])


def integer_weights(graph: Graph) -> Tensor:
    """int64 [M] weights >= 1 in proportion to the graph's, as METIS needs: their sum stays near 2**30.

    Scaling by the sum keeps about 30 bits of resolution for the graph as a whole; a truncation of the raw sums (as
    published) turns every weight below 1 into a missing edge.
    """
    if graph.weights_M.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    w = graph.weights_M.double()
    return (w * ((_METIS_TOTAL - w.numel()) / w.sum())).round().long().clamp_min(1)


def to_metis_text(graph: Graph) -> Iterator[str]:
    """The lines (with newlines) of the plain METIS graph file that `gpmetis` reads.

    Header `F edges 001` (edge weights), then one line per neuron: neighbour and weight in turn, neighbours from 1;
    an isolated neuron is an empty line.
    """
    yield f"{graph.num_neurons} {graph.num_edges} 001\n"
    weights = integer_weights(graph).numpy()
    columns = graph.indices_M.numpy().astype(np.int64) + 1
    ptr = graph.indptr_F1.tolist()
    for start, stop in pairwise(ptr):
        pairs = np.stack([columns[start:stop], weights[start:stop]], axis=1).ravel()
        yield " ".join(map(str, pairs.tolist())) + "\n"
