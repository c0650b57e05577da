"""Balanced k-means: experts of exactly equal size from rows that describe neurons (weights, gates, activations).

Source: MoEfication (arXiv 2110.01786), section 3.2, clusters the normalised rows of the up-projection; its ICML 2024
follow-up assigns to fixed centroids by auction. Here: a start grown cluster by cluster, or a random one, then
exchanges on the true objective (`kmeans_cpu`), which ends lower than min-cost-flow k-means in a fraction of its time.
The package k-means-constrained stays as the reference, `constrained_kmeans`.

Shapes: x_FD [F, D] any float dtype, one row a neuron; expert_F int64 [F]. StageWriter and memory: one F x F float32 Gram
matrix (485 MB at F = 11008) plus E x F sums per thread; D matters only for the Gram matrix. CPU tensors run compiled
kernels, CUDA tensors torch operations.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.split import kmeans_cpu, kmeans_cuda
from moefication_cli.split.partition import check_divides

Track = Callable[[int, int], None]

_GRAM_BLOCK = 1024
_NOT_FINITE = "rows to cluster contain NaN or infinity", "check the weights or activations of this layer"
_GROW_ROUNDS = 8
_MAX_SWEEPS = 200  # 10 to 20 are usual: a limit for what rounding might make endless
_MAX_ROUNDS = 20_000


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """A balanced clustering: `expert_F` int64 [F] on the CPU, its inertia, and the inertia of every start tried.

    The inertia is sum_i w_i ||x_i - centroid||^2 with weighted centroids, computed in float64 from the rows.
    `restarts_inertia` lists the cold starts, then the warm one where there was one.
    """

    expert_F: Tensor
    inertia: float
    restarts_inertia: tuple[float, ...]


def normalised_rows(w_FD: Tensor) -> Tensor:
    """Rows of length 1 in float32 (or float64 kept); rows of zeros stay zero."""
    x_FD = w_FD if w_FD.dtype == torch.float64 else w_FD.float()
    length_F1: Tensor = torch.linalg.vector_norm(x_FD, dim=1, keepdim=True)
    return x_FD / length_F1.clamp_min(torch.finfo(x_FD.dtype).tiny)


def inertia(x_FD: Tensor, expert_F: Tensor, num_experts: int, weights_F: Tensor | None = None) -> float:
    """sum_i w_i ||x_i - centroid of i's cluster||^2, accumulated in float64, in memory of a few rows per cluster."""
    order_F = torch.argsort(expert_F.to(x_FD.device), stable=True)
    counts = torch.bincount(expert_F.cpu(), minlength=num_experts).tolist()
    total = torch.zeros((), dtype=torch.float64, device=x_FD.device)
    for rows in torch.split(order_F, counts):
        x_ND = x_FD[rows].double()
        w_N1 = torch.ones_like(x_ND[:, :1]) if weights_F is None else weights_F[rows, None].to(x_ND)
        centroid_D = (w_N1 * x_ND).sum(0) / w_N1.sum().clamp_min(torch.finfo(torch.float64).tiny)
        total += (w_N1 * (x_ND - centroid_D).square()).sum()
    return float(total)


def gram(x_FD: Tensor) -> tuple[Tensor, float]:
    """(X X^T / s^2 in float32 [F, F], s) with s the largest |x|: no overflow, half the products of a plain X X^T.

    Raises NonFiniteError when a row holds NaN or infinity.
    """
    x_FD = x_FD.float()
    n = x_FD.shape[0]
    scale = float(x_FD.abs().amax(1).max())
    if not np.isfinite(scale):
        raise NonFiniteError(*_NOT_FINITE)
    scale = scale or 1.0
    gram_FF = torch.empty(n, n, dtype=torch.float32, device=x_FD.device)
    for start in range(0, n, _GRAM_BLOCK):
        stop = min(start + _GRAM_BLOCK, n)
        block = (x_FD[start:stop] / scale) @ x_FD[start:].t()
        gram_FF[start:stop, start:] = block.div_(scale)
        gram_FF[stop:, start:stop] = gram_FF[start:stop, stop:].t()
    return gram_FF, scale


def balanced_kmeans(
    x_FD: Tensor,
    num_experts: int,
    *,
    seed: int = 0,
    restarts: int | None = None,
    weights_F: Tensor | None = None,
    init_F: Tensor | None = None,
    num_threads: int | None = None,
    track: Track | None = None,
) -> KMeansResult:
    """Cluster the rows of x_FD [F, D] into `num_experts` clusters of F / num_experts rows, low in inertia.

    `restarts` cold starts (grown and random ones in turn; default 4, or 2 above 8192 rows) and, where `init_F`
    (int64 [F], balanced) is given, a warm one from it; the lowest inertia wins. With `init_F` there may be 0 cold ones.
    `weights_F` [F] >= 0 weighs rows.
    Restarts share the `num_threads` threads (default: torch's); the result depends on the seed, and on threads only
    through the rounding of torch's matrix product. `track(done, total)` is called after each start, from this thread.

    Raises ConfigError when experts do not divide F or an argument has the wrong shape, NonFiniteError on NaN or
    infinity in the rows.
    """
    n = x_FD.shape[0]
    if restarts is None:
        restarts = 4 if n <= 8192 else 2
    _check(x_FD, num_experts, restarts, weights_F, init_F)
    on_cuda = x_FD.device.type == "cuda"
    if not on_cuda:
        x_FD = x_FD.cpu()
    mean_1_F = None
    if weights_F is not None:
        weights_F = weights_F.to(x_FD.device)
        total = float(weights_F.double().sum())
        mean_1_F = (weights_F.double() * (n / total)).float() if total > 0 else torch.zeros_like(weights_F).float()
    if num_experts in (1, n):
        expert_F = torch.arange(n) % num_experts
        value = inertia(x_FD, expert_F, num_experts, weights_F)
        return KMeansResult(expert_F, value, (value,))

    gram_FF, _ = gram(x_FD)
    solve = solve_torch if on_cuda else _solve_compiled
    orders = [np.random.default_rng((seed, k)).permutation(n) for k in range(max(1, restarts))]
    grown: list[Tensor | str] = ["grow" if k % 2 == 0 else "random" for k in range(restarts)]
    starts = grown if init_F is None else [*grown, init_F]
    orders += [orders[0]] * (len(starts) - len(orders))

    def run(k: int) -> tuple[Tensor, float]:
        expert_F = solve(gram_FF, num_experts, starts[k], orders[k], mean_1_F)
        return expert_F, inertia(x_FD, expert_F, num_experts, weights_F)

    results = _run_all(run, len(starts), 1 if on_cuda else (num_threads or torch.get_num_threads()), track)
    best = min(range(len(starts)), key=lambda k: results[k][1])
    return KMeansResult(results[best][0], results[best][1], tuple(r[1] for r in results))


def _run_all(
    run: Callable[[int], tuple[Tensor, float]], count: int, num_threads: int, track: Track | None
) -> Sequence[tuple[Tensor, float]]:
    if num_threads == 1 or count == 1:
        results = []
        for k in range(count):
            results.append(run(k))
            if track is not None:
                track(k + 1, count)
        return results
    with ThreadPoolExecutor(min(num_threads, count)) as pool:
        futures = [pool.submit(run, k) for k in range(count)]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if track is not None:
                track(done, count)
        return [future.result() for future in futures]


def _tolerance(own_F: Tensor) -> float:
    """A gain below this, in units of the sums S, is rounding: a few parts per million of what is compared."""
    return 4e-6 * float(own_F.abs().mean())


def _solve_compiled(
    gram_FF: Tensor, num_experts: int, start: Tensor | str, order: np.ndarray, weights_F: Tensor | None
) -> Tensor:
    g = gram_FF.numpy()
    expert_F = _start(start, order, num_experts, lambda: kmeans_cpu.grow_clusters(g, num_experts, order, _GROW_ROUNDS))
    m = g.shape[0] // num_experts
    tolerance = _tolerance(gram_FF.diagonal()) * max(1.0, m**0.5)
    if weights_F is None:
        kmeans_cpu.swap_sweeps(g, expert_F, num_experts, order, _MAX_SWEEPS, 2**62, tolerance)
    else:
        w = weights_F.numpy()
        kmeans_cpu.weighted_swap_sweeps(g, w, expert_F, num_experts, order, _MAX_SWEEPS, 2**62, 2 * tolerance / m)
    return torch.from_numpy(expert_F.astype(np.int64))


def solve_torch(
    gram_FF: Tensor, num_experts: int, start: Tensor | str, order: np.ndarray, weights_F: Tensor | None
) -> Tensor:
    """expert_F by `kmeans_cuda` on the device of `gram_FF`, from a start that is grown, random or given."""

    def grow() -> np.ndarray:
        grown = kmeans_cuda.grow_clusters(gram_FF, num_experts, torch.from_numpy(order), _GROW_ROUNDS)
        return grown.cpu().numpy()

    expert_F = torch.from_numpy(_start(start, order, num_experts, grow)).to(gram_FF.device, torch.int64)
    m = gram_FF.shape[0] // num_experts
    tolerance = _tolerance(gram_FF.diagonal()) * max(1.0, m**0.5) * 2 / m
    return kmeans_cuda.swap_rounds(gram_FF, expert_F, num_experts, weights_F, _MAX_ROUNDS, tolerance)[0].cpu()


def _start(start: Tensor | str, order: np.ndarray, num_experts: int, grow: Callable[[], np.ndarray]) -> np.ndarray:
    if isinstance(start, Tensor):
        return start.cpu().numpy().astype(np.int32)
    if start == "grow":
        return grow().astype(np.int32)
    expert_F = np.empty(order.shape[0], np.int32)
    expert_F[order] = np.arange(order.shape[0]) % num_experts
    return expert_F


def _check(x_FD: Tensor, num_experts: int, restarts: int, weights_F: Tensor | None, init_F: Tensor | None) -> None:
    if x_FD.dim() != 2 or not x_FD.is_floating_point() or x_FD.numel() == 0:
        raise ConfigError(f"rows to cluster must be a non-empty float matrix [F, D], not {tuple(x_FD.shape)}")
    n = x_FD.shape[0]
    check_divides(n, num_experts)
    if restarts < (1 if init_F is None else 0):
        raise ConfigError(f"restarts is {restarts}; at least one is needed")
    if weights_F is not None:
        if weights_F.shape != (n,):
            raise ConfigError(f"weights_F has shape {tuple(weights_F.shape)}, not ({n},)")
        if not bool(torch.isfinite(weights_F).all()) or bool((weights_F < 0).any()):
            raise ConfigError("weights of neurons must be finite and not negative")
    if init_F is not None:
        sizes = torch.bincount(init_F, minlength=num_experts) if int(init_F.min()) >= 0 else torch.zeros(1)
        if init_F.shape != (n,) or sizes.shape != (num_experts,) or bool((sizes != n // num_experts).any()):
            raise ConfigError(
                f"the warm start is not a partition of {n} neurons into {num_experts} equal experts",
                "start cold, or from a split with the same number of experts",
            )


def constrained_kmeans(x_FD: Tensor, num_experts: int, seed: int = 0, n_init: int = 10) -> KMeansResult:
    """The reference: k-means-constrained with both size limits at F / E (min-cost flow; minutes where F is large).

    Raises as `balanced_kmeans` does.
    """
    from k_means_constrained import KMeansConstrained  # pulls in OR-tools: only where it is asked for

    _check(x_FD, num_experts, 1, None, None)
    if not bool(torch.isfinite(x_FD).all()):
        raise NonFiniteError(*_NOT_FINITE)
    n = x_FD.shape[0]
    size = n // num_experts
    solver = KMeansConstrained(num_experts, size_min=size, size_max=size, n_init=n_init, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        labels = solver.fit(x_FD.float().cpu().numpy()).labels_
    expert_F = torch.from_numpy(np.asarray(labels).astype(np.int64))
    value = inertia(x_FD, expert_F, num_experts)
    return KMeansResult(expert_F, value, (value,))


def balanced_assignment(cost_FE: Tensor) -> Tensor:
    """expert_F int64 [F]: least total cost with F / E rows for every column; `cost_FE` int64 >= 0, on any device.

    Min-cost flow (OR-tools), exact; F * E arcs: 25 ms for F = 3072, E = 12. Raises ConfigError where E does not divide F.
    """
    from ortools.graph.python import min_cost_flow  # what k-means-constrained solves its assignments with

    rows, columns = cost_FE.shape
    check_divides(rows, columns)
    flow = min_cost_flow.SimpleMinCostFlow()
    left, right = np.repeat(np.arange(rows), columns), rows + np.tile(np.arange(columns), rows)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(left, right, np.ones_like(left), cost_FE.cpu().numpy().ravel())
    supply = np.concatenate([np.ones(rows, np.int64), np.full(columns, -(rows // columns))])
    flow.set_nodes_supplies(np.arange(rows + columns), supply)
    assert flow.solve() == flow.OPTIMAL
    taken = torch.from_numpy(np.asarray(flow.flows(arcs))).view(rows, columns)
    return taken.argmax(1)
