"""Which expert does each neuron belong to? The methods by name, and the split of one FFN by one of them.

A new method is a function `(Problem) -> (expert_F, metrics)` in a file of its own and a line in `SPLITS`; its name goes
among the choices of `config.SplitConfig.method`. Axes as in `ffn`: F neurons, E experts, T tokens. Pure tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import SplitConfig
from moefication_cli.errors import ConfigError
from moefication_cli.ffn import FFNWeights
from moefication_cli.split.graph import Graph, subgraph
from moefication_cli.split.kmeans import balanced_kmeans, constrained_kmeans, normalised_rows
from moefication_cli.split.metis import cut_weight, partition_graph
from moefication_cli.split.partition import Partition, check_divides, nearest_divisor, random_partition, with_shared
from moefication_cli.split.profiles import by_importance, contribution_profile, keep_pattern

# Small experts keep far more quality (tests/benchmarks/README.md). On CUDA nothing has been measured; by arithmetic alone, 32
# is the least that its grouped products run faster than dense (see runtime/backends.py).
DEFAULT_EXPERT_SIZE = {"cpu": 4, "cuda": 32}

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """The neurons `rest_F` (indices; shared ones are left out) of one FFN, to be divided into `num_experts` equal parts.

    `profile_FT` and `graph` are there where the method's row of `SPLITS` asks for them; the graph is of `rest_F` alone.
    `warm_F` is a partition of `rest_F` to start from.
    """

    weights: FFNWeights
    rest_F: Tensor
    num_experts: int
    config: SplitConfig
    seed: int
    profile_FT: Tensor | None = None
    graph: Graph | None = None
    warm_F: Tensor | None = None


@dataclass(frozen=True)
class SplitMethod:
    """A row of `SPLITS`: expert_F of the neurons in `rest_F`, and what else the method must be given."""

    assign: Callable[[Problem], tuple[Tensor, Metrics]]
    reads_activations: bool = False
    reads_graph: bool = False


def _random(problem: Problem) -> tuple[Tensor, Metrics]:
    return random_partition(len(problem.rest_F), problem.num_experts, problem.seed).expert_F, {}


def _graph(problem: Problem) -> tuple[Tensor, Metrics]:
    """METIS on the co-activation graph (MoEfication, section 3.2)."""
    assert problem.graph is not None
    expert_F = partition_graph(problem.graph, problem.num_experts, seed=problem.seed).expert_F
    return expert_F, {"cut": cut_weight(problem.graph, expert_F)}


def _weight_rows(problem: Problem) -> tuple[Tensor, Metrics]:
    """Balanced k-means on normalised weight rows (MoEfication, section 3.2); gate rows where gated, unless told."""
    weights, projection = problem.weights, problem.config.projection
    if projection == "gate" and weights.w_gate_FD is None:
        raise ConfigError("--projection gate: this model's FFNs are not gated", "use --projection up")
    rows_FD = weights.w_up_FD if weights.w_gate_FD is None or projection == "up" else weights.w_gate_FD
    return _clustered(problem, normalised_rows(rows_FD))


def _contributions(problem: Problem) -> tuple[Tensor, Metrics]:
    """Balanced k-means on what each neuron writes at each token, or on which tokens keep it."""
    assert problem.profile_FT is not None
    pattern = problem.config.profile == "pattern"
    return _clustered(problem, keep_pattern(problem.profile_FT) if pattern else problem.profile_FT)


def _clustered(problem: Problem, points_FT: Tensor) -> tuple[Tensor, Metrics]:
    points_FT, count, seed = points_FT[problem.rest_F], problem.num_experts, problem.seed
    if problem.config.solver == "constrained":
        found = constrained_kmeans(points_FT, count, seed=seed)
    else:
        restarts = problem.config.restarts
        found = balanced_kmeans(points_FT, count, seed=seed, restarts=restarts, init_F=problem.warm_F)
    return found.expert_F, {"inertia": float(found.inertia)}


SPLITS: dict[str, SplitMethod] = {
    "random": SplitMethod(_random),
    "kmeans": SplitMethod(_weight_rows),
    "graph": SplitMethod(_graph, reads_graph=True),
    "activation": SplitMethod(_contributions, reads_activations=True),
}


def split_method(name: str) -> SplitMethod:
    """The method of that name. Raises ConfigError naming those there are."""
    if name not in SPLITS:
        raise ConfigError(f"there is no split method {name!r}", f"use one of {', '.join(SPLITS)}")
    return SPLITS[name]


def expert_counts(num_neurons: int, config: SplitConfig, device: str = "cpu") -> tuple[int, int]:
    """(experts, shared neurons) of one FFN under this config, which is to run on `device` (cpu or cuda).

    Raises ConfigError listing the divisors.
    """
    if config.num_experts is not None and config.expert_size is not None:
        raise ConfigError("--num-experts and --expert-size exclude each other", "give one of them")
    if config.num_experts is not None:
        check_divides(num_neurons, config.num_experts)
        size = num_neurons // config.num_experts
    elif config.expert_size is not None:
        check_divides(num_neurons, config.expert_size)  # a size divides F exactly when the count of such experts does
        size = config.expert_size
    else:
        size = nearest_divisor(num_neurons, DEFAULT_EXPERT_SIZE[device])
    experts = num_neurons // size
    shared_experts = min(round(config.shared_fraction * experts), experts - 1)
    return experts - shared_experts, shared_experts * size


def split_layer(
    weights: FFNWeights,
    config: SplitConfig,
    seed: int,
    profile_tokens: tuple[Tensor, Tensor] | None = None,
    graph: Graph | None = None,
    warm: Partition | None = None,
) -> tuple[Partition, Metrics]:
    """(partition, metrics) of one FFN by the configured method.

    `profile_tokens` are (x_TD, weight_T) of calibration tokens: needed where the method reads activations and where
    neurons are shared, since which neurons matter most is measured. `warm` is a split to start from. Raises ConfigError
    where the experts do not divide the neurons, the method does not fit the FFN, or `warm` has other experts.
    """
    method = split_method(config.method)
    num_experts, num_shared = expert_counts(weights.num_neurons, config, weights.w_up_FD.device.type)
    shared_idx, profile_FT = torch.empty(0, dtype=torch.int64), None
    if num_shared or method.reads_activations:
        assert profile_tokens is not None
        profile_FT = contribution_profile(weights, *profile_tokens)
        shared_idx = profile_FT.mean(1).topk(num_shared).indices.sort().values.cpu()
    rest_mask_F = torch.ones(weights.num_neurons, dtype=torch.bool)
    rest_mask_F[shared_idx] = False
    rest_F = rest_mask_F.nonzero().squeeze(1)
    if graph is not None and num_shared:
        graph = subgraph(graph, rest_F)
    warm_F = None if warm is None else _warm_start(warm, rest_F, num_experts)
    expert_F, found = method.assign(Problem(weights, rest_F, num_experts, config, seed, profile_FT, graph, warm_F))
    if profile_FT is not None:
        # Layers without a router run the first experts always: the most important ones come first.
        expert_F = by_importance(expert_F.to(torch.int64), profile_FT[rest_F].square().sum(1))
    rest = Partition(expert_F.to(torch.int64))
    metrics = {"num_experts": num_experts, "num_shared": num_shared, "expert_size": len(rest_F) // num_experts}
    return (with_shared(rest, shared_idx, weights.num_neurons) if num_shared else rest), metrics | found


def _warm_start(warm: Partition, rest_F: Tensor, num_experts: int) -> Tensor:
    expert_F = warm.expert_F[rest_F] if warm.num_neurons > int(rest_F.max()) else None
    if expert_F is None or warm.num_experts != num_experts or bool((expert_F < 0).any()):
        raise ConfigError("the split to start from has other experts", "split it the same way")
    return expert_F
