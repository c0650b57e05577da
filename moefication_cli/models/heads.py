"""Which auto class of transformers loads a model, and which of our tasks that makes possible.

A task runs the whole model on text, so it needs the head the checkpoint was trained with: a task can convert a model where
its auto class loads the very class that config.json names first under `architectures`. An encoder without a head is an
embedder; a decoder without one has no task. Reads configurations only, no weights.
"""

import copy
from collections.abc import Sequence
from typing import Any

import transformers

from moefication_cli.errors import ConfigError, UnsupportedModelError

TASK_AUTO = {
    "classification": transformers.AutoModelForSequenceClassification,
    "text2text": transformers.AutoModelForSeq2SeqLM,
    "lm": transformers.AutoModelForCausalLM,
    "mlm": transformers.AutoModelForMaskedLM,
    "embedding": transformers.AutoModel,
}


def auto_architectures(config_class: type) -> dict[str, str]:
    """The auto classes of transformers that support a configuration class -> the name of the class each of them loads."""
    autos = [name for name in dir(transformers) if name.startswith("AutoModel")]
    found = {name: _classes(getattr(transformers, name), config_class) for name in autos}
    return {name: classes[0] for name, classes in found.items() if classes}


def task_of(config: Any) -> str | None:
    """The first task of TASK_AUTO whose auto class loads the architecture the configuration names.

    None where there is none: a decoder without a head (`LlamaModel`), another head, or a model that does not read text (ViT,
    Whisper).
    """
    architecture = _architecture(config)
    remote = getattr(config, "auto_map", None) or {}
    for task, auto in TASK_AUTO.items():
        if task == "embedding" and not _is_encoder(config):
            continue
        own = str(remote.get(auto.__name__, "")).rpartition(".")[2]  # a class of code that comes with the model
        if architecture and architecture in (own, *_classes(auto, type(config))):
            return task
    return None


def why_no_task(config: Any) -> str:
    """Half a sentence on what the model lacks, for models of which `task_of` is None."""
    architecture = _architecture(config)
    if not architecture:
        return "its config.json names no architecture"
    reads = getattr(getattr(transformers, architecture, None), "main_input_name", "input_ids")
    if reads != "input_ids":
        return f"it reads {reads}, and calibration and evaluation run text"
    return f"{architecture} has no head for any of {', '.join(list(TASK_AUTO)[:-1])}, and is no encoder that embeds"


def encoder_of(config: Any) -> str | None:
    """The architecture of the same kind without a head, where the configuration names a masked language model."""
    if not _architecture(config).endswith("ForMaskedLM") or not _is_encoder(config):
        return None
    return next(iter(_classes(transformers.AutoModel, type(config))), None)


def with_classifier(config: Any, names: Sequence[str]) -> Any:
    """A copy of a configuration that names the classification architecture of its kind, with these classes.

    Raises UnsupportedModelError where there is none, ConfigError for fewer than two names or one twice.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError("a classifier needs two or more different classes", "--classes negative,positive")
    classes = _classes(TASK_AUTO["classification"], type(config))
    if not classes:
        raise UnsupportedModelError(f"transformers has no classifier for {config.model_type} models")
    changed = copy.deepcopy(config)
    changed.architectures = classes[:1]
    changed.id2label = dict(enumerate(names))
    changed.label2id = {name: number for number, name in enumerate(names)}
    return changed


def checked_task(config: Any, asked: str | None, where: str) -> str:
    """The task to run a model with: what was asked for, or the model's own. `where` names the model in messages.

    Raises UnsupportedModelError where no task fits the model, ConfigError where the one asked for does not.
    """
    task = task_of(config)
    if task is None:
        raise UnsupportedModelError(
            f"{where} cannot be converted: {why_no_task(config)}",
            f"convert a checkpoint that one of {', '.join(auto.__name__ for auto in TASK_AUTO.values())} has saved",
        )
    if asked not in (None, task):
        raise ConfigError(
            f"--task {asked} does not fit {where}: {_architecture(config)} is converted with --task {task}",
            f"leave --task out, or write --task {task}",
        )
    return task


def _is_encoder(config: Any) -> bool:
    """Whether the kind of model reads in both directions: there are masked language models of it."""
    remote = getattr(config, "auto_map", None) or {}
    known = _classes(transformers.AutoModelForMaskedLM, type(config)) or "AutoModelForMaskedLM" in remote
    return bool(known) and not any(getattr(config, name, False) for name in ("is_encoder_decoder", "is_decoder"))


def _architecture(config: Any) -> str:
    names = getattr(config, "architectures", None) or [""]
    return str(names[0])


def _classes(auto: Any, config_class: type) -> list[str]:
    """Names of the classes an auto class loads for a configuration class, the default one first."""
    found = auto._model_mapping.get(config_class, None)
    classes = found if isinstance(found, list | tuple) else [found]
    return [kind.__name__ for kind in classes if kind is not None]
