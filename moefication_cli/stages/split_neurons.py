"""split: assign every FFN neuron to an expert. Reads the model (and, by method, `graph` or `activations`)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import SplitConfig
from moefication_cli.errors import ConfigError
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.sites import FFNSite
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.estimate import estimate, ffn_bytes
from moefication_cli.runs.inputs import (
    RunModel,
    Tokens,
    layer_options,
    layer_seed,
    layered_result,
    open_model,
    read_graph,
    read_partition,
    read_tokens,
)
from moefication_cli.split.graph import subgraph
from moefication_cli.split.kmeans import balanced_kmeans, constrained_kmeans, normalised_rows
from moefication_cli.split.metis import cut_weight, partition_graph, repair_balance
from moefication_cli.split.partition import (
    Partition,
    check_divides,
    nearest_divisor,
    parse_metis_partition,
    random_partition,
    with_shared,
)
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

PATTERN_SHARE = 0.2  # of the neurons that a token keeps in its pattern
DEFAULT_EXPERT_SIZE = 4  # small experts keep far more quality; see tests/benchmarks/README.md


def split_neurons(run: RunDir, config: SplitConfig, control: Control) -> Result:
    """Partition the neurons of every FFN into exactly balanced experts.

    Writes RUN/split/layer_NNN.safetensors with `expert_F` (int32, -1 = shared). Raises ConfigError when the experts
    do not divide an FFN, MissingArtifactError or StaleArtifactError when a method's input is not there.
    """
    model = open_model(run, config, control)
    for site in model.sites:
        expert_counts(site, config)
    # A partition file may be unbalanced; its repair wants to know which neurons belong together.
    by_graph = config.method == "graph" or (config.from_partition and run.manifest("graph") is not None)
    graph = run.require("graph") if by_graph else None
    # Which neurons matter most is measured, not guessed: sharing needs activations whatever the method.
    profiled = (config.method == "activation" or config.shared_fraction > 0) and not config.from_partition
    activations = run.require("activations") if profiled else None
    inputs = {"graph": graph, "activations": activations}
    if control.dry_run:
        neurons = max(site.num_neurons for site in model.sites)
        width = config.profile_tokens if config.method == "activation" else model.sites[0].d_model
        return estimate(
            "split",
            run,
            model,
            writes=run.path("split"),
            num_bytes=4.0 * neurons * len(model.sites),
            flops=len(model.sites) * neurons**2 * (2.0 * width + 500 * config.restarts),
            memory=ffn_bytes(model) + 4.0 * neurons * (neurons + width),
            reads=inputs,
        )
    with control.ranks.begin(run, "split", **layer_options(config, control, model, inputs)) as work:
        for index in control.track(work.pending(), "split", len(model.sites)):
            partition, metrics = split_layer(model, activations, graph, index, config, control)
            work.save(index, {"expert_F": partition.expert_F.to(torch.int32)}, metrics=metrics)
        manifest = control.ranks.finish(work)
    return layered_result("split", work, manifest)


def expert_counts(site: FFNSite, config: SplitConfig) -> tuple[int, int]:
    """(experts, shared neurons) of one FFN under this config. Raises ConfigError listing the divisors."""
    total = site.num_neurons
    if config.num_experts is not None and config.expert_size is not None:
        raise ConfigError("--num-experts and --expert-size exclude each other", "give one of them")
    if config.num_experts is not None:
        check_divides(total, config.num_experts)
        size = total // config.num_experts
    elif config.expert_size is not None:
        check_divides(total, config.expert_size)  # a size divides F exactly when the count of such experts does
        size = config.expert_size
    else:
        size = nearest_divisor(total, DEFAULT_EXPERT_SIZE)
    experts = total // size
    shared_experts = min(round(config.shared_fraction * experts), experts - 1)
    return experts - shared_experts, shared_experts * size


def split_layer(
    model: RunModel,
    activations: Artifact | None,
    graph: Artifact | None,
    index: int,
    config: SplitConfig,
    control: Control,
) -> tuple[Partition, dict[str, Any]]:
    """(partition, metrics) of one FFN by the configured method."""
    site = model.sites[index]
    num_experts, num_shared = expert_counts(site, config)
    seed = layer_seed(control.seed, index)
    if config.from_partition:
        partition = _read_partition_file(config.from_partition, graph, index, site)
        return partition, {"num_experts": partition.num_experts, "num_shared": 0, "expert_size": partition.expert_size}
    weights = model.read_ffn(index)
    shared_idx = torch.empty(0, dtype=torch.int64)
    profile_FT = None
    if num_shared or config.method == "activation":
        assert activations is not None
        profile_FT = contribution_profile(weights, read_tokens(activations, index, config.profile_tokens, seed))
        shared_idx = profile_FT.mean(1).topk(num_shared).indices.sort().values
    rest_mask = torch.ones(site.num_neurons, dtype=torch.bool)
    rest_mask[shared_idx] = False
    rest_F = rest_mask.nonzero().squeeze(1)
    metrics: dict[str, Any] = {
        "num_experts": num_experts,
        "num_shared": num_shared,
        "expert_size": len(rest_F) // num_experts,
    }

    if config.method == "random":
        expert_F = random_partition(len(rest_F), num_experts, seed).expert_F
    elif config.method == "graph":
        assert graph is not None
        edges = subgraph(read_graph(graph, index), rest_F) if num_shared else read_graph(graph, index)
        expert_F = partition_graph(edges, num_experts, seed=seed).expert_F
        metrics["cut"] = cut_weight(edges, expert_F)
    else:
        if config.method == "activation":
            assert profile_FT is not None
            points = keep_pattern(profile_FT) if config.profile == "pattern" else profile_FT
        else:
            points = normalised_rows(_projection(weights, config))
        warm_F = _warm_start(config, index, rest_F, num_experts)
        if config.solver == "constrained":
            found = constrained_kmeans(points[rest_F], num_experts, seed=seed)
        else:
            found = balanced_kmeans(points[rest_F], num_experts, seed=seed, restarts=config.restarts, init_F=warm_F)
        expert_F, metrics["inertia"] = found.expert_F, float(found.inertia)
    if profile_FT is not None:
        # Layers without a router run the first experts always: the most important ones come first.
        expert_F = by_importance(expert_F.to(torch.int64), profile_FT[rest_F].square().sum(1))
    rest = Partition(expert_F.to(torch.int64))
    return (with_shared(rest, shared_idx, site.num_neurons) if num_shared else rest), metrics


def contribution_profile(weights: FFNWeights, tokens: Tokens) -> Tensor:
    """profile_FT: |h_n| * ||w_down_n|| of every neuron at every token, times the root of how much the token matters."""
    h_TF = weights.hidden(tokens.x_TD.to(weights.w_up_FD.device))
    root_T1 = (tokens.weight_T / tokens.weight_T.mean().clamp_min(1e-30)).sqrt().unsqueeze(1).to(h_TF)
    return (h_TF.abs() * weights.w_down_FD.norm(dim=1) * root_T1).T.contiguous()


def keep_pattern(profile_FT: Tensor) -> Tensor:
    """pattern_FT: 1 where the neuron is among the PATTERN_SHARE that contribute most at a token, else 0.

    Source: keep patterns as CMoE (arXiv 2502.04416) clusters them, by contribution and not by activation.
    """
    count = max(1, round(PATTERN_SHARE * len(profile_FT)))
    return (profile_FT >= profile_FT.topk(count, dim=0).values[-1]).to(profile_FT)


def by_importance(expert_F: Tensor, importance_F: Tensor) -> Tensor:
    """The same experts, numbered from the most important one down; importance is summed over an expert's neurons."""
    total_E = torch.zeros(int(expert_F.max()) + 1, dtype=torch.float64)
    total_E.index_add_(0, expert_F.cpu(), importance_F.double().cpu())
    number_E = torch.empty_like(total_E, dtype=torch.int64)
    number_E[total_E.argsort(descending=True, stable=True)] = torch.arange(len(total_E))
    return number_E[expert_F.cpu()]


def _projection(weights: FFNWeights, config: SplitConfig) -> Tensor:
    if config.projection == "gate" and weights.w_gate_FD is None:
        raise ConfigError("--projection gate: this model's FFNs are not gated", "use --projection up")
    use_gate = weights.w_gate_FD is not None and config.projection != "up"
    return weights.w_gate_FD if use_gate and weights.w_gate_FD is not None else weights.w_up_FD


def _warm_start(config: SplitConfig, index: int, rest_F: Tensor, num_experts: int) -> Tensor | None:
    if config.init is None:
        return None
    partition = read_partition(RunDir(Path(config.init)).read_stage("split"), index)
    expert_F = partition.expert_F[rest_F] if partition.num_neurons > int(rest_F.max()) else None
    if expert_F is None or partition.num_experts != num_experts or bool((expert_F < 0).any()):
        raise ConfigError(
            f"--init {config.init}: its split of layer {index} has other experts", "split it the same way"
        )
    return expert_F


def _read_partition_file(pattern: str, graph: Artifact | None, index: int, site: FFNSite) -> Partition:
    folder = Path(pattern)
    name = f"layer_{index:03d}"
    found = sorted(folder.glob(f"*{name}*.part.*") if folder.is_dir() else folder.parent.glob(folder.name))
    if len(found) > 1:
        found = [path for path in found if name in path.name]
    if len(found) != 1:
        raise ConfigError(
            f"--from-partition {pattern}: {len(found)} partition files for layer {index} ({site.name})",
            f"gpmetis writes {name}.graph.part.N beside each exported graph",
        )
    suffix = found[0].suffix.removeprefix(".")
    num_experts = int(suffix) if suffix.isdigit() else None
    try:
        expert_F = parse_metis_partition(found[0].read_text(encoding="utf-8"), site.num_neurons, num_experts)
        num_experts = num_experts or int(expert_F.max()) + 1
        check_divides(site.num_neurons, num_experts)
    except ConfigError as error:
        raise ConfigError(f"{found[0]}: {error.message}", error.hint) from None
    if bool((torch.bincount(expert_F, minlength=num_experts) == site.num_neurons // num_experts).all()):
        return Partition(expert_F)
    if graph is None:
        raise ConfigError(
            f"{found[0]}: its parts have different sizes", "build the graph, so that they can be balanced"
        )
    return repair_balance(read_graph(graph, index), expert_F, num_experts)
