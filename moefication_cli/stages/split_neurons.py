"""split: assign every FFN neuron to an expert. Reads the model (and, by method, `graph` or `activations`)."""

from pathlib import Path
from typing import Any

import torch

from moefication_cli.config import SplitConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.sites import FFNSite
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import split_cost
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import (
    RunModel,
    layer_options,
    layer_seed,
    layered_result,
    open_model,
    read_graph,
    read_partition,
    read_tokens,
)
from moefication_cli.runs.room import check_room
from moefication_cli.split.methods import expert_counts, split_layer, split_method
from moefication_cli.split.metis import repair_balance
from moefication_cli.split.partition import Partition
from moefication_cli.split.partition_files import find_partition_file, read_partition_file
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


def split_neurons(run: RunDir, config: SplitConfig = SplitConfig(), control: Control = Control()) -> Result:
    """Partition the neurons of every FFN into exactly balanced experts.

        split_neurons(RunDir("RUN"), SplitConfig(method="kmeans", expert_size=32))

    Writes RUN/split/layer_NNN.safetensors with `expert_F` (int32, -1 = shared). Raises ConfigError when the experts
    do not divide an FFN, MissingArtifactError or StaleArtifactError when a method's input is not there.
    """
    model = open_model(run, config, control)
    for site in model.sites:
        expert_counts(site.num_neurons, config, model.device.type)
    if model.device.type == "cuda" and config.num_experts is None and config.expert_size is None:
        control.say("experts of 32 neurons, which a GPU can run faster than dense; --expert-size 4 keeps more quality")
    # A partition file may be unbalanced; its repair wants to know which neurons belong together.
    method = split_method(config.method)
    by_graph = method.reads_graph or (config.from_partition and run.manifest("graph") is not None)
    graph = run.require("graph") if by_graph else None
    # Which neurons matter most is measured, not guessed: sharing needs activations whatever the method.
    profiled = (method.reads_activations or config.shared_fraction > 0) and not config.from_partition
    activations = run.require("activations") if profiled else None
    inputs = {"graph": graph, "activations": activations}
    pattern = config.from_partition
    digests = {"partition": _partition_digest(run, model, pattern)} if pattern else {}
    cost = split_cost(model, config)
    if control.dry_run:
        return estimate("split", model, run.path("split"), cost, inputs)
    with control.ranks.begin(run, "split", layer_options(config, control, model, inputs, digests)) as work:
        check_room(work, model, cost, control, "fewer --profile-tokens")
        for index in control.track(work.pending(), "split", len(model.sites)):
            partition, metrics = _split_index(model, activations, graph, index, config, control)
            work.save(index, {"expert_F": partition.expert_F.to(torch.int32)}, metrics=metrics)
        manifest = control.ranks.finish(work)
    return layered_result("split", work, manifest)


def _split_index(
    model: RunModel,
    activations: Artifact | None,
    graph: Artifact | None,
    index: int,
    config: SplitConfig,
    control: Control,
) -> tuple[Partition, dict[str, Any]]:
    """(partition, metrics) of one FFN: reads what its method needs."""
    site, seed = model.sites[index], layer_seed(control.seed, index)
    if config.from_partition:
        partition = _read_partition(_partition_path(config.from_partition, site), graph, index, site)
        return partition, {"num_experts": partition.num_experts, "num_shared": 0, "expert_size": partition.expert_size}
    tokens = None if activations is None else read_tokens(activations, index, config.profile_tokens, seed)
    warm = None if config.init is None else read_partition(RunDir(Path(config.init)).read_stage("split"), index)
    try:
        return split_layer(
            model.read_ffn(index),
            config,
            seed,
            None if tokens is None else (tokens.x_TD, tokens.weight_T),
            None if graph is None else read_graph(graph, index),
            warm,
        )
    except ConfigError as error:
        raise ConfigError(f"layer {index} ({site.name}): {error.message}", error.hint) from None


def _read_partition(path: Path, graph: Artifact | None, index: int, site: FFNSite) -> Partition:
    expert_F, num_experts = read_partition_file(path, site.num_neurons)
    if bool((torch.bincount(expert_F, minlength=num_experts) == site.num_neurons // num_experts).all()):
        return Partition(expert_F)
    if graph is None:
        raise ConfigError(f"{path}: its parts have different sizes", "build the graph, so that they can be balanced")
    return repair_balance(read_graph(graph, index), expert_F, num_experts)


def _partition_path(pattern: str, site: FFNSite) -> Path:
    up = next(part for part in site.slices() if part.part == "up" and part.kind == "weight")
    return find_partition_file(pattern, site.index, up.parameter)


def _partition_digest(run: RunDir, model: RunModel, pattern: str) -> str:
    """Identifies what all partition files hold."""
    return jsonio.digest([run.hashes.sha256(_partition_path(pattern, site)) for site in model.sites])
