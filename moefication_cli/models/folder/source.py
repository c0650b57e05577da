"""Where a model's files are: hub id or folder -> local files, configuration and an architecture without weights.

Only safetensors, and `.bin` through `torch.load(weights_only=True)`; what that refuses is refused. Never executes code
from the model's folder unless `trust_remote_code`. Everything wrong with a source is a ConfigError that names it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moefication_cli.errors import ConfigError, CorruptArtifactError, first_line
from moefication_cli.models.folder.contents import weight_files
from moefication_cli.models.folder.sentence import MODULES
from moefication_cli.models.heads import encoder_of
from moefication_cli.store.header import Header, read_header

_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
# What transformers and its dependencies raise for unreadable, incomplete or unsafe model folders
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    ImportError,
    EOFError,
    AttributeError,
    TypeError,
    SafetensorError,
    UnpicklingError,
    ArithmeticError,  # sizes of zero
    StrictDataclassError,  # a value of config.json of another type
)


@dataclass(frozen=True)
class Source:
    """A model's local folder and its weight files in order; `revision` is the commit of a hub snapshot, else None."""

    ref: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None

    @property
    def pickled(self) -> bool:
        """Whether the weights are `.bin` files."""
        return self.files[0].suffix == ".bin"


def resolve_source(ref: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Finds the files of a local folder or a hub id (downloads it, or uses the cache under HF_HUB_OFFLINE).

    Raises ConfigError where there is no such model, or files are missing.
    """
    text = str(ref)
    commit = None
    try:
        folder = Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"model not found: {text}: there is no such user", "give a folder or a hub id") from None
    if not folder.exists():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
            raise ConfigError(f"model not found: {text}", "give a local folder or a hub id such as google-t5/t5-small")
        folder = _download(text, revision, trust_remote_code)
        commit = folder.name
    if not folder.is_dir():
        raise ConfigError(
            f"model not found: {text} is not a folder",
            "give the folder that holds config.json; run, collect-activations and split take a file with --model-config DIR",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{text} has no config.json", "give a Hugging Face model folder (save_pretrained writes one)")
    return Source(text, folder, weight_files(folder), commit)


def _download(ref: str, revision: str | None, trust_remote_code: bool) -> Path:
    patterns = _SIDE_FILES + (["*.py"] if trust_remote_code else [])
    # Nested folders and Mistral's own format hold second copies of the weights
    ignore = ["*/*", "consolidated*"]

    def fetch(weights: str) -> Path:
        allow = [*patterns, weights]
        return Path(snapshot_download(ref, revision=revision, allow_patterns=allow, ignore_patterns=ignore))

    try:
        folder = fetch("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
        if (folder / MODULES).is_file():  # of sentence-transformers: pooling and what follows it
            snapshot_download(ref, revision=folder.name, allow_patterns=["?_*/*"])
    except RepositoryNotFoundError:
        hint = "check the spelling; private models need `hf auth login`"
        raise ConfigError(f"model not found: no folder and no hub model {ref!r}", hint) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        hint = "give a local folder, or download it first with `hf download`"
        raise ConfigError(f"model not found: {ref} ({first_line(error)})", hint) from None
    return folder


def load_config(source: Source, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a source. Raises ConfigError where transformers cannot read it."""
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        names = getattr(config, "architectures", None)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"`architectures` is {names!r}, not a list of class names")
        # A sentence-transformers folder holds an encoder, though its config.json often names what it was trained as
        if (source.folder / MODULES).is_file() and (encoder := encoder_of(config)) is not None:
            config.architectures = [encoder]
        return config
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            hint = "read it, and if you trust it add --trust-remote-code to this command"
            raise ConfigError(f"{source.ref} comes with code of its own, which is not run unasked", hint) from None
        hint = "check the folder or update transformers"
        raise ConfigError(f"{source.ref}: cannot read config.json ({first_line(error)})", hint) from None


def meta_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The architecture with every tensor on the meta device: names and shapes, no memory.

    Raises ConfigError where transformers cannot build it.
    """
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    try:
        with torch.device("meta"):
            if kind is not None:
                return kind(config)  # type: ignore[no-any-return]
            auto = transformers.AutoModel
            for suffix, candidate in AUTO_BY_SUFFIX.items():
                if names and names[0].endswith(suffix):
                    auto = candidate
            return auto.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]
    except LOAD_ERRORS as error:
        raise ConfigError(f"cannot build {names[0] if names else config.model_type} ({first_line(error)})") from None


AUTO_BY_SUFFIX = {
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
    "ForCausalLM": transformers.AutoModelForCausalLM,
    "ForMaskedLM": transformers.AutoModelForMaskedLM,
    "LMHeadModel": transformers.AutoModelForCausalLM,
}


class TensorFile:
    """One weight file, its tensors read one at a time (`.bin` files are mapped where their format allows)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pickled: dict[str, Tensor] | None = None
        try:
            if path.suffix == ".bin":
                self._pickled = _load_bin(path)
                self.keys: tuple[str, ...] = tuple(self._pickled)
            else:
                with safe_open(path, framework="pt") as file:
                    self.keys = tuple(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({first_line(error)})", "download the model again") from None

    def get(self, key: str) -> Tensor:
        """One tensor as stored."""
        if self._pickled is not None:
            return self._pickled[key]
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def header(self) -> Header:
        """The header of a safetensors file. Raises ConfigError where file and header do not agree."""
        try:
            return read_header(self.path)
        except (OSError, ValueError, CorruptArtifactError) as error:
            raise ConfigError(f"{self.path} cannot be read ({first_line(error)})", "download the model again") from None


def load_pickled(path: Path) -> Any:
    """What torch.load(weights_only=True) gives, mapped where the format allows. Raises ConfigError for what it refuses."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path} was refused by torch.load(weights_only=True) ({first_line(error)})",
            "convert it to safetensors somewhere you trust it (save_pretrained does that)",
        ) from None


def _load_bin(path: Path) -> dict[str, Tensor]:
    loaded = load_pickled(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConfigError(f"{path} is not a plain state dict", "convert it to safetensors with save_pretrained")
    return loaded
