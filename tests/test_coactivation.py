"""The co-activation graph against a naive outer product, its METIS text, and experts cut from it."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.split import metis
from moefication_cli.split.coactivation import coactivation_graph
from moefication_cli.split.graph import Graph, graph_from_edges, integer_weights, subgraph, to_metis_text
from moefication_cli.split.metis import cut_weight, partition_graph, refine, repair_balance
from moefication_cli.split.partition import Partition, random_partition

F = 24


def hidden(tokens=60, neurons=F, seed=0):
    """ReLU-like activations, a few dead neurons among them."""
    h_TF = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(seed)) - 0.3
    h_TF[:, ::7] = -1.0
    return h_TF


def naive(h_TF, kind="sum"):
    """Outer products token by token, as the paper writes it."""
    total = np.zeros((h_TF.shape[1],) * 2)
    for h in h_TF.double().numpy():
        for n in range(len(h)):
            for m in range(len(h)):
                if n != m and h[n] > 0 and h[m] > 0:
                    total[n, m] += h[n] * h[m] if kind == "sum" else 1
    return total


def dense(graph):
    matrix = torch.zeros(graph.num_neurons, graph.num_neurons, dtype=torch.float64)
    matrix[graph.rows_M(), graph.indices_M.long()] = graph.weights_M.double()
    return matrix.numpy()


def blocks(num_experts=6, size=4, noise=0.05, seed=0):
    """A graph with dense planted groups in shuffled order, and which group each neuron is in."""
    g = torch.Generator().manual_seed(seed)
    n = num_experts * size
    truth_F = torch.randperm(n, generator=g) % num_experts
    w = torch.rand(n, n, generator=g) * noise + (truth_F[:, None] == truth_F).float()
    row, col = torch.triu_indices(n, n, offset=1)
    return graph_from_edges(row, col, w[row, col], n), truth_F


def empty(n):
    nothing = torch.empty(0, dtype=torch.int64)
    return graph_from_edges(nothing, nothing, torch.empty(0), n)


def same_clusters(a_F, b_F):
    return bool(((a_F[:, None] == a_F) == (b_F[:, None] == b_F)).all())


# --- accumulation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sum", "count"])
@pytest.mark.parametrize("panel_rows", [F, 7, 1])
@pytest.mark.parametrize("chunk", [60, 13])
def test_all_edges_equal_the_naive_outer_products(kind, panel_rows, chunk):
    h_TF = hidden()
    graph = coactivation_graph(lambda: h_TF.split(chunk), F, kind=kind, max_bytes=4 * F * panel_rows)
    assert np.allclose(dense(graph), naive(h_TF, kind), rtol=1e-5)
    assert not np.allclose(dense(graph), naive(h_TF.abs(), kind), rtol=1e-2)  # the comparison can fail


@pytest.mark.parametrize("panel_rows", [F, 5])
def test_the_blocks_of_wide_layers_are_put_together(monkeypatch, panel_rows):
    monkeypatch.setattr("moefication_cli.split.coactivation.BLOCK_ROWS", 5)
    monkeypatch.setattr("moefication_cli.split.coactivation.TOPK_ROWS", 4)
    h_TF = hidden(seed=1)
    graph = coactivation_graph(lambda: [h_TF], F, max_bytes=4 * F * panel_rows)
    assert np.allclose(dense(graph), naive(h_TF), rtol=1e-5)


@pytest.mark.parametrize("panel_rows", [F, 5])
def test_strongest_neighbours_are_kept_from_either_end(panel_rows):
    h_TF = hidden(seed=2)
    full = naive(h_TF)
    graph = coactivation_graph(lambda: [h_TF], F, neighbours=3, max_bytes=4 * F * panel_rows)
    keep = np.zeros_like(full, dtype=bool)
    for n in range(F):
        keep[n, np.argsort(-full[n])[:3]] = True
    keep = (keep | keep.T) & (full > 0)
    assert np.array_equal(dense(graph) > 0, keep)
    assert np.allclose(dense(graph), np.where(keep, full, 0), rtol=1e-5)
    every = coactivation_graph(lambda: [h_TF], F, neighbours=10_000)
    assert np.allclose(dense(every), full, rtol=1e-5)


def test_bfloat16_stays_within_its_rounding():
    h_TF = hidden(seed=3)
    graph = coactivation_graph(lambda: h_TF.split(20), F, dtype=torch.bfloat16)
    assert np.allclose(dense(graph), naive(h_TF), rtol=2e-2)
    counts = coactivation_graph(lambda: [hidden(2000, seed=4)], F, kind="count", dtype=torch.bfloat16)
    assert np.array_equal(dense(counts), naive(hidden(2000, seed=4), "count"))


def test_no_tokens_or_dead_neurons_make_an_empty_graph():
    for chunks in (list, lambda: [torch.zeros(5, F)], lambda: [torch.zeros(0, F)], lambda: [-hidden().abs()]):
        assert coactivation_graph(chunks, F).num_edges == 0
        assert coactivation_graph(chunks, F, neighbours=2).num_edges == 0
    assert coactivation_graph(lambda: [torch.ones(3, 1)], 1).num_neurons == 1


def test_bad_activations_and_options_are_named():
    with pytest.raises(ConfigError, match=r"\(60, 24\), not \[T, 25\]"):
        coactivation_graph(lambda: [hidden()], 25)
    for value in (float("nan"), float("inf")):
        h_TF = hidden()
        h_TF[4, 5] = value
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            coactivation_graph(lambda h_TF=h_TF: [h_TF], F)
    with pytest.raises(NonFiniteError, match="overflow"):
        coactivation_graph(lambda: [hidden() * 1e30], F)
    with pytest.raises(ConfigError, match="neighbours"):
        coactivation_graph(lambda: [hidden()], F, neighbours=0)
    with pytest.raises(ConfigError, match="median"):
        coactivation_graph(lambda: [hidden()], F, kind="median")


# --- graphs and METIS text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ptr", "idx", "weights", "words"),
    [
        ([0, 1, 2], [1, 0], [1.0, 2.0], "row 0"),  # weights differ
        ([0, 1, 1], [1], [1.0], "row 0"),  # one direction only
        ([0, 1, 2], [0, 1], [1.0, 1.0], "row 0"),  # self loops
        ([0, 2, 3, 4], [2, 1, 0, 0], [1.0] * 4, "row 0"),  # unsorted
        ([0, 1, 2], [1, 2], [1.0, 1.0], "leads outside"),
        ([0, 1, 2], [1, -1], [1.0, 1.0], "leads outside"),
        ([0, 1, 3], [1, 0], [1.0, 1.0], "row pointers"),
        ([0, 2, 1, 2], [1, 0], [1.0, 1.0], "row pointers"),
        ([0, 1, 2], [1, 0], [0.0, 0.0], "positive"),
        ([0, 1, 2], [1, 0], [float("nan")] * 2, "positive"),
    ],
)
def test_what_is_not_an_undirected_graph_is_refused(ptr, idx, weights, words):
    with pytest.raises(ConfigError, match=words):
        Graph(torch.tensor(ptr), torch.tensor(idx, dtype=torch.int32), torch.tensor(weights))


def test_metis_text_reads_back():
    graph = coactivation_graph(lambda: [hidden()], F)
    lines = list(to_metis_text(graph))
    n, edges, fmt = lines[0].split()
    assert (int(n), int(edges), fmt) == (F, graph.num_edges, "001")
    assert len(lines) == F + 1
    assert lines[1] == "\n"  # neuron 0 is dead: an empty line, not a missing one
    read = np.zeros((F, F))
    for row, line in enumerate(lines[1:]):
        numbers = [int(word) for word in line.split()]
        for col, weight in zip(numbers[::2], numbers[1::2], strict=True):
            assert weight >= 1
            read[row, col - 1] = weight
    assert np.array_equal(read, read.T)
    assert read.sum() < 2**31
    assert np.allclose(read / read.sum(), dense(graph) / dense(graph).sum(), atol=1e-8)


def test_integer_weights_keep_small_weights_as_edges():
    graph = graph_from_edges(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([1e-20, 1e10]), 3)
    assert integer_weights(graph).tolist()[0] == 1
    assert integer_weights(empty(3)).numel() == 0


def test_subgraph_drops_shared_neurons():
    graph = coactivation_graph(lambda: [hidden()], F)
    keep = torch.tensor([1, 2, 5, 9, 20])
    assert np.array_equal(dense(subgraph(graph, keep)), dense(graph)[np.ix_(keep, keep)])


# --- experts ----------------------------------------------------------------------------------------------------


def test_planted_groups_come_back_without_warnings():
    graph, truth_F = blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition = partition_graph(graph, 6, seed=1)
    assert same_clusters(partition.expert_F, truth_F)
    assert cut_weight(graph, partition.expert_F) < cut_weight(graph, random_partition(24, 6, 0).expert_F)
    assert torch.equal(partition.expert_F, partition_graph(graph, 6, seed=1).expert_F)


def test_cut_weight_counts_every_edge_once():
    graph = graph_from_edges(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 4.0]), 4)
    assert cut_weight(graph, torch.tensor([0, 0, 1, 1])) == 2.0
    assert cut_weight(graph, torch.tensor([0, 1, 0, 1])) == 7.0
    assert cut_weight(graph, torch.tensor([0, 0, 0, 0])) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.booleans(), st.integers(0, 1000))
def test_any_graph_and_any_parts_are_split_exactly(num_experts, size, density, refined, seed):
    """Isolated neurons, no edges at all, one expert, one neuron per expert, empty and overfull parts."""
    n = num_experts * size
    g = torch.Generator().manual_seed(seed)
    row, col = torch.triu_indices(n, n, offset=1)
    w = torch.rand(row.numel(), generator=g) * (torch.rand(row.numel(), generator=g) < density)
    graph = graph_from_edges(row, col, w * 10.0 ** int(torch.randint(-20, 20, (), generator=g)), n)
    partition = partition_graph(graph, num_experts, seed=seed, refined=refined)
    assert (partition.num_experts, partition.expert_size, partition.num_shared) == (num_experts, size, 0)
    used = int(torch.randint(1, num_experts + 1, (), generator=g))
    labels_F = torch.randint(0, used, (n,), generator=g)
    repaired = repair_balance(graph, labels_F, num_experts)
    assert (repaired.num_experts, repaired.expert_size) == (num_experts, size)
    better = refine(graph, repaired, seed)
    assert cut_weight(graph, better.expert_F) <= cut_weight(graph, repaired.expert_F) * (1 + 1e-6)


def test_repair_moves_the_neuron_that_loses_least():
    # part 0 is one too large; neuron 3 hangs on it by a thread and has a friend in part 1
    edges = [(0, 1, 5.0), (0, 2, 5.0), (1, 2, 5.0), (2, 3, 1.0), (3, 4, 0.5), (4, 5, 3.0)]
    row, col, w = (torch.tensor(c) for c in zip(*edges, strict=True))
    graph = graph_from_edges(row, col, w, 6)
    assert repair_balance(graph, torch.tensor([0, 0, 0, 0, 1, 1]), 2).expert_F.tolist() == [0, 0, 0, 1, 1, 1]
    balanced = torch.tensor([0, 1, 0, 1, 0, 1])
    assert torch.equal(repair_balance(graph, balanced, 2).expert_F, balanced)


def test_repair_follows_links_as_they_change():
    """Checked against a slow repair that computes every loss anew for every move."""
    for seed in range(5):
        graph, _ = blocks(5, 4, noise=1.0, seed=seed)
        labels_F = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(seed))
        matrix, slow = dense(graph), labels_F.numpy().copy()
        while (sizes := np.bincount(slow, minlength=5)).max() > 4:
            moves = [
                (matrix[i][slow == slow[i]].sum() - matrix[i][slow == c].sum(), i, c)
                for i in range(20)
                if sizes[slow[i]] > 4
                for c in range(5)
                if sizes[c] < 4
            ]
            _, i, c = min(moves)
            slow[i] = c
        assert repair_balance(graph, labels_F, 5).expert_F.tolist() == slow.tolist()


def test_unbalanced_and_empty_parts_from_metis_are_repaired(monkeypatch):
    graph, _ = blocks()

    class Lopsided:
        edge_cuts = 0
        vertex_part = [0] * 23 + [5]

    monkeypatch.setattr(metis.pymetis, "part_graph", lambda *args, **kwargs: Lopsided)
    assert partition_graph(graph, 6, refined=False).expert_size == 4


def test_refinement_lowers_the_cut():
    graph = coactivation_graph(lambda: [hidden(200, 96, seed=5)], 96, neighbours=12)
    start = random_partition(96, 8, 0)
    better = refine(graph, start)
    assert cut_weight(graph, better.expert_F) < 0.9 * cut_weight(graph, start.expert_F)
    by_metis = partition_graph(graph, 8, refined=False)
    assert cut_weight(graph, partition_graph(graph, 8).expert_F) <= cut_weight(graph, by_metis.expert_F)


def test_counts_that_do_not_divide_and_wrong_labels():
    graph, _ = blocks()
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 8, 12, 24"):
        partition_graph(graph, 5)
    for labels in (torch.zeros(23, dtype=torch.int64), torch.full((24,), 6), torch.full((24,), -1)):
        with pytest.raises(ConfigError, match="part numbers"):
            repair_balance(graph, labels, 6)
    assert Partition(repair_balance(empty(24), torch.zeros(24, dtype=torch.int64), 6).expert_F).expert_size == 4
