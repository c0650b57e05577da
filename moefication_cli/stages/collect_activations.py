"""collect-activations: run the model over data; store every FFN's inputs and its neurons' statistics.

Works in shards of the sampled sequences: each finished shard is on disk, so a killed run resumes at the next one. The
inputs of a shard go behind those of the shard before it, into files (a *chain*) that become the layer files in the end;
only where several processes collect at the same time do shards begin chains of their own, which the end then joins.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moefication_cli.config import CollectConfig
from moefication_cli.errors import ConfigError, MoEficationError, NonFiniteError
from moefication_cli.models.capture import capture
from moefication_cli.models.heads import checked_task
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.sensitivity import (
    backward_embeddings,
    backward_sampled,
    gradient_norms,
    predicted_weights,
    token_weights,
)
from moefication_cli.models.sites import FFNSite
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import GRADIENT_TOKENS, SHARD_BYTES, collect_cost
from moefication_cli.runs.data import data_inputs, load_whole, open_examples, predictions
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.generated import generated_data
from moefication_cli.runs.inputs import (
    RunModel,
    absolute,
    as_before,
    layer_options,
    layer_seed,
    layered_result,
    open_model,
)
from moefication_cli.runs.room import check_room
from moefication_cli.split.profiles import neuron_sums
from moefication_cli.store.growing import GrowingLayer
from moefication_cli.store.layerfile import read_layer, read_metadata, write_layer
from moefication_cli.store.partial import GROWING
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.writer import StageWriter
from moefication_cli.tasks.examples import Batch

# A backward pass costs as much as a forward one: it runs on every 32nd batch, and on the first so that small data has some.
# By default these are the longest of each block of sequences sorted by length: token weights learnt from sequences of all
# lengths in equal number kept less of the model's quality.
_GRADIENT_EVERY, _GRADIENT_FIRST = 32, 2
_UNKNOWN = -1.0  # gradient norm of a token of the other batches


def collect_activations(run: RunDir, config: CollectConfig, control: Control = Control()) -> Result:
    """Store inputs_TD (real tokens only) and sequence_T per FFN, with rate, mean, variance and contribution per neuron.

        collect_activations(RunDir("RUN"), CollectConfig(model="MODEL", data="calibration.txt"))

    Writes RUN/activations/layer_NNN.safetensors. Raises ConfigError (model, data, fields), NonFiniteError naming the
    layer.
    """
    model = open_model(run, config, control)
    config = as_before(run, "activations", config)
    config = replace(config, data=absolute(generated_data(run, model, config, control)))
    checked_task(model.checkpoint.config, config.task or run.info.task, model.checkpoint.source.ref)
    cost = collect_cost(model, config)
    if control.dry_run:
        return estimate("collect-activations", model, run.path("activations"), cost)
    options = layer_options(config, control, model, {}, data_inputs(run, model, config))
    options = replace(options, only=None)
    with control.ranks.begin(run, "activations", options) as work:
        check_room(work, model, cost, control, "--offload, --no-sensitivity or a smaller --max-tokens")
        seconds = None
        if not work.up_to_date:
            started = time.perf_counter()
            count = _run_shards(run, model, work, config, control)
            seconds = time.perf_counter() - started
            for index in control.track(work.pending(), "join", len(model.sites)):
                _join(work, model, index, count, config)
        manifest = control.ranks.finish(work, seconds)
    return layered_result("collect-activations", work, manifest)


def _run_shards(run: RunDir, model: RunModel, work: StageWriter, config: CollectConfig, control: Control) -> int:
    """Make every shard that is not there yet; returns how many there are."""
    offload = work.scratch / f"offload_{control.ranks.rank}" if config.offload else None
    loaded = load_whole(run, model, config.task, config.dtype, offload)
    examples = open_examples(run, loaded, config, control)
    per_token = sum(site.d_model for site in model.sites) * getattr(torch, config.storage_dtype).itemsize
    for wait in (
        False,
        True,
    ):  # first the free shards; then wait for those of other processes, which a dead one leaves free
        batches = examples.calibration(config.max_tokens, control.seed, config.batch_size)
        count = busy = 0
        for shard in control.track(_shards(batches, max(1, SHARD_BYTES // per_token)), "collect-activations"):
            path = _shard_path(work, shard.number, config)
            if not path.exists():  # it does if this or another process was here before
                with work.lock(path.stem, wait) as ours:
                    if ours and not path.exists():
                        collect_shard(loaded, model.sites, work, shard, config, control.seed)
                    busy += not ours
            count += 1
        if not busy:
            break
    if count == 0:
        raise ConfigError(
            f"{config.data}: there is nothing to run the model on", "raise --max-tokens or check the data"
        )
    return count


@dataclass
class _Shard:
    """Batches that are collected together; the numbers of the first of all rows and batches are in the whole sample."""

    number: int
    first_row: int
    first_batch: int
    batches: list[Batch]


def _shards(batches: Iterator[Batch], max_tokens: int) -> Iterator[_Shard]:
    shard, tokens = _Shard(0, 0, 0, []), 0
    for batch in batches:
        shard.batches.append(batch)
        tokens += batch.num_tokens
        if tokens >= max_tokens:
            yield shard
            rows = sum(_num_rows(batch) for batch in shard.batches)
            shard = _Shard(shard.number + 1, shard.first_row + rows, shard.first_batch + len(shard.batches), [])
            tokens = 0
    if shard.batches:
        yield shard


def _num_rows(batch: Batch) -> int:
    return len(batch.inputs["input_ids"])


def _shard_path(work: StageWriter, number: int, config: CollectConfig) -> Path:
    """Everything of one shard but the inputs, and where those are; written when they are on disk."""
    return work.scratch / f"shard_{number:05d}_batch_{config.batch_size}.safetensors"  # the batch decides what is in it


def _open_inputs(work: StageWriter, chain: int, site: FFNSite, config: CollectConfig) -> GrowingLayer:
    """The inputs of one FFN in the shards of a chain, which is named after its first."""
    path = work.scratch / f"inputs_{chain:05d}_batch_{config.batch_size}_layer_{site.index:03d}{GROWING}"
    if chain == 0:
        work.move_back(site.index, path)
    return GrowingLayer(path, site.d_model, getattr(torch, config.storage_dtype))


def _place(work: StageWriter, number: int, sites: Sequence[FFNSite], config: CollectConfig) -> tuple[int, list[int]]:
    """(chain, first row in it per layer) of a shard: behind the one before it, which no other process then can be."""
    previous = _shard_path(work, number - 1, config)
    if number == 0 or not previous.exists():
        return number, [0] * len(sites)
    found = read_metadata(previous)
    return found["chain"], found["stop"]


def collect_shard(
    loaded: LoadedModel, sites: Sequence[FFNSite], work: StageWriter, shard: _Shard, config: CollectConfig, seed: int
) -> None:
    """Run the batches of one shard and write its inputs and sums to scratch. Raises NonFiniteError naming the layer."""
    dtype = getattr(torch, config.storage_dtype)
    chain, start = _place(work, shard.number, sites, config)
    stop, first_row = list(start), shard.first_row
    sequences: list[list[Tensor]] = [[] for _ in sites]
    sums = [torch.zeros(4, site.num_neurons, dtype=torch.float64) for site in sites]
    norms: list[list[Tensor]] = [[] for _ in sites]
    # Of the batch in progress: the sequence each token of a stack belongs to
    rows: dict[Literal["encoder", "decoder"], Tensor] = {"encoder": torch.empty(0), "decoder": torch.empty(0)}

    def on_input(site: FFNSite, x_TD: Tensor) -> None:
        stored_TD = x_TD.to(device="cpu", dtype=dtype)
        if not torch.isfinite(stored_TD.sum(dtype=torch.float32)):
            raise _non_finite(site, x_TD, config)
        if site.index in files:
            files[site.index].write(stop[site.index], stored_TD)
        stop[site.index] += len(stored_TD)
        sequences[site.index].append(rows[site.stack])

    def on_hidden(site: FFNSite, h_TF: Tensor) -> None:
        sums[site.index] += neuron_sums(h_TF)

    def on_gradient(site: FFNSite, norm_T: Tensor) -> None:
        norms[site.index].append(norm_T)

    # Nobody reads the logits of these passes: where the model can leave them out, all but one position's are
    no_logits = {"logits_to_keep": 1} if "logits_to_keep" in signature(loaded.model.forward).parameters else {}
    loaded.model.requires_grad_(False)
    with ExitStack() as stack:
        # Layers that an earlier run has finished have nothing to grow
        files = {i: stack.enter_context(_open_inputs(work, chain, sites[i], config)) for i in work.unfinished()}
        mask = stack.enter_context(capture(loaded.model, sites, on_input, on_hidden))
        for number, batch in enumerate(shard.batches, shard.first_batch):
            measured = config.sensitivity and (number % _GRADIENT_EVERY == 0 or number < _GRADIENT_FIRST)
            for piece in batch.pieces(GRADIENT_TOKENS) if measured else [batch]:
                for side in rows:
                    rows[side] = _sequence_of_tokens(piece, side, first_row)
                inputs = piece.to(loaded.device).inputs
                if measured:
                    with gradient_norms(loaded.model, sites, on_gradient, mask):
                        answers, drawn = piece.answers(loaded.model(**inputs)), layer_seed(seed, first_row)
                        if piece.pool_RT is None:
                            backward_sampled(*predictions(answers, piece), drawn)
                        else:
                            backward_embeddings(answers, drawn)
                else:
                    with torch.no_grad():
                        loaded.model(**inputs, **no_logits)
                    for site in sites:
                        norms[site.index].append(torch.full((len(rows[site.stack]),), _UNKNOWN))
                first_row += _num_rows(piece)
        for file in files.values():
            file.sync()
    tensors: dict[str, Tensor] = {}
    for site in sites:
        if not torch.isfinite(sums[site.index]).all():
            raise NonFiniteError(
                f"layer {site.index} ({site.name}): activations contain NaN or infinity", "try --dtype float32"
            )
        tensors[f"{site.index}.sequence_T"] = torch.cat(sequences[site.index])
        tensors[f"{site.index}.sums"] = sums[site.index]
        tensors[f"{site.index}.norm_T"] = torch.cat(norms[site.index])
    where = {"layer": "all", "chain": chain, "start": start, "stop": stop}
    write_layer(_shard_path(work, shard.number, config), tensors, where)


def _sequence_of_tokens(batch: Batch, stack: Literal["encoder", "decoder"], first_row: int) -> Tensor:
    """The sequence number of every real token of one stack, in the order `capture` delivers them."""
    mask = batch.mask_of(stack)
    counts = torch.zeros(0, dtype=torch.int64) if mask is None else mask.sum(1).long()
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32) + first_row, counts)


def _non_finite(site: FFNSite, x_TD: Tensor, config: CollectConfig) -> MoEficationError:
    where = f"layer {site.index} ({site.name})"
    if torch.isfinite(x_TD).all():
        return NonFiniteError(
            f"{where}: inputs do not fit {config.storage_dtype}", "store them with --storage-dtype bfloat16"
        )
    return NonFiniteError(
        f"{where}: the FFN's inputs contain NaN or infinity", "check the model, or try --dtype float32"
    )


def _join(work: StageWriter, model: RunModel, index: int, num_shards: int, config: CollectConfig) -> None:
    """One layer's file from all shards, and its neurons' statistics."""
    site = model.sites[index]
    sequences, norms, total, num_tokens = [], [], torch.zeros(4, site.num_neurons, dtype=torch.float64), 0
    with _open_inputs(work, 0, site, config) as file:
        for number in range(num_shards):
            names = [f"{index}.sequence_T", f"{index}.sums", f"{index}.norm_T"]
            tensors, where = read_layer(_shard_path(work, number, config), names)
            sequences.append(tensors[names[0]])
            total += tensors[names[1]]
            norms.append(tensors[names[2]])
            start, stop = where["start"][index], where["stop"][index]
            if where["chain"] != 0:
                with _open_inputs(work, where["chain"], site, config) as other:
                    file.write(num_tokens, other.rows(start, stop - start))
            num_tokens += stop - start
        norms_F = model.read_ffn(index).w_down_FD.norm(dim=1).double().cpu()
        active_F, sum_F, square_F, absolute_F = total / num_tokens
        sequence_T, weight_T = torch.cat(sequences), torch.ones(num_tokens)
        if config.sensitivity:
            norm_T = torch.cat(norms)
            sample_S = (norm_T != _UNKNOWN).nonzero().squeeze(1)
            weight_S = token_weights(norm_T[sample_S], sequence_T[sample_S])
            weight_T = predicted_weights(file.rows(0, num_tokens), weight_S, sample_S)
        if not torch.isfinite(weight_T).all():
            raise NonFiniteError(
                f"layer {index} ({model.names[index]}): gradients contain NaN or infinity", "--no-sensitivity"
            )
        tensors = {
            "sequence_T": sequence_T,
            "weight_T": weight_T,
            "rate_F": active_F.float(),
            "mean_F": sum_F.float(),
            "variance_F": (square_F - sum_F.square()).clamp_min(0).float(),
            "contribution_F": (absolute_F * norms_F).float(),
        }
        file.complete("inputs_TD", num_tokens, tensors, {"layer": model.names[index]})
    metrics = {
        "tokens": num_tokens,
        "sequences": len(torch.unique(sequence_T)),
        "firing": float(active_F.mean()),
        "dead_neurons": int((active_F == 0).sum()),
    }
    work.move_in(index, file.path, metrics)
