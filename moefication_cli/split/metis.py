"""Experts from the co-activation graph: METIS in process, then exact balance, then exchanges that lower the cut.

Source: MoEfication (arXiv 2110.01786), section 3.2 (METIS on the co-activation graph); Karypis and Kumar, "A fast
and high quality multilevel scheme for partitioning irregular graphs", 1998. METIS balances only within a tolerance.
The published repair moves random neurons out of parts that are too large; here the ones that lose least are moved.
Shapes: expert_F int64 [F] over the graph's own neurons (remove shared ones with `graph.subgraph` first).
"""

import numpy as np
import pymetis
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.split.graph import Graph, integer_weights
from moefication_cli.split.graph_kernels import balance_parts
from moefication_cli.split.kmeans_cpu import swap_sweeps
from moefication_cli.split.partition import Partition, check_divides

_REFINE_SWEEPS = 50


def cut_weight(graph: Graph, expert_F: Tensor) -> float:
    """Co-activation weight between different experts: the sum over edges cut, each counted once."""
    cut_M = expert_F[graph.rows_M()] != expert_F[graph.indices_M.long()]
    return float(graph.weights_M[cut_M].double().sum()) / 2


def repair_balance(graph: Graph, expert_F: Tensor, num_experts: int) -> Partition:
    """The exactly balanced partition nearest in lost weight, greedily: see `graph_kernels.balance_parts`.

    `expert_F` int64 [F] with values 0..E-1, parts of any size, empty ones too. A graph without edges makes the
    first neurons move. Raises ConfigError when E does not divide F or a label is out of range.
    """
    n = graph.num_neurons
    check_divides(n, num_experts)
    if expert_F.shape != (n,) or int(expert_F.min()) < 0 or int(expert_F.max()) >= num_experts:
        raise ConfigError(f"part numbers must be {n} values in 0..{num_experts - 1}")
    labels = expert_F.numpy().astype(np.int32)
    csr = graph.indptr_F1.numpy(), graph.indices_M.numpy(), graph.weights_M.numpy()
    balance_parts(*csr, labels, num_experts, n // num_experts)
    return Partition(torch.from_numpy(labels.astype(np.int64)))


def refine(graph: Graph, partition: Partition, seed: int = 0) -> Partition:
    """Exchange pairs of neurons between experts while the cut falls (Kernighan-Lin steps on the unrounded weights).

    Holds a dense float32 [F, F] matrix (485 MB at F = 11008). Never raises the cut.
    """
    n = partition.num_neurons
    if partition.num_experts in (1, n) or graph.num_edges == 0:
        return partition
    dense_FF = torch.zeros(n, n)
    dense_FF[graph.rows_M(), graph.indices_M.long()] = graph.weights_M / graph.weights_M.max()
    strength = float(dense_FF.sum(1).mean())
    labels = partition.expert_F.numpy().astype(np.int32)
    order = np.random.default_rng(seed).permutation(n)
    swap_sweeps(dense_FF.numpy(), labels, partition.num_experts, order, _REFINE_SWEEPS, 2**62, 1e-5 * strength)
    return Partition(torch.from_numpy(labels.astype(np.int64)))


def partition_graph(graph: Graph, num_experts: int, seed: int = 0, refined: bool = True) -> Partition:
    """Split the graph's neurons into `num_experts` equal experts with little co-activation between them.

    METIS (k-way, integer weights scaled from the graph's), `repair_balance`, and with `refined` also `refine`.
    The same graph and seed give the same partition. A graph without edges is split arbitrarily.
    Raises ConfigError when E does not divide F.
    """
    n = graph.num_neurons
    check_divides(n, num_experts)
    if num_experts in (1, n):
        return Partition(torch.arange(n) % num_experts)
    if graph.num_edges == 0:
        return Partition(torch.arange(n) // (n // num_experts))
    adjacency = pymetis.CSRAdjacency(graph.indptr_F1.numpy(), graph.indices_M.numpy().astype(np.int64))
    options = pymetis.Options(seed=seed % 2**31)  # its own tolerance: a tighter one cuts more, and balance is repaired
    result = pymetis.part_graph(
        num_experts, adjacency, eweights=integer_weights(graph).numpy(), recursive=False, options=options
    )
    labels_F = torch.tensor(np.asarray(result.vertex_part), dtype=torch.int64)
    balanced = repair_balance(graph, labels_F, num_experts)
    return refine(graph, balanced, seed) if refined else balanced
