"""What both exports start from: the converted model of a run, its router scales, and text to check on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefication_cli.errors import MissingArtifactError, MoEficationError
from moefication_cli.export.write import logit_spreads, random_inputs
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import MoEFolder, read_moe_folder
from moefication_cli.models.loading import check_weights
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import calibration_data, open_examples, text_reader
from moefication_cli.runs.inputs import RunModel, layer_seed, open_model, read_tokens
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

_CHECK_TOKENS, _SPREAD_TOKENS = 1024, 2048


@dataclass(frozen=True)
class Converted:
    """RUN/model, whose weights are those the experts were made for."""

    model: RunModel
    made: Artifact
    moe: MoEFolder
    checkpoint: Checkpoint
    activations: Artifact | None


def open_converted(run: RunDir, to: str, control: Control) -> Converted:
    """Raises MissingArtifactError, CorruptArtifactError."""
    if run.manifest("model") is None:
        raise MissingArtifactError(
            f"{run.path('model')} has not been made: export needs a converted model",
            f"run `moefication apply {run.root} --for {to}` first",
        )
    model, made = open_model(run, None, control), run.require("model")
    moe = read_moe_folder(made.path)
    check_weights(made.path, moe)
    checkpoint = Checkpoint(made.path, ffn=run.info.ffn, trust_remote_code=control.trust_remote_code)
    activations = run.require("activations") if run.manifest("activations") is not None else None
    return Converted(model, made, moe, checkpoint, activations)


def export_lock(run: RunDir, out: Path) -> Path:
    """In the run directory: a refused export leaves nothing beside `out`."""
    return run.root / ".locks" / f"export-{jsonio.digest(str(out.absolute()))[:16]}.lock"


@contextmanager
def work_folder(run: RunDir, out: Path) -> Iterator[Path]:
    """A folder to write in, beside `out`, removed in the end. LockedError where another process exports the run to `out`."""
    files.make_dirs(out.parent)
    with locks.held(export_lock(run, out), str(out), timeout=0.0):
        partial = out.with_name(f".{out.name}.partial")
        files.remove(partial)
        try:
            yield partial
        finally:
            files.remove(partial)


def is_half(checkpoint: Checkpoint) -> bool:
    """Whether weights are stored in 16 bits."""
    return any(name in str(checkpoint.config.dtype) for name in ("bfloat16", "float16"))


def refuse_unless_forced(faults: list[str], control: Control) -> None:
    """Raise MoEficationError that names the faults, or warn of them under --force."""
    if not faults:
        return
    said = "the exported model is not the converted one: " + "; ".join(faults)
    if not control.force:
        raise MoEficationError(said, "nothing was written; --force writes it all the same")
    control.say(f"warning: {said}; written because of --force")


def router_spreads(source: Converted, control: Control) -> list[float]:
    """Standard deviation of each layer's router logits, on calibration data where there is any."""
    checkpoint, moe, activations = source.checkpoint, source.moe, source.activations
    if activations is None:
        control.say("no activations: router scales are set on random inputs")
        return logit_spreads(moe, random_inputs(checkpoint))
    seeds = [layer_seed(control.seed, site.index) for site in checkpoint.sites]
    inputs = [read_tokens(activations, i, _SPREAD_TOKENS, seed).x_TD for i, seed in enumerate(seeds)]
    return logit_spreads(moe, inputs)


def check_tokens(run: RunDir, source: Converted, control: Control) -> list[Tensor]:
    """Token ids [1, L] of calibration text, about a thousand; random ones where the run has no data."""
    model, activations = source.model, source.activations
    if activations is None:
        control.say("no activations: the export is checked on random tokens")
        generator = torch.Generator().manual_seed(control.seed)
        return [torch.randint(model.checkpoint.config.vocab_size, (1, 64), generator=generator) for _ in range(4)]
    quiet = Control(device="cpu", seed=control.seed)
    examples = open_examples(run, text_reader(model), calibration_data(run, model, activations), quiet)
    batches, tokens = [], 0
    for batch in examples.calibration(_CHECK_TOKENS, control.seed, 1):
        mask_BL = batch.inputs.get("attention_mask")
        ids_BL = batch.inputs["input_ids"]
        batches.append(ids_BL if mask_BL is None else ids_BL[:, mask_BL[0].bool()])
        tokens += batch.num_tokens
        if tokens >= _CHECK_TOKENS:
            break
    return [ids_BL for ids_BL in batches if ids_BL.shape[1] > 1]
