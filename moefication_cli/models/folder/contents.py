"""Which files of a model's folder matter, and digests of them: what a stage's inputs are compared by. Imports no torch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from moefication_cli.errors import ConfigError, UnsupportedModelError
from moefication_cli.models.folder.sentence import POOLING
from moefication_cli.store import jsonio

_TOKENIZER_FILES = (
    "*tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "normalizer.json", "*.model",
    "*.tiktoken", "chat_template*",
)  # fmt: skip


WRITE_AGAIN = "write the folder again: moefication apply RUN --force, and the options it was made with"
INT8_WEIGHTS = "moefication-int8.safetensors"  # in place of float weights (`stored_int8`); only `load` reads it


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files, in the order transformers looks for them. Raises ConfigError where there are none or one lacks."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return (folder / stem,)
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            continue
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is not a valid weight index", "download the model again") from None
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"{index} is not a valid weight index: it names {name!r}", "download the model again")
            if Path(name).name != name:
                raise ConfigError(f"{index} names a file outside its folder: {name!r}")
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} lacks {name}, which {index.name} lists", "download the model again")
        if names:
            return tuple(folder / name for name in names)
    if (folder / INT8_WEIGHTS).is_file():
        return (folder / INT8_WEIGHTS,)
    raise ConfigError(f"{folder} has no model.safetensors or pytorch_model.bin", "give a folder with PyTorch weights")


def refuse_int8_files(where: str, files: Sequence[Path]) -> None:
    """Raises UnsupportedModelError where the weights are stored int8 ones."""
    if files[0].name == INT8_WEIGHTS:
        raise UnsupportedModelError(
            f"{where} holds int8 weights, which moefication_cli.load, eval and bench read, and nothing else",
            "write float ones: moefication apply RUN without --weights",
        )


def fingerprint(folder: Path, files: Sequence[Path], ffn: str | None, sha256: Callable[[Path], str]) -> str:
    """Digest of the contents of config.json and the weight files, and of `--ffn`: other FFNs are another model."""
    found = jsonio.digest({path.name: sha256(path) for path in (folder / "config.json", *files)})
    return found if ffn is None else hashlib.sha256(f"{found}/{ffn}".encode()).hexdigest()


def tokenizer_digest(folder: Path, sha256: Callable[[Path], str]) -> str:
    """Identifies the tokenizer of a model's folder, and how it pools, by the names and contents of its files."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and any(p.match(pattern) for pattern in _TOKENIZER_FILES))
    files += sorted(folder.glob(POOLING))
    names = (path.relative_to(folder).as_posix() for path in files)
    said = (f"{name}\0{sha256(path)}\n" for name, path in zip(names, files, strict=True))
    return hashlib.sha256("".join(said).encode()).hexdigest()
