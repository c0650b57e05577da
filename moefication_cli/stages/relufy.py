"""relufy: a ReLU model from a dense one, which `run` then converts with little loss. Writes a Hugging Face folder, no run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefication_cli.config import RelufyConfig, compared_values, recorded_values
from moefication_cli.config.option import list_text
from moefication_cli.errors import ConfigError, CorruptArtifactError, MoEficationError, NonFiniteError
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.contents import tokenizer_digest
from moefication_cli.models.folder.permuted import copy_side_files
from moefication_cli.models.heads import checked_task, task_of, with_classifier
from moefication_cli.models.loading import LoadedModel, load_model, load_tokenizer, resolve_device
from moefication_cli.models.memory import total_memory
from moefication_cli.models.relu import SPARSE, relu_config, save_model, zero_intermediate_biases
from moefication_cli.models.sites import find_sites
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import relufy_cost, relufy_fixed_memory
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store import files
from moefication_cli.store.options import StageOptions
from moefication_cli.store.output import Output, begin_output
from moefication_cli.tasks.examples import Batch, Examples, TaskOptions
from moefication_cli.tasks.parts import split_rows
from moefication_cli.tasks.reading import data_digest, load_rows
from moefication_cli.tasks.task import prepare
from moefication_cli.training.alternate import layer_costs, lengths, phases
from moefication_cli.training.relufy import Measured, measure, num_steps, train_batches, train_relu

_TEXT = ("lm", "mlm")  # tasks whose rows are pieces of text
_COLUMNS = ("name", "active_before", "active_swapped", "active_after")
_HELDOUT, _MOST_HELDOUT = 0.05, 2000  # share of the rows, and examples
_LESS = "a smaller --batch-size with a larger --accumulate, a shorter --max-length, or no --teacher"


@dataclass(frozen=True)
class Data:
    """What is trained on, and what the model is measured on."""

    train: Examples
    judge: Examples


def relufy(out: str | Path, config: RelufyConfig, control: Control = Control()) -> Result:
    """Write the ReLU model of `config.model`, trained on `config.data`, to the folder `out`.

        relufy("OUT", RelufyConfig(model="MODEL", data="train.tsv", eval_data="dev.tsv"))

    One row per FFN: the share of neurons that are not zero in the model as it was, with ReLU put in, and after training.
    Raises ConfigError (no or too little data, labels outside the set, a folder made with other options),
    UnsupportedModelError (an activation that cannot be changed), NonFiniteError, MoEficationError (memory).
    """
    model, config = _opened(config, control)
    relu = relu_config(_headed(model, config), config.ffn, control.trust_remote_code)
    if control.dry_run:
        return estimate("relufy", model, Path(out), relufy_cost(model, config))
    options = StageOptions(
        config=recorded_values(config) | {"seed": control.seed},
        compared=[*compared_values(config), "seed"],
        sources=control.sources.get(RelufyConfig, {}),
        inputs=_inputs(model, config),
        force=control.force,
        device=str(model.device),
    )
    with begin_output(Path(out), "relufy", options) as work:
        up_to_date = work.manifest is not None
        manifest = work.manifest or work.finish(_make(work, model, relu, config, control))
    metrics = manifest.metrics
    rows = [{"layer": n, **{name: layer[name] for name in _COLUMNS}} for n, layer in enumerate(metrics["activity"])]
    payload = {"path": str(out), "digest": manifest.digest, "metrics": dict(metrics), "seconds": manifest.seconds}
    return Result("relufy", rows, payload, up_to_date=up_to_date, notes=[_summary(metrics)])


def _opened(config: RelufyConfig, control: Control) -> tuple[RunModel, RelufyConfig]:
    """The model's files, and the options with the task settled. Raises ConfigError for what does not go together."""
    if config.model is None or config.data is None:
        raise ConfigError("relufy needs a model and data", "--model MODEL --data DATA")
    if config.sparsity is None and config.sparsity_weight is not None:
        raise ConfigError("--sparsity-weight is the weight of a penalty, and there is none", "--sparsity hoyer")
    if config.schedule is None and (config.sparse_fraction, config.expert_size) != (None, None):
        raise ConfigError(
            "--sparse-fraction and --expert-size are of sparse phases, and there are none", "--schedule 300:300"
        )
    if config.schedule is not None:
        lengths(config.schedule)
    if config.teacher is None and not config.task_weight:
        raise ConfigError("--task-weight 0 leaves nothing to learn", "name a --teacher")
    checkpoint = Checkpoint(config.model, config.revision, config.ffn, control.trust_remote_code)
    if config.task == "classification" and config.classes is None and task_of(checkpoint.config) != config.task:
        raise ConfigError(
            f"{checkpoint.source.ref} has no classifier", "name the classes of a new one: --classes negative,positive"
        )
    model = RunModel(checkpoint, checkpoint.fingerprint(), resolve_device(control.device))
    if config.schedule is not None:
        layer_costs(model.sites, config)
    task = checked_task(_headed(model, config), config.task, checkpoint.source.ref)
    if task == "embedding":
        raise ConfigError(
            f"{checkpoint.source.ref} is an encoder without a head, and relufy trains with one",
            "relufy the masked language model or the classifier that it comes from",
        )
    if config.classes is not None and config.teacher == "original":
        raise ConfigError("--teacher original: with new --classes the model has nothing to teach", "name another one")
    return model, replace(config, task=task)  # type: ignore[arg-type]


def _headed(model: RunModel, config: RelufyConfig) -> Any:
    """The model's configuration, with a new classifier where `--classes` names its classes."""
    own = model.checkpoint.config
    return own if config.classes is None else with_classifier(own, config.classes)


def _inputs(model: RunModel, config: RelufyConfig) -> dict[str, str]:
    """Digests of everything the result depends on."""
    found = {"base_model": model.fingerprint, "tokenizer": tokenizer_digest(model.checkpoint.folder, files.sha256)}
    found["data"] = data_digest(str(config.data), config.split, "calibrate", files.sha256, config.stream)
    if config.eval_data is not None:
        found["eval_data"] = data_digest(config.eval_data, config.eval_split, "evaluate", files.sha256, config.stream)
    if config.teacher == "original":
        found["teacher"] = model.fingerprint
    elif config.teacher is not None:
        found["teacher"] = Checkpoint(config.teacher).fingerprint()
    return found


def _make(work: Output, model: RunModel, relu: Any, config: RelufyConfig, control: Control) -> dict[str, Any]:
    """Measure, train, measure, and write the folder; returns the metrics."""
    tokenizer = load_tokenizer(model.checkpoint.source, control.trust_remote_code)
    data = _read(tokenizer, model, config, control)
    batches = train_batches(data.train, config, str(config.data))
    turns = [] if config.schedule is None else phases(config.schedule, num_steps(config, len(batches)))
    if turns and config.sparsity is not None:
        control.say("--sparsity acts in dense phases only: in sparse ones few activations are computed")
    _check_memory(model, config, batches, control)
    original = _load(model, config, control)
    before = measure(original, find_sites(original.model, config.ffn), data.judge, config.batch_size, control, "before")
    teacher = _teacher(original, tokenizer, config, control)
    del original
    loaded = _load(model, config, control, relu)
    sites = find_sites(loaded.model, config.ffn)
    frozen = [] if config.intermediate_bias else zero_intermediate_biases(loaded.model, sites)
    if not config.intermediate_bias and not frozen:
        control.say("--no-intermediate-bias changes nothing: this model has no such biases")
    swapped = measure(loaded, sites, data.judge, config.batch_size, control, "ReLU put in")
    control.say(f"{before.summary.metric} {before.summary.value:.4g}, with ReLU put in {swapped.summary.value:.4g}")
    trained = train_relu(loaded, sites, data.train, batches, teacher, config, work.scratch / "trainer", control, turns)
    if trained.resumed:
        control.say(f"went on from step {trained.resumed}")
    dtype = model.checkpoint.stored_dtype(f"{model.sites[0].up}.weight")
    _round(loaded.model, dtype)
    after = measure(loaded, sites, data.judge, config.batch_size, control, "after")
    _write(work.folder, loaded.model.to(dtype), model, config, control)
    spent = sum(phase["steps"] * phase["ffn_flops_fraction"] for phase in trained.phases) / trained.steps
    alternated = {"phases": trained.phases, "training_ffn_flops_fraction": spent} if turns else {}
    metrics = {"metric": before.summary.metric, "examples": before.summary.num_examples, "before": before.row()}
    return (
        metrics
        | alternated
        | {
            "swapped": swapped.row(),
            "after": after.row(),
            "activity": _activity([site.name for site in sites], before, swapped, after),
            "steps": trained.steps,
            "resumed": trained.resumed,
            "tokens": trained.tokens,
            "seed": control.seed,
            "zero_biases": len(frozen),
            "activation": model.sites[0].activation,
        }
    )


def _activity(names: Sequence[str], before: Measured, swapped: Measured, after: Measured) -> list[dict[str, Any]]:
    shares = zip(names, before.active, swapped.active, after.active, strict=True)
    return [{"name": n, "active_before": b, "active_swapped": s, "active_after": a} for n, b, s, a in shares]


def _read(tokenizer: Any, model: RunModel, config: RelufyConfig, control: Control) -> Data:
    """Raises ConfigError: no such data or field, labels that the model has not, too little to hold some out."""
    task, judged = str(config.task), config.eval_data
    fields = {"text_field": list_text(config.text_field), "label_field": config.label_field}
    options = TaskOptions(config.max_length, config.prompt, list_text(config.label_words), config.limit, control.seed)
    if config.steps is not None:  # not more than will be read
        wanted = config.steps * config.accumulate * config.batch_size
        options = replace(options, limit=min(wanted, config.limit or wanted))
    shared = {"header": config.header, "documents": config.documents, "stream": config.stream, **fields}
    rows = load_rows(str(config.data), split=config.split, purpose="calibrate", **shared)  # type: ignore[arg-type]
    if judged is None:
        learn, judge = split_rows(rows, options, task in _TEXT, _HELDOUT, _MOST_HELDOUT)
    else:
        others = load_rows(judged, split=config.eval_split, purpose="evaluate", **shared)  # type: ignore[arg-type]
        learn, judge = (rows, options), (others, replace(options, limit=config.eval_limit))

    def examples(part: Any, labelled: bool) -> Examples:
        made = prepare(task, tokenizer, headed, *part, require_labels=labelled)  # type: ignore[arg-type]
        said.update(dict.fromkeys([*part[0].notes, *made.notes]))
        return made

    said: dict[str, None] = {}
    headed = _headed(model, config)
    found = Data(examples(learn, config.task_weight > 0), examples(judge, True))
    for note in said:
        control.say(note)
    return found


def _check_memory(model: RunModel, config: RelufyConfig, batches: Sequence[Batch], control: Control) -> None:
    """Raise MoEficationError where weights and optimiser cannot fit; say so where the largest batch may not."""
    largest = max(batch.inputs["input_ids"].numel() for batch in batches)
    there, gib = total_memory(model.device), 2**30
    fixed, all_in_all = relufy_fixed_memory(model, config), relufy_cost(model, config, largest).memory
    if fixed > there:
        raise MoEficationError(
            f"training needs at least {fixed / gib:.1f} GiB of memory (weights, gradients, AdamW) and there are "
            f"{there / gib:.1f}",
            "use a smaller model, a machine with more, or no --teacher",
        )
    if all_in_all > there:
        control.say(f"warning: about {all_in_all / gib:.1f} GiB of memory are needed and there are {there / gib:.1f}: "
                    f"less is needed with {_LESS}")  # fmt: skip


def _load(model: RunModel, config: RelufyConfig, control: Control, changed: Any = None) -> LoadedModel:
    """In float32, whatever the files hold: small steps would be lost in less."""
    with torch.random.fork_rng():
        torch.manual_seed(control.seed)  # of a new head
        return load_model(
            model.checkpoint.folder, task=config.task, device=model.device, dtype="float32", tokenizer=False,
            quiet=True, trust_remote_code=control.trust_remote_code, new_head=config.classes is not None,
            config=changed or _headed(model, config),
        )  # fmt: skip


def _teacher(original: LoadedModel, tokenizer: Any, config: RelufyConfig, control: Control) -> LoadedModel | None:
    """The model whose outputs are matched. Raises ConfigError where they are not of the same kind."""
    if config.teacher is None or config.teacher == "original":
        return original if config.teacher else None
    found = load_model(config.teacher, task=config.task, device=original.device, dtype="float32", quiet=True)
    if found.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"--teacher {config.teacher} has another vocabulary", "use a teacher with the same tokenizer")
    sizes = [(getattr(m.config, "num_labels", None), getattr(m.config.get_text_config(), "vocab_size", None))
             for m in (original, found)]  # fmt: skip
    if sizes[0][config.task != "classification"] != sizes[1][config.task != "classification"]:
        raise ConfigError(f"--teacher {config.teacher} has other outputs than the model", "use one with the same")
    return found


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> None:
    """Round every parameter to what will be stored, so that what is measured is what is written."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not bool(parameter.isfinite().all()):
            raise NonFiniteError(f"{name} is not finite after training", "use a smaller --learning-rate")


def _write(folder: Path, net: Any, model: RunModel, config: RelufyConfig, control: Control) -> None:
    """The model's folder: config.json with the new activation, weights, and the other files of the source."""
    copy_side_files(model.checkpoint.folder, folder, control.trust_remote_code)
    with files.writing(folder):
        save_model(net, folder)
    written = Checkpoint(folder, ffn=config.ffn, trust_remote_code=control.trust_remote_code)
    if not {site.activation for site in written.sites} <= set(SPARSE):
        raise CorruptArtifactError(f"{folder}/config.json does not say the new activation", "report this")


def _summary(metrics: Any) -> str:
    before, swapped, after = (metrics[name]["value"] for name in ("before", "swapped", "after"))
    active = [sum(layer[f"active_{when}"] for layer in metrics["activity"]) / len(metrics["activity"])
              for when in ("before", "after")]  # fmt: skip
    return (
        f"{metrics['metric']} on {metrics['examples']} examples: {before:.4g} before, {swapped:.4g} with ReLU put in, "
        f"{after:.4g} after {metrics['steps']} steps ({metrics['tokens']} tokens); active neurons {active[0]:.1%} before, "
        f"{active[1]:.1%} after{_phases_text(metrics)}"
    )


def _phases_text(metrics: Any) -> str:
    if "phases" not in metrics:
        return ""
    sparse = [phase for phase in metrics["phases"] if phase["phase"] == "sparse"]
    return (
        f"; {sum(phase['steps'] for phase in sparse)} steps in {len(sparse)} sparse phases at "
        f"{sparse[0]['ffn_flops_fraction']:.2f} of the FFN FLOPs, {metrics['training_ffn_flops_fraction']:.2f} over all steps"
    )
