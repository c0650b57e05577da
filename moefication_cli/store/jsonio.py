"""Strict JSON: canonical bytes out, no surprises in.

Canonical: UTF-8, sorted keys, no NaN or infinity. Reading refuses NaN, infinity and duplicate keys, which Python's
`json` lets pass. Does not check schemas; see `manifest.py`.
"""

import enum
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from moefication_cli.errors import CorruptArtifactError, NonFiniteError
from moefication_cli.store.files import atomic_write


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples become lists, enum members their values, paths strings."""
    return json.loads(canonical(value))


def canonical(value: Any, indent: int | None = None) -> bytes:
    """Canonical JSON bytes of `value`. Raises `NonFiniteError` on NaN or infinity, `TypeError` on what JSON lacks."""
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        text = json.dumps(
            value,
            sort_keys=True,
            allow_nan=False,
            ensure_ascii=False,
            indent=indent,
            separators=separators,
            default=_default,
        )
    except ValueError as error:
        raise NonFiniteError(f"a value to be recorded is not a finite number: {error}") from error
    return text.encode()


def _default(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON: {value!r}")


def digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def seal(value: Mapping[str, Any]) -> str:
    """The digest of everything in `value` but its `seal`."""
    return digest({name: item for name, item in value.items() if name != "seal"})


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with its `seal`: one changed bit in the file is then found."""
    return {**value, "seal": seal(value)}


def check_seal(value: Mapping[str, Any], where: Path) -> None:
    """Raise CorruptArtifactError where the seal does not fit. Without one passes: earlier versions wrote none."""
    if "seal" in value and value["seal"] != seal(value):
        raise CorruptArtifactError(f"{where} was altered: its content does not fit its seal", "restore the file")


def parse(data: bytes | str, where: Path | str) -> Any:
    """Parse strict JSON; `CorruptArtifactError` naming `where` on bad syntax or UTF-8, NaN, infinity, duplicates."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{where} is not strict JSON: {error}", "run the stage that wrote it again, with --force"
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):  # 1e999 parses without a word
        raise ValueError(f"{text} is not a finite number")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return result


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `FileNotFoundError`, or `CorruptArtifactError` naming the file."""
    if path.exists() and not path.is_file():  # reading a pipe or a device could wait for ever
        raise CorruptArtifactError(f"{path} is not a file", "remove it, then run the stage that writes it")
    value = parse(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{path} holds no JSON object", "run the stage that wrote it again, with --force")
    return value


def write(path: Path, value: Any) -> None:
    """Write `value` as indented canonical JSON, atomically."""
    atomic_write(path, _written(value))


def as_written(path: Path) -> bool:
    """Whether the file has exactly the bytes that `write` gives for what it holds.

    A digest of the parsed value passes over some changed bits: two numbers whose 17th digits differ can be the same float.
    """
    return path.read_bytes() == _written(read_object(path))


def _written(value: Any) -> bytes:
    return canonical(value, indent=2) + b"\n"
