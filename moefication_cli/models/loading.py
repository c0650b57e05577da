"""Whole models into memory: dense ones for the stages that run them, converted ones as mixtures of experts.

Everything that can be wrong with what a user asked for is a ConfigError with a sentence, not a library's traceback.
Weights are read from local files only (`source` finds or downloads them); pickles only through weights_only loading.
Does not place models over several devices unless `device_map` says so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moefication_cli.errors import ConfigError, CorruptArtifactError, UnavailableError, first_line
from moefication_cli.ffn import ExpertWeights
from moefication_cli.models.folder.moe_folder import MoEFolder, MoELayer, read_moe_folder
from moefication_cli.models.folder.seal import check_seal
from moefication_cli.models.folder.source import LOAD_ERRORS, Source, load_config, resolve_source
from moefication_cli.models.heads import TASK_AUTO, task_of
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.saving import save_converted
from moefication_cli.models.sites import FFNSite, find_sites, refuse_quantised
from moefication_cli.models.surgery import FFNLayer, install, live_weights, pack
from moefication_cli.routing.rules import TopK
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with what is needed to run it. `tokenizer` is None if none was asked for."""

    model: Any
    tokenizer: Any
    config: Any
    device: torch.device
    dtype: torch.dtype
    source: Source


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises ConfigError for other names, UnavailableError for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"device {name} asked for, but PyTorch sees no CUDA GPU", "run with --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UnavailableError(
            f"device {name} asked for, but there are {count} GPUs", f"use cuda:0 .. cuda:{count - 1}"
        )
    return device


def resolve_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """A dtype; None means the checkpoint's own, which is the default on CUDA. The default on CPU is float32.

    Raises ConfigError for a name that is not a float dtype here.
    """
    if isinstance(name, torch.dtype):
        return name
    if name is None or name == "auto":
        return torch.float32 if device.type == "cpu" and name is None else None
    if name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", f"use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(
    ref: str | Path,
    *,
    task: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
    quiet: bool = False,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: Path | None = None,
) -> LoadedModel:
    """The dense model of a hub id or local folder, in evaluation mode, with its tokenizer.

    `task` chooses the head (`classification`, `text2text`, `lm`); None takes the architecture the checkpoint names.
    `device_map="auto"` and `offload_folder` are accelerate's, for models larger than memory. `quiet` silences progress.
    Raises ConfigError (not found, no such head, tokenizer missing), UnavailableError (device), UnsupportedModelError
    (quantised).
    """
    target = device if isinstance(device, torch.device) else resolve_device(device)
    source = resolve_source(ref, revision, trust_remote_code)
    config = load_config(source, trust_remote_code)
    refuse_quantised(config, source.ref)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    options["dtype"] = resolve_dtype(dtype, target) or "auto"
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    try:
        with _progress(not quiet):
            model, info = _model_class(config, task).from_pretrained(source.folder, **options)
    except LOAD_ERRORS as error:
        hint = "check the folder, the task and that the files are complete"
        raise ConfigError(f"{source.ref} cannot be loaded: {first_line(error)}", hint) from error
    missing = sorted(info["missing_keys"])
    if missing:
        kind = type(model).__name__
        raise ConfigError(
            f"{source.ref} lacks {len(missing)} tensors of {kind}: {', '.join(missing[:3])}",
            "choose a --task the checkpoint was trained for",
        )
    model.eval()
    if device_map is None:
        model.to(target)
    words = load_tokenizer(source, trust_remote_code) if tokenizer else None
    return LoadedModel(model, words, model.config, target, model.dtype, source)


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder; one without a padding token pads with its end token.

    Raises ConfigError where there is none, or one without words.
    """
    try:
        words = transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        # Without files transformers makes an empty tokenizer of the right class, which reads every word as unknown
        if not set(words.get_vocab()) - set(words.all_special_tokens):
            raise ValueError("its vocabulary is empty")
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"{source.ref} has no usable tokenizer ({first_line(error)})",
            "put the tokenizer's files into the model's folder (tokenizer.save_pretrained)",
        ) from None
    if words.pad_token is None and words.eos_token is not None:
        words.pad_token = words.eos_token
    return words


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    fraction: float | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    quiet: bool = True,
) -> Any:
    """A folder written by `moefication apply`, as the mixture of experts: a transformers model in evaluation mode.

        model = load("RUN/model")

    `fraction` replaces the recorded rule by the best `max(1, round(fraction * E))` experts; a layer without a router runs
    that share of its experts, the most important ones, for every token. Layers that were left dense stay so.
    Weights that the experts were not made for are refused, by the sizes of the files and 64 rows of each of the FFNs'
    matrices; `verify` compares every byte of the weight files. `save_pretrained` of the model writes such a folder again.
    Raises ConfigError (path or fraction of another kind), MissingArtifactError (not a converted model),
    CorruptArtifactError (routers or weights missing, altered, not fitting) and what `load_model` raises. Plain
    `from_pretrained` of the same folder gives the dense model.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"load takes the path of a folder, not {path!r}", "load('RUN/model')")
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if fraction is not None and not (number and 0 < fraction <= 1):
        raise ConfigError(f"fraction {fraction!r} is not a number in (0, 1]")
    folder = Path(path)
    moe = read_moe_folder(folder)
    check_weights(folder, moe, verify)
    loaded = load_model(
        folder,
        task=task,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        tokenizer=False,
        quiet=quiet,
    )
    attach_experts(loaded.model, folder, moe, backend, fraction)
    return loaded.model


def check_weights(folder: Path, moe: MoEFolder, verify: bool = False) -> None:
    """Raise CorruptArtifactError unless the weights in `folder` are those its experts were made for (see `seal`)."""
    if "weights" in moe.settings:
        check_seal(folder, moe.settings["weights"], verify)
    else:
        log.warning(
            "%s was written by a version before 0.3: whether its weights are unchanged cannot be checked", folder
        )


def attach_experts(
    model: Any, folder: Path, moe: MoEFolder, backend: str = "auto", fraction: float | None = None
) -> None:
    """Install the layers read from `folder` in the dense model of that folder, whose `save_pretrained` then writes both.

    Raises CorruptArtifactError if they do not fit.
    """
    sites = find_sites(model, moe.settings.get("ffn"))
    if [site.name for site in sites] != [layer.name for layer in moe.layers]:
        raise CorruptArtifactError(
            f"{folder}: the layers in moefication.json are not the FFNs of the model",
            "write the folder again: moefication apply RUN --force",
        )
    token_mask = TokenMask(model)
    for site, layer in zip(sites, moe.layers, strict=True):
        if not layer.dense and not (fraction == 1 and layer.router is None):  # all neurons on: the dense layer
            install(model, site, _moe_ffn(model, site, layer, backend, fraction), token_mask)
    model.save_pretrained = partial(save_converted, model, moe)
    experts = sum(not layer.dense for layer in moe.layers)
    log.info("%s: mixture of experts in %d of %d FFNs, backend %s", folder, experts, len(sites), backend)


def _moe_ffn(model: nn.Module, site: FFNSite, layer: MoELayer, backend: str, fraction: float | None) -> FFNLayer:
    router, rule = layer.router, layer.rule
    assert rule is not None
    neurons = site.num_neurons - layer.num_shared
    width = site.d_model if router is None else router.d_model
    if width != site.d_model or neurons < 0 or neurons % layer.num_experts:
        raise CorruptArtifactError(
            f"{site.name}: {layer.num_experts} experts of {neurons} neurons, router input {width}: "
            f"does not fit F={site.num_neurons}, D={site.d_model}",
            "write the folder again: moefication apply RUN --force",
        )
    num_experts, num_shared = layer.num_experts, layer.num_shared
    if fraction is not None and router is not None:
        rule = TopK(max(1, round(fraction * num_experts)))
    elif fraction is not None:  # neurons stand in order of importance, expert after expert
        size = neurons // num_experts
        num_shared = min(max(1, round(fraction * site.num_neurons / size)) * size, site.num_neurons - size)
        num_experts = (site.num_neurons - num_shared) // size
    pack(model, site)
    ffn = live_weights(model, site)
    device = ffn.w_up_FD.device  # routers and compensation stay float32, as they were measured
    extra = None if layer.compensation is None else layer.compensation.to(device)
    weights = ExpertWeights(ffn, num_experts, num_shared, extra)
    if router is None:
        return PrunedFFN(weights, backend)
    return MoEFFN(weights, router.to(device), rule, backend=backend)


def _model_class(config: Any, task: str | None) -> Any:
    if task is not None:
        if task not in TASK_AUTO:
            raise ConfigError(f"unknown task {task!r}", f"use one of {', '.join(TASK_AUTO)}")
        return TASK_AUTO[task]
    names = getattr(config, "architectures", None) or []
    own = task_of(config)
    return (getattr(transformers, names[0], None) if names else None) or (
        TASK_AUTO[own] if own else transformers.AutoModel
    )


@contextmanager
def _progress(wanted: bool) -> Iterator[None]:
    """The progress bars of transformers, off where they are not wanted, and as they were afterwards."""
    settings = transformers.utils.logging
    before = settings.is_progress_bar_enabled()
    if not wanted:
        settings.disable_progress_bar()
    try:
        yield
    finally:
        if before and not wanted:
            settings.enable_progress_bar()
