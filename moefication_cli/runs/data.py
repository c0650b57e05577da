"""From a run's data and task options to `Examples`; what the user said once is remembered in run.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moefication_cli.config import CollectConfig, EvalConfig
from moefication_cli.config.option import list_text
from moefication_cli.errors import ConfigError, StaleArtifactError
from moefication_cli.models.folder.contents import tokenizer_digest
from moefication_cli.models.folder.sentence import pooling_of
from moefication_cli.models.folder.source import Source
from moefication_cli.models.heads import checked_task
from moefication_cli.models.loading import LoadedModel, load_model, load_tokenizer
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import named_data
from moefication_cli.tasks.examples import NOT_ASKED, Batch, Examples, TaskOptions
from moefication_cli.tasks.reading import data_digest, load_rows
from moefication_cli.tasks.task import prepare


@dataclass(frozen=True)
class TextReader:
    """What turns text into a model's input: its tokenizer, its configuration and where both came from."""

    tokenizer: Any
    config: Any
    source: Source


def text_reader(model: RunModel) -> TextReader:
    """The reader of a run's model, whose weights stay on disk. Raises ConfigError without a usable tokenizer."""
    checkpoint = model.checkpoint
    words = load_tokenizer(checkpoint.source, checkpoint.trust_remote_code)
    return TextReader(words, checkpoint.config, checkpoint.source)


def open_examples(
    run: RunDir,
    reader: LoadedModel | TextReader,
    config: CollectConfig | EvalConfig,
    control: Control,
    labelled: bool | None = None,
) -> Examples:
    """The rows `config.data` names, as examples of the run's task. Says on stderr what was guessed.

    `labelled` examples have labels; by default those to evaluate on.

    Raises ConfigError: no data, no such field, a task the model cannot do.
    """
    examples, said = _read_examples(run, reader, config, control, labelled)
    run.note(**said)
    return examples


def check_evaluation_data(run: RunDir, model: RunModel, config: EvalConfig, control: Control) -> None:
    """Raise ConfigError where `eval` would: data that is not there or cannot be read, labels that the model has not."""
    reader = text_reader(model)
    for data in named_data(config.data).values():
        _read_examples(run, reader, replace(config, data=data), Control(seed=control.seed))


def _read_examples(
    run: RunDir,
    reader: LoadedModel | TextReader,
    config: CollectConfig | EvalConfig,
    control: Control,
    labelled: bool | None = None,
) -> tuple[Examples, dict[str, Any]]:
    """The examples, and what of run.json they settle."""
    purpose = _purpose(config)
    if config.data is None:
        raise ConfigError("no data was named", "name a file or hub dataset with --data")
    info = run.info
    known = dict(info.fields or {})
    asked = config.task or info.task
    task = checked_task(reader.config, asked, reader.source.ref)
    if asked is None:
        control.say(f"task: {task} (guessed from {reader.config.architectures[0]})")
    prompt, words = config.prompt or info.prompt, list_text(config.label_words) or info.label_words
    said = {"text_field": list_text(config.text_field), "label_field": config.label_field}
    said["max_length"] = config.max_length  # type: ignore[assignment]
    fields: dict[str, Any] = {name: value or known.get(name) for name, value in said.items()}
    rows = load_rows(
        config.data,
        split=config.split,
        text_field=fields["text_field"],
        label_field=fields["label_field"],
        header=config.header,
        documents=config.documents,
        purpose=purpose,
        stream=config.stream,
    )
    options = TaskOptions(fields["max_length"], prompt, words, config.limit, control.seed)
    notes = list(rows.notes)
    if task == "embedding":
        pooling, said_of_it = pooling_of(reader.source.folder)
        options, notes = replace(options, pooling=pooling), [*notes, *said_of_it]
    labelled = purpose == "evaluate" if labelled is None else labelled
    examples = prepare(task, reader.tokenizer, reader.config, rows, options, require_labels=labelled)  # type: ignore[arg-type]
    for note in [*notes, *examples.notes]:
        control.say(note)
    settled = {name: value for name, value in fields.items() if value is not None}
    return examples, {"task": task, "prompt": prompt, "label_words": words, "fields": settled or None}


def data_inputs(run: RunDir, model: RunModel, config: CollectConfig | EvalConfig) -> dict[str, str]:
    """Digests of what a stage that runs the model on data depends on besides other stages: the data and the tokenizer.

    Raises ConfigError where no data is named or it is not there.
    """
    if config.data is None:
        raise ConfigError("no data was named", "name a file or hub dataset with --data")
    digest = data_digest(config.data, config.split, _purpose(config), run.hashes.sha256, config.stream)
    return {"data": digest, "tokenizer": tokenizer_digest(model.checkpoint.folder, run.hashes.sha256)}


def _purpose(config: CollectConfig | EvalConfig) -> Literal["calibrate", "evaluate"]:
    return "calibrate" if isinstance(config, CollectConfig) else "evaluate"


def predictions(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The logits that are predictions, and which of them are real: per sequence, per masked token, or per token but the last."""
    if logits.dim() == 2:
        return logits, None
    if batch.labels_RT is not None:
        return logits, batch.labels_RT != NOT_ASKED
    if "decoder_input_ids" in batch.inputs:
        mask = batch.inputs.get("decoder_attention_mask")
        return logits, None if mask is None else mask.bool()
    mask = batch.inputs.get("attention_mask")
    return logits[:, :-1], None if mask is None else mask[:, 1:].bool()


def flat_predictions(logits: Tensor, batch: Batch) -> Tensor:
    """The real predictions of a batch in one row each, [P, C], float32."""
    found, real = predictions(logits, batch)
    flat_PC = found.flatten(0, -2).float()
    return flat_PC if real is None else flat_PC[real.flatten().to(flat_PC.device)]


def load_whole(
    run: RunDir, model: RunModel, task: str | None = None, dtype: str | None = None, offload: Path | None = None
) -> LoadedModel:
    """The run's dense model in memory, for the stages that run it as a whole; with `offload`, a folder, as accelerate places it."""
    return load_model(
        model.checkpoint.folder,
        task=task or run.info.task,
        device=model.device,
        dtype=dtype,
        trust_remote_code=model.checkpoint.trust_remote_code,
        quiet=True,
        device_map=None if offload is None else "auto",
        offload_folder=offload,
    )


def calibration_data(run: RunDir, model: RunModel, activations: Artifact) -> CollectConfig:
    """The options the activations were collected with: the same data, read again.

    Raises StaleArtifactError when the data or the tokenizer changed since.
    """
    config = CollectConfig.recorded(activations.config)
    recorded = activations.manifest.inputs
    for name, digest in data_inputs(run, model, config).items():
        if recorded.get(name, digest) != digest:  # versions before 0.2 did not record it
            what = f"the calibration data {config.data}" if name == "data" else "the model's tokenizer"
            raise StaleArtifactError(
                f"{what} changed since `activations` were collected", f"run `{run.command('activations')}`"
            )
    return config


def tokens_of_stacks(batch: Batch) -> dict[str, int]:
    """Real tokens each stack reads, under the names `FFNSite.stack` has."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    masks = {stack: batch.mask_of(stack) for stack in stacks}
    return {stack: 0 if mask is None else int(mask.sum()) for stack, mask in masks.items()}
