"""Partitions and balanced k-means: exact balance whatever comes in, swaps that gain what they say, planted truth."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.split import kmeans, kmeans_cpu, kmeans_cuda
from moefication_cli.split.kmeans import balanced_kmeans, constrained_kmeans, inertia, normalised_rows
from moefication_cli.split.partition import (
    Partition,
    check_divides,
    divisors,
    random_partition,
    with_shared,
)
from moefication_cli.split.profiles import neuron_sums


def planted(num_rows=192, width=48, num_experts=12, spread=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth_F = torch.randperm(num_rows, generator=g) % num_experts
    centres = torch.randn(num_experts, width, generator=g) * spread
    return centres[truth_F] + torch.randn(num_rows, width, generator=g), truth_F


def naive_inertia(x_FD, expert_F, weights_F=None):
    """Cluster by cluster, in numpy float64: slow and obvious."""
    x = x_FD.double().numpy()
    w = np.ones(len(x)) if weights_F is None else weights_F.double().numpy()
    total = 0.0
    for expert in np.unique(expert_F.numpy()):
        rows = np.flatnonzero(expert_F.numpy() == expert)
        if w[rows].sum() == 0:
            continue
        centre = (w[rows, None] * x[rows]).sum(0) / w[rows].sum()
        total += sum(w[r] * ((x[r] - centre) ** 2).sum() for r in rows)
    return total


def same_clusters(a_F, b_F):
    return bool(((a_F[:, None] == a_F) == (b_F[:, None] == b_F)).all())


# --- partitions -------------------------------------------------------------------------------------------------


def test_order_puts_shared_first_then_experts_and_keeps_order_within():
    partition = Partition(torch.tensor([1, -1, 0, 1, -1, 0]))
    assert partition.order_F().tolist() == [1, 4, 2, 5, 0, 3]
    assert (partition.num_experts, partition.num_shared, partition.expert_size, partition.num_neurons) == (2, 2, 2, 6)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 0, 1], "equally large"),
        ([0, 2], "equally large"),
        ([-1, -1], "at least one expert"),
        ([], "at least one expert"),
        ([0, -2], "-2"),
    ],
)
def test_a_partition_that_is_not_balanced_is_refused(labels, words):
    with pytest.raises(ConfigError, match=words):
        Partition(torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64)])
def test_a_partition_is_one_row_of_integers(bad):
    with pytest.raises(ConfigError, match="one-dimensional integer"):
        Partition(bad)


def test_check_divides_lists_what_would_divide():
    assert divisors(172) == [1, 2, 4, 43, 86, 172]
    check_divides(172, 43)
    check_divides(180, 43, num_shared=8)
    with pytest.raises(ConfigError, match=r"1, 2, 4, 43, 86, 172"):
        check_divides(172, 5)
    with pytest.raises(ConfigError, match=r"168 neurons beside 4 shared .*: 1, 2, 3, 4, 6, 7"):
        check_divides(172, 5, num_shared=4)
    for count in (0, -4):
        with pytest.raises(ConfigError):
            check_divides(172, count)
    with pytest.raises(ConfigError, match="leave none"):
        check_divides(8, 2, num_shared=8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 9), st.integers(0, 2**31))
def test_random_partition_is_balanced_seeded_and_respects_shared(num_experts, size, num_shared, seed):
    num_neurons = num_experts * size + num_shared
    shared_F = torch.zeros(num_neurons, dtype=torch.bool)
    shared_F[torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))[:num_shared]] = True
    partition = random_partition(num_neurons, num_experts, seed, shared_F)
    assert torch.equal(partition.expert_F < 0, shared_F)
    assert torch.bincount(partition.expert_F[~shared_F]).tolist() == [size] * num_experts
    assert torch.equal(partition.expert_F, random_partition(num_neurons, num_experts, seed, shared_F).expert_F)
    assert torch.equal(partition.order_F().sort().values, torch.arange(num_neurons))


def test_random_partition_is_random():
    first, second = random_partition(96, 8, 0).expert_F, random_partition(96, 8, 1).expert_F
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(96) // 12)  # the published "random" split is contiguous


def test_with_shared_numbers_the_rest_in_order():
    partition = with_shared(Partition(torch.tensor([1, 0, 1, 0])), torch.tensor([4, 1]), 6)
    assert partition.expert_F.tolist() == [1, -1, 0, 1, -1, 0]
    for shared in ([1, 1], [1, 6], [-1, 2], [1]):
        with pytest.raises(ConfigError):
            with_shared(Partition(torch.tensor([1, 0, 1, 0])), torch.tensor(shared), 6)


# --- balanced k-means -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10),
    st.integers(1, 7),
    st.integers(1, 6),
    st.sampled_from(["normal", "zeros", "duplicates", "huge", "tiny", "one far row"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_balance_is_exact_and_the_inertia_is_its_own(num_experts, size, width, rows, weighted, seed):
    g = torch.Generator().manual_seed(seed)
    n = num_experts * size
    x = torch.randn(n, width, generator=g)
    if rows == "zeros":
        x[torch.rand(n, generator=g) < 0.7] = 0
    elif rows == "duplicates":
        x = x[torch.randint(0, max(1, n // 3), (n,), generator=g)]
    elif rows == "huge":
        x = x * 1e25
    elif rows == "tiny":
        x = x * 1e-25
    elif rows == "one far row":
        x[0] *= 1e4
    w = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.7) if weighted else None
    result = balanced_kmeans(x, num_experts, seed=seed, restarts=2, weights_F=w, num_threads=1)
    assert Partition(result.expert_F).expert_size == size
    assert result.expert_F.dtype == torch.int64
    assert result.inertia == pytest.approx(naive_inertia(x, result.expert_F, w), rel=1e-6, abs=1e-60)
    assert result.inertia == min(result.restarts_inertia)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_swap_gains_what_it_says_and_the_objective_never_increases(weighted):
    x = torch.randn(96, 20, generator=torch.Generator().manual_seed(1))
    w = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else torch.ones(96)
    w = w / w.mean()
    gram_FF, scale = kmeans.gram(x)
    order = np.random.default_rng(0).permutation(96)
    labels = (order.argsort() % 8).astype(np.int32)
    now = naive_inertia(x, torch.from_numpy(labels), w)
    steps = 0
    while steps < 10_000:
        if weighted:
            args = gram_FF.numpy(), w.numpy(), labels, 8, order, 1, 1, 1e-6
            count, gain = kmeans_cpu.weighted_swap_sweeps(*args)
        else:
            count, gain = kmeans_cpu.swap_sweeps(gram_FF.numpy(), labels, 8, order, 1, 1, 1e-6)
        if count == 0:
            break
        after = naive_inertia(x, torch.from_numpy(labels), w)
        assert after < now
        assert now - after == pytest.approx(gain * scale**2, rel=1e-3, abs=1e-4)
        now = after
        steps += 1
    assert steps > 20
    # where it stops, no exchange of two rows helps
    for i in range(0, 96, 5):
        for j in range(96):
            trial = labels.copy()
            trial[[i, j]] = trial[[j, i]]
            assert naive_inertia(x, torch.from_numpy(trial), w) > now - 1e-3


def test_long_runs_claim_the_gain_that_is_recomputed():
    """Sums kept up to date over thousands of swaps, and rows skipped because nothing near them changed."""
    x = normalised_rows(torch.randn(640, 24, generator=torch.Generator().manual_seed(3)))
    gram_FF, scale = kmeans.gram(x)
    order = np.random.default_rng(0).permutation(640)
    for num_experts in (5, 160):  # columns of the sums read directly, and small clusters
        labels = (order.argsort() % num_experts).astype(np.int32)
        before = inertia(x, torch.from_numpy(labels).long(), num_experts)
        count, gain = kmeans_cpu.swap_sweeps(gram_FF.numpy(), labels, num_experts, order, 200, 2**62, 1e-5)
        after = inertia(x, torch.from_numpy(labels).long(), num_experts)
        assert count > 300
        assert before - after == pytest.approx(gain * scale**2, rel=1e-4)
        again, _ = kmeans_cpu.swap_sweeps(gram_FF.numpy(), labels, num_experts, order, 200, 2**62, 1e-5)
        assert again == 0  # skipping rows did not hide a swap


def test_long_weighted_runs_claim_the_gain_that_is_recomputed():
    x = torch.randn(320, 24, generator=torch.Generator().manual_seed(3))
    w = torch.rand(320, generator=torch.Generator().manual_seed(4)) + 0.05
    w = w / w.mean()
    gram_FF, scale = kmeans.gram(x)
    order = np.random.default_rng(0).permutation(320)
    labels = (order.argsort() % 40).astype(np.int32)
    before = naive_inertia(x, torch.from_numpy(labels), w)
    args = gram_FF.numpy(), w.numpy(), labels, 40, order, 200, 2**62, 1e-6
    count, gain = kmeans_cpu.weighted_swap_sweeps(*args)
    after = naive_inertia(x, torch.from_numpy(labels), w)
    assert count > 150
    assert before - after == pytest.approx(gain * scale**2, rel=1e-4)


@pytest.mark.parametrize("num_experts", [4, 12, 48])
def test_planted_clusters_are_recovered(num_experts):
    x, truth_F = planted(num_experts=num_experts)
    result = balanced_kmeans(x, num_experts, seed=0, restarts=2)
    assert same_clusters(result.expert_F, truth_F)
    shuffled = truth_F[torch.randperm(len(truth_F), generator=torch.Generator().manual_seed(0))]
    assert not same_clusters(result.expert_F, shuffled)  # the check can fail


@pytest.mark.parametrize("size", [4, 32])
def test_lower_than_the_reference(size):
    x = normalised_rows(torch.randn(256, 32, generator=torch.Generator().manual_seed(5)))
    reference = constrained_kmeans(x, 256 // size, n_init=3)
    assert Partition(reference.expert_F).expert_size == size
    assert reference.inertia == pytest.approx(naive_inertia(x, reference.expert_F))
    assert balanced_kmeans(x, 256 // size, restarts=2).inertia < reference.inertia


def test_trained_weights_are_never_above_the_reference(shared_dir):
    from safetensors import safe_open

    with safe_open(shared_dir / "models" / "llama-stories260k" / "model.safetensors", "pt") as file:
        for layer in range(0, 5, 2):
            x = normalised_rows(file.get_tensor(f"model.layers.{layer}.mlp.gate_proj.weight"))
            for num_experts in (43, 4):
                ours, reference = balanced_kmeans(x, num_experts), constrained_kmeans(x, num_experts)
                assert ours.inertia < reference.inertia


def test_the_same_seed_gives_the_same_split_for_any_number_of_threads():
    x = normalised_rows(torch.randn(240, 24, generator=torch.Generator().manual_seed(7)))
    first = balanced_kmeans(x, 12, seed=3, restarts=3, num_threads=1)
    threaded = balanced_kmeans(x, 12, seed=3, restarts=3, num_threads=3)
    other = balanced_kmeans(x, 12, seed=4, restarts=3, num_threads=1)
    assert torch.equal(first.expert_F, threaded.expert_F)
    assert first.restarts_inertia == threaded.restarts_inertia
    assert first.restarts_inertia != other.restarts_inertia


def test_a_warm_start_keeps_the_better_of_warm_and_cold():
    x = normalised_rows(torch.randn(240, 24, generator=torch.Generator().manual_seed(8)))
    best = balanced_kmeans(x, 12, seed=0, restarts=24)
    warm = balanced_kmeans(x, 12, seed=99, restarts=1, init_F=best.expert_F)
    assert len(warm.restarts_inertia) == 2
    assert warm.restarts_inertia[1] == pytest.approx(best.inertia)
    assert warm.inertia == min(warm.restarts_inertia) < warm.restarts_inertia[0]
    bad = balanced_kmeans(x, 12, seed=0, restarts=24, init_F=random_partition(240, 12, 0).expert_F)
    assert bad.inertia <= best.inertia


def test_weights_pull_clusters_towards_heavy_rows():
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(9))
    w = torch.where(torch.arange(128) < 32, 20.0, 0.1)
    plain, weighted = balanced_kmeans(x, 8, seed=0), balanced_kmeans(x, 8, seed=0, weights_F=w)
    assert weighted.inertia < 0.9 * inertia(x, plain.expert_F, 8, w)
    even = balanced_kmeans(x, 8, seed=0, weights_F=torch.full((128,), 3.0))
    assert even.inertia == pytest.approx(3 * plain.inertia, rel=0.01)


def test_one_expert_and_one_neuron_per_expert():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert balanced_kmeans(x, 1).inertia == pytest.approx(naive_inertia(x, torch.zeros(12, dtype=torch.int64)))
    single = balanced_kmeans(x, 12)
    assert single.expert_F.sort().values.tolist() == list(range(12))
    assert single.inertia == 0.0


def test_progress_is_told_after_every_start():
    seen = []
    balanced_kmeans(
        torch.randn(32, 4), 4, restarts=3, num_threads=2, track=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bad_input_is_named():
    x = torch.randn(12, 4)
    calls = {
        "1, 2, 3, 4, 6, 12": partial(balanced_kmeans, x, 5),
        "non-empty float matrix": partial(balanced_kmeans, torch.zeros(12), 3),
        "restarts is 0": partial(balanced_kmeans, x, 3, restarts=0),
        "weights_F has shape": partial(balanced_kmeans, x, 3, weights_F=torch.ones(11)),
        "not negative": partial(balanced_kmeans, x, 3, weights_F=-torch.ones(12)),
        "warm start": partial(balanced_kmeans, x, 3, init_F=torch.arange(12) // 3),
    }
    for words, call in calls.items():
        with pytest.raises(ConfigError, match=words):
            call()
    x[3, 1] = float("nan")
    for solver in (balanced_kmeans, constrained_kmeans):
        with pytest.raises(NonFiniteError):
            solver(x, 3)


def test_normalised_rows():
    rows = normalised_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float16))
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert rows.dtype == torch.float32


# --- the torch path (what CUDA runs), on the CPU ----------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_torch_rounds_lower_the_objective_every_time_and_end_where_no_swap_helps(weighted):
    x = torch.randn(96, 20, generator=torch.Generator().manual_seed(1))
    w = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else torch.ones(96)
    w = w / w.mean()
    gram_FF, _ = kmeans.gram(x)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    labels = kmeans_cuda.grow_clusters(gram_FF, 8, order, 8)
    assert Partition(labels).num_experts == 8
    labels = order % 8
    values = [naive_inertia(x, labels, w)]
    for _ in range(200):
        labels, count = kmeans_cuda.swap_rounds(gram_FF, labels, 8, w if weighted else None, 1, 1e-6)
        if count == 0:
            break
        values.append(naive_inertia(x, labels, w))
    assert len(values) > 5
    assert all(later < earlier for earlier, later in pairwise(values))
    compiled = labels.numpy().astype(np.int32)
    args = (gram_FF.numpy(), w.numpy(), compiled, 8, order.numpy(), 50, 2**62, 1e-5)
    assert kmeans_cpu.weighted_swap_sweeps(*args)[0] == 0  # the compiled kernel agrees that nothing is left to gain


@pytest.mark.parametrize("weighted", [False, True])
def test_torch_gains_equal_the_recomputed_decrease(weighted):
    x = torch.randn(48, 10, generator=torch.Generator().manual_seed(1))
    w = torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else torch.ones(48)
    w = w / w.mean()
    gram_FF, scale = kmeans.gram(x)
    labels = torch.arange(48) % 6
    gain_F, partner_F = kmeans_cuda.SwapState(gram_FF, labels, 6, w if weighted else None).best_partners()
    now = naive_inertia(x, labels, w)
    for i, (gain, j) in enumerate(zip(gain_F.tolist(), partner_F.tolist(), strict=True)):
        trial = labels.clone()
        trial[i], trial[j] = labels[j], labels[i]
        assert now - naive_inertia(x, trial, w) == pytest.approx(gain * scale**2, rel=1e-3, abs=1e-3)


def test_torch_path_recovers_planted_clusters():
    x, truth_F = planted()
    gram_FF, _ = kmeans.gram(x)
    order = np.random.default_rng(0).permutation(len(x))
    assert same_clusters(kmeans.solve_torch(gram_FF, 12, "grow", order, None), truth_F)
    assert Partition(kmeans.solve_torch(gram_FF, 192, "grow", order, None)).num_experts == 192


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_as_good_as_the_cpu_and_repeats_itself():
    x = normalised_rows(torch.randn(1024, 128, generator=torch.Generator().manual_seed(0)))
    cpu, cuda = balanced_kmeans(x, 32), balanced_kmeans(x.cuda(), 32)
    assert cuda.inertia == pytest.approx(cpu.inertia, rel=5e-3)
    assert torch.equal(cuda.expert_F, balanced_kmeans(x.cuda(), 32).expert_F)


@pytest.mark.parametrize("shape", [(7, 1100), (1, 3), (0, 5)])  # more neurons than a block, and fewer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neuron_sums_equal_plain_ones(shape, dtype):
    h_TF = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    h_TF[:, ::3] = 0  # neither positive nor negative
    exact_TF = h_TF.double()
    expected_4F = torch.stack([(exact_TF > 0).sum(0), exact_TF.sum(0), exact_TF.square().sum(0), exact_TF.abs().sum(0)])
    found_4F = neuron_sums(h_TF)
    assert found_4F.dtype == torch.float64
    assert torch.allclose(found_4F, expected_4F, rtol=1e-5, atol=1e-5)
    strided_TF = torch.stack([h_TF, torch.full_like(h_TF, 9)], dim=-1)[..., 0]
    assert torch.equal(neuron_sums(strided_TF), found_4F)
    if len(h_TF):
        assert not torch.allclose(neuron_sums(-h_TF), expected_4F)  # negative control
