"""What the stages read: the model one FFN at a time, and the layer files of earlier stages.

A run remembers its model in run.json; the first stage that names `--model` writes it there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import (
    ModelConfig,
    RouterConfig,
    RunModelConfig,
    TaskConfig,
    compared_values,
    options_of,
    recorded_values,
)
from moefication_cli.errors import ConfigError, MissingArtifactError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.sites import FFNSite
from moefication_cli.routing.tokens import Tokens
from moefication_cli.runs.bare_model import folder_of_file
from moefication_cli.runs.control import Control, Result, chosen_layers
from moefication_cli.split.graph import Graph
from moefication_cli.split.partition import Partition
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.manifest import BASE_MODEL, Manifest
from moefication_cli.store.options import StageOptions
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.writer import StageWriter

_TOKEN_BYTES = 768 * 2**20  # of a router's training: a layer of a 7B model then fits beside its weights in a few GiB
_BLOCK = 64  # tokens read together when a layer's inputs are sampled


@dataclass(frozen=True)
class RunModel:
    """The run's model: where its FFNs are, and their weights one FFN at a time."""

    checkpoint: Checkpoint
    fingerprint: str
    device: torch.device

    @property
    def sites(self) -> Sequence[FFNSite]:
        return self.checkpoint.sites

    @property
    def names(self) -> list[str]:
        """Module path of every FFN without the head's prefix, in execution order."""
        return [site.name for site in self.sites]

    def read_ffn(self, index: int) -> FFNWeights:
        """Float32 weights of one FFN, read from the checkpoint now, on the stage's device."""
        return self.checkpoint.read_ffn(self.sites[index]).to(self.device)


def open_model(run: RunDir, config: ModelConfig | None, control: Control) -> RunModel:
    """The model this run is about. `--model` and how to read it go to run.json with the first thing the stage keeps.

    Raises ConfigError when the run knows no model (MissingArtifactError in a stage that takes none), UnavailableError
    for a device that is not here.
    """
    from moefication_cli.models.loading import resolve_device

    device = resolve_device(control.device)
    info = run.info
    named: dict[str, Any] = {}
    if config is not None:
        named = {"model": absolute(config.model), "revision": config.revision, "ffn": config.ffn}
        if isinstance(config, RunModelConfig) and (made := folder_of_file(run, config, control)) is not None:
            named["model"] = str(made)
    model = named.get("model") or info.model
    if model is None:
        if config is None:  # a stage that works on what others have made
            raise MissingArtifactError(
                f"{run.root}: nothing has been made here yet",
                f"moefication collect-activations {run.root} --model MODEL --data DATA",
            )
        raise ConfigError(f"{run.root}: no model is known for this run", "name it once with --model")
    if info.model not in (None, model):
        control.say(f"{run.root}: the model changes from {info.model} to {model}; stages made from it become stale")
    ffn = named.get("ffn") or info.ffn
    checkpoint = Checkpoint(
        model,
        revision=named.get("revision") or info.revision,
        ffn=ffn,
        trust_remote_code=control.trust_remote_code,  # never from run.json: whoever gives us a run could run code
    )
    fingerprint = checkpoint.fingerprint(run.hashes.sha256)
    named["revision"] = checkpoint.resolved_revision
    run.note(**named | {"model": model, "fingerprint": fingerprint})
    return RunModel(checkpoint, fingerprint, device)


def as_before(run: RunDir, stage: str, config: Any) -> Any:
    """The config of a re-run: how text becomes model input, where not said anew, is what the stage was made with."""
    made = run.manifest(stage)
    if made is None:
        return config
    before = type(config).recorded(made.values)
    unsaid = [entry.name for entry in options_of(TaskConfig) if getattr(config, entry.name) is None]
    return replace(config, **{name: getattr(before, name) for name in unsaid})


def absolute(path: str | None) -> str | None:
    """A path that exists, as seen from anywhere; names of the hub stay as they are."""
    try:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
    except OSError:  # too long for a path, for instance
        return path


def begin_options(
    config: Any,
    control: Control,
    model: RunModel,
    inputs: Mapping[str, Artifact | None],
    digests: Mapping[str, str] | None = None,
) -> StageOptions:
    """What `RunDir.begin` is asked for by every stage: config, provenance, inputs.

    `digests` are of inputs that no stage made, such as data.
    """
    digests_of = {name: stage.digest for name, stage in inputs.items() if stage}
    return StageOptions(
        config=recorded_values(config) | {"seed": control.seed},
        compared=[*compared_values(config), "seed"],
        sources=control.sources.get(type(config), {}),
        inputs={BASE_MODEL: model.fingerprint} | digests_of | dict(digests or {}),
        force=control.force,
        device=str(model.device),
    )


def layer_options(
    config: Any,
    control: Control,
    model: RunModel,
    inputs: Mapping[str, Artifact | None],
    digests: Mapping[str, str] | None = None,
) -> StageOptions:
    """`begin_options` of a stage with one file per layer, of which this process does those `--layers` names."""
    only = chosen_layers(control.layers, len(model.sites))
    return replace(begin_options(config, control, model, inputs, digests), layers=model.names, only=only)


def layered_result(command: str, work: StageWriter, manifest: Manifest | None) -> Result:
    """The result of a stage with one file per layer: one row per layer, from the manifest's metrics."""
    if manifest is None:
        missing = work.missing()
        note = (
            f"{len(missing)} layers are still to be done (by other processes, or with --layers): {', '.join(missing)}"
        )
        return Result(command, payload={"complete": False, "missing": missing}, notes=[note])
    rows = []
    for number, layer in enumerate(manifest.metrics["layers"]):
        flat = {name: value for name, value in layer.items() if not isinstance(value, list | dict) and name != "layer"}
        rows.append({"layer": number, "name": layer["layer"], **flat})
    payload = {"complete": True, "digest": manifest.digest, "metrics": manifest.metrics, "seconds": manifest.seconds}
    return Result(command, rows, payload, up_to_date=work.reason is None)


def layer_seed(seed: int, index: int) -> int:
    """A seed of its own for every layer, so that layer order and process count change nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "little") >> 1


def read_partition(split: Artifact, index: int) -> Partition:
    """The split of one layer."""
    tensors, _ = split.read_layer(index, ["expert_F"])
    return Partition(tensors["expert_F"].to(torch.int64))


def read_graph(graph: Artifact, index: int) -> Graph:
    """The co-activation graph of one layer."""
    tensors, _ = graph.read_layer(index)
    return Graph(tensors["indptr_F1"], tensors["indices_M"], tensors["weights_M"])


def read_tokens(activations: Artifact, index: int, max_tokens: int | None = None, seed: int = 0) -> Tokens:
    """Float32 inputs of one FFN; with `max_tokens`, that many from blocks spread at random over all of them."""
    with activations.open_layer(index) as layer:
        total = layer.shapes["inputs_TD"][0]
        blocks = [(0, total)]
        if max_tokens is not None and max_tokens < total:
            starts = torch.arange(0, total, _BLOCK)
            order = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))]
            starts = order[: -(-max_tokens // _BLOCK)].sort().values
            blocks = [(s, min(s + _BLOCK, total)) for s in starts.tolist()]

        def rows(name: str) -> Tensor:
            return torch.cat([layer.rows(name, *block) for block in blocks])[:max_tokens]

        return Tokens(rows("inputs_TD").float(), rows("weight_T"), rows("sequence_T"))


def tokens_in_memory(d_model: int, num_experts: int) -> int:
    """Tokens whose inputs and targets, and one copy of both, fit the working memory: 131,072 up to D + E = 768."""
    return _TOKEN_BYTES // (2 * 4 * (d_model + num_experts))


def training_tokens(
    config: RouterConfig, weights: ExpertWeights, activations: Artifact, index: int, seed: int
) -> tuple[Tokens, Tokens]:
    """(training, held-out) tokens of one layer: `max_tokens` of them, or what fits the working memory."""
    count = config.max_tokens or tokens_in_memory(weights.ffn.d_model, weights.num_experts)
    return read_tokens(activations, index, count, seed).split_heldout(config.heldout_fraction, seed)


def expert_weights(ffn: FFNWeights, partition: Partition) -> ExpertWeights:
    """The FFN with its neurons in expert order: shared first, then expert after expert."""
    return ExpertWeights(ffn.permute(partition.order_F()), partition.num_experts, partition.num_shared)
