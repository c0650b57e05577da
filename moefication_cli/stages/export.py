"""export: write a converted model as a native MoE checkpoint, which stock transformers and other engines load."""

from pathlib import Path

import torch
from torch import Tensor

from moefication_cli.config import ExportConfig
from moefication_cli.errors import ConfigError, MissingArtifactError, MoEficationError
from moefication_cli.export.card import model_card
from moefication_cli.export.check import Comparison, compare
from moefication_cli.export.write import logit_spreads, random_inputs, write_native
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import MoEFolder, read_moe_folder
from moefication_cli.models.loading import check_weights
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.data import calibration_data, open_examples, text_reader
from moefication_cli.runs.inputs import RunModel, layer_seed, open_model, read_tokens
from moefication_cli.store import files
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

_CHECK_TOKENS, _SPREAD_TOKENS = 1024, 2048


def export(run: RunDir, config: ExportConfig, control: Control = Control()) -> Result:
    """Write RUN/model in the format `to` to the folder `out`, run both on calibration text, and keep it if they agree.

    Raises ConfigError (a model or plan that the format cannot hold, a folder with files in it), MissingArtifactError,
    CorruptArtifactError, MoEficationError where the exported model does not do what the converted one does.
    """
    if config.to is None or config.out is None:
        raise ConfigError("export needs a format and a folder", "--to mixtral --out DIR")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and not an empty folder", "name another folder")
    if run.manifest("model") is None:
        raise MissingArtifactError(
            f"{run.path('model')} has not been made: export needs a converted model",
            f"run `moefication apply {run.root} --for {config.to}` first",
        )
    model, made = open_model(run, None, control), run.require("model")
    folder = made.path
    moe = read_moe_folder(folder)
    check_weights(folder, moe)
    checkpoint = Checkpoint(folder, ffn=run.info.ffn, trust_remote_code=control.trust_remote_code)
    activations = run.require("activations") if run.manifest("activations") is not None else None
    partial = out.with_name(f".{out.name}.partial")
    files.remove(partial)
    try:
        written = write_native(checkpoint, moe, config.to, _spreads(checkpoint, moe, activations, control), partial)
        batches = _check_tokens(run, model, activations, control)
        found = compare(folder, partial, moe, batches)
        _judge(found, checkpoint, config, control)
        card = model_card(run, made, config.to, found)
        files.atomic_write(partial / "README.md", card.encode())
        if out.exists():
            out.rmdir()
        with files.writing(out):
            files.replace(partial, out)
    except BaseException:
        files.remove(partial)
        raise
    size = sum((out / path.name).stat().st_size for path in written)
    row = {"format": config.to, "megabytes": size / 1e6, **found.row()}
    notes = [f"{out} loads with AutoModelForCausalLM.from_pretrained, without this package"]
    return Result("export", [row], {"path": str(out)}, notes=notes)


def _judge(found: Comparison, checkpoint: Checkpoint, config: ExportConfig, control: Control) -> None:
    half = any(name in str(checkpoint.config.dtype) for name in ("bfloat16", "float16"))
    faults = found.faults(half)
    if not faults:
        return
    said = "the exported model is not the converted one: " + "; ".join(faults)
    if not control.force:
        raise MoEficationError(said, "nothing was written; --force writes it all the same")
    control.say(f"warning: {said}; written because of --force")


def _spreads(checkpoint: Checkpoint, moe: MoEFolder, activations: Artifact | None, control: Control) -> list[float]:
    if activations is None:
        control.say("no activations: router scales are set on random inputs")
        return logit_spreads(moe, random_inputs(checkpoint))
    seeds = [layer_seed(control.seed, site.index) for site in checkpoint.sites]
    inputs = [read_tokens(activations, i, _SPREAD_TOKENS, seed).x_TD for i, seed in enumerate(seeds)]
    return logit_spreads(moe, inputs)


def _check_tokens(run: RunDir, model: RunModel, activations: Artifact | None, control: Control) -> list[Tensor]:
    """Token ids [1, L] of calibration text, about a thousand; random ones where the run has no data."""
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
