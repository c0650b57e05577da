"""Whole models into memory: dense ones for the stages that run them, converted ones as mixtures of experts.

Everything that can be wrong with what a user asked for is a ConfigError with a sentence, not a library's traceback.
Weights are read from local files only (`source` finds or downloads them); pickles only through weights_only loading.
Does not place models over several devices unless `device_map` says so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from moefication_cli.errors import ConfigError, UnavailableError, first_line
from moefication_cli.models.experts import attach_experts, check_budget, sites_of
from moefication_cli.models.folder.contents import INT8_WEIGHTS, refuse_int8_files
from moefication_cli.models.folder.moe_folder import FOLDER, MoEFolder, read_moe_folder
from moefication_cli.models.folder.seal import check_seal
from moefication_cli.models.folder.source import LOAD_ERRORS, Source, load_config, resolve_source
from moefication_cli.models.heads import TASK_AUTO, task_of
from moefication_cli.models.int8 import check_weights_option, quantise_model
from moefication_cli.models.sites import FFNSite, refuse_quantised
from moefication_cli.models.stored_int8 import StoredInt8

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
    new_head: bool = False,
    **model_options: Any,
) -> LoadedModel:
    """The dense model of a hub id or local folder, in evaluation mode, with its tokenizer.

    `task` chooses the head (`TASK_AUTO`); None takes the architecture the checkpoint names.
    `device_map="auto"` and `offload_folder` are accelerate's, for models larger than memory; `model_options` go to
    `from_pretrained` as they are. `quiet` silences progress. With `new_head` a head that the files lack is initialised
    anew, with torch's random numbers.
    Raises ConfigError (not found, no such head, tokenizer missing), UnavailableError (device), UnsupportedModelError
    (quantised).
    """
    target = device if isinstance(device, torch.device) else resolve_device(device)
    source = resolve_source(ref, revision, trust_remote_code)
    config = load_config(source, trust_remote_code)
    refuse_quantised(config, source.ref)
    refuse_int8_files(source.ref, source.files)
    options: dict[str, Any] = {**model_options, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    options["dtype"] = resolve_dtype(dtype, target) or "auto"
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    try:
        with progress_bars(not quiet):
            model, info = _model_class(config, task).from_pretrained(source.folder, **options)
    except LOAD_ERRORS as error:
        hint = "check the folder, the task and that the files are complete"
        raise ConfigError(f"{source.ref} cannot be loaded: {first_line(error)}", hint) from error
    missing = sorted(name for name in info["missing_keys"] if not (new_head and _in_head(model, name)))
    if (task or task_of(config)) == "embedding":  # which reads no pooler; often there is none
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        kind = type(model).__name__
        raise ConfigError(
            f"{source.ref} lacks {len(missing)} tensors of {kind}: {', '.join(missing[:3])}",
            "choose a --task the checkpoint was trained for",
        )
    model.config.architectures = config.architectures  # what `load_config` makes of them
    model.eval()
    if device_map is None:
        model.to(target)
    words = load_tokenizer(source, trust_remote_code) if tokenizer else None
    return LoadedModel(model, words, model.config, target, model.dtype, source)


def _in_head(model: Any, name: str) -> bool:
    """Whether a parameter is beyond the model's body; the pooler, which only heads read, is."""
    prefix = f"{model.base_model_prefix}."
    return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")


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
    top_k: int | None = None,
    task: str | None = None,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    quiet: bool = True,
    weights: str | None = None,
    **model_options: Any,
) -> Any:
    """What `moefication apply` wrote, a folder or a hub id, as the mixture of experts: a transformers model in evaluation mode.

        model = load("RUN/model")
        model.moefication.set(fraction=0.3)     # another budget, at any time; set() goes back

    `fraction` and `top_k` are those of `Experts.set`. `dtype`, `revision`, `device_map` and whatever else `from_pretrained` takes, such
    as `attn_implementation` or `offload_folder`, mean the same here; with a `device_map`, `device` is not looked at. What accelerate
    spreads over devices or offloads works where it places whole layers; offloaded experts are read anew in every call.
    `weights="int8"`: all linear layers and embeddings are made int8 when loaded (see `models.int8`), on the CPU, with float32
    activations; loading takes the memory of the files as they are stored and of the int8 matrices. A folder that `apply --weights
    int8` wrote is always loaded so, and takes the memory of the int8 matrices alone. Such a model cannot be saved.
    Weights that the experts were not made for are refused, by the sizes of the files and 64 rows of each of the FFNs'
    matrices; `verify` compares every byte of the weight files. `save_pretrained` of the model writes such a folder again.
    Raises ConfigError (path, fraction, top_k or weights of another kind), MissingArtifactError (not a converted model),
    CorruptArtifactError (routers or weights missing, altered, not fitting) and what `load_model` raises. Plain
    `from_pretrained` of the same folder gives the dense model.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"load takes the path of a folder, not {path!r}", "load('RUN/model')")
    check_budget(fraction, top_k)
    if weights is not None:  # before anything is downloaded
        _check_int8(weights, device, dtype)
    folder = _local_folder(path, revision, trust_remote_code)
    moe = read_moe_folder(folder)
    if weights is None and stored_as_int8(folder):
        weights = "int8"
        _check_int8(weights, device, dtype)
    check_weights(folder, moe, verify)
    options = model_options | {"task": task, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if weights is None:
        model = load_model(folder, device=device, dtype=dtype, tokenizer=False, quiet=quiet, **options).model
        sites = sites_of(model, folder, moe)
    else:
        loaded, sites = load_int8(folder, moe, quiet=quiet, **options)
        model = loaded.model
    attach_experts(model, sites, folder, moe, backend, fraction, top_k)
    return model


def _check_int8(weights: str, device: str | torch.device, dtype: str | torch.dtype | None) -> None:
    target = device if isinstance(device, torch.device) else resolve_device(device)
    check_weights_option(weights, target, resolve_dtype(dtype, target))


def stored_as_int8(folder: Path) -> bool:
    """Whether `apply --weights int8` wrote the folder."""
    return (folder / INT8_WEIGHTS).is_file()


def load_int8(folder: Path, moe: MoEFolder, quiet: bool = True, **options: Any) -> tuple[LoadedModel, list[FFNSite]]:
    """The model of a converted folder with int8 weights, and its FFNs; those with experts need a layer installed, the others run.

    `options` are those of `load_model`. Raises what `load` raises.
    """
    if stored_as_int8(folder):
        loaded, stored = _stored_model(folder, **options)
    else:
        # What becomes int8 is read as it is stored and widened matrix by matrix: half the memory for files in half precision
        loaded, stored = load_model(folder, device="cpu", dtype="auto", tokenizer=False, quiet=quiet, **options), None
        if _has_rounded_buffers(loaded.model):
            del loaded
            loaded = load_model(folder, device="cpu", dtype=torch.float32, tokenizer=False, quiet=quiet, **options)
    sites = sites_of(loaded.model, folder, moe)
    # Before anything holds views on float matrices
    quantise_model(loaded.model, _with_experts(sites, moe), None if stored is None else stored.matrix)
    return replace(loaded, config=loaded.model.config, dtype=torch.float32), sites


def load_widened(folder: Path, moe: MoEFolder, **options: Any) -> Any:
    """The dense float32 model that the int8 weights of a folder stand for. Raises what `load` raises."""
    loaded, stored = _stored_model(folder, **options)
    stored.widen(loaded.model, _with_experts(sites_of(loaded.model, folder, moe), moe))
    return loaded.model


def _with_experts(sites: list[FFNSite], moe: MoEFolder) -> list[FFNSite]:
    return [site for site, layer in zip(sites, moe.layers, strict=True) if not layer.dense]


def _stored_model(
    folder: Path, task: str | None = None, trust_remote_code: bool = False, **options: Any
) -> tuple[LoadedModel, StoredInt8]:
    """The model of a folder with int8 weights, without its matrices, and the file that has them."""
    source = resolve_source(folder, None, trust_remote_code)
    config, stored = load_config(source, trust_remote_code), StoredInt8(folder)
    options |= {"trust_remote_code": trust_remote_code}
    model = stored.empty_model(config, _model_class(config, task), options)
    return LoadedModel(model, None, model.config, torch.device("cpu"), torch.float32, source), stored


def _has_rounded_buffers(model: nn.Module) -> bool:
    """Whether the model's code computed tensors (positions) in half precision, which float32 would hold exactly."""
    return any(
        name in part._non_persistent_buffers_set
        and buffer is not None
        and buffer.dtype in (torch.float16, torch.bfloat16)
        for part in model.modules()
        for name, buffer in part._buffers.items()
    )


def _local_folder(path: str | Path, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder, or the snapshot of a hub id with what lies in its folder `moefication` (see `resolve_source`)."""
    if Path(path).exists() or (revision is None and len(Path(path).parts) > 2):
        return Path(path)
    source = resolve_source(path, revision, trust_remote_code)
    try:
        snapshot_download(source.ref, revision=source.revision, allow_patterns=[f"{FOLDER}/*"])
    except OSError as error:
        raise ConfigError(f"{path}: {FOLDER}/ cannot be downloaded ({first_line(error)})") from None
    return source.folder


def check_weights(folder: Path, moe: MoEFolder, verify: bool = False) -> None:
    """Raise CorruptArtifactError unless the weights in `folder` are those its experts were made for (see `seal`)."""
    if "weights" in moe.settings:
        check_seal(folder, moe.settings["weights"], verify)
    else:
        log.warning(
            "%s was written by a version before 0.3: whether its weights are unchanged cannot be checked", folder
        )


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
def progress_bars(wanted: bool) -> Iterator[None]:
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
