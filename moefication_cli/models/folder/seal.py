"""Ties experts to the weights they were made for: what `moefication.json` records of a folder's weights, and the check.

A router of another permutation, or of another model, fits in every shape and selects nonsense. So `weights` in
`moefication.json` holds `files`, {name: {sha256, bytes}} of the weight files and config.json, `others`, the same of the
files beside them, and `ffns`, per FFN the tensors' places [file, name] and a digest of 64 evenly spaced rows of each.
Checked on every load: sizes of the weight files, and those rows (a 7B model in float16: about 50 MB read). One changed
bit elsewhere is found by `verify`, which hashes all files.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.contents import INT8_WEIGHTS, WRITE_AGAIN
from moefication_cli.models.sites import FFNSite
from moefication_cli.store.files import described as file_described
from moefication_cli.store.files import sha256 as file_sha256
from moefication_cli.store.header import Header, read_header
from moefication_cli.store.manifest import check_file_name

_ROWS = 64


def sealed(checkpoint: Checkpoint, sha256: Callable[[Path], str] = file_sha256) -> dict[str, Any]:
    """The `weights` object of a folder that is written; its weight files must be safetensors.

    `sha256` may be that of a `HashCache`, so that a stage which hashes its files when it commits reads them once.
    """
    places = {}
    for site in checkpoint.sites:
        parameters = sorted({piece.parameter for piece in site.slices()})
        places[site.name] = [[file.path.name, key] for file, key in map(checkpoint.locate, parameters)]
    return _sealed(checkpoint.folder, [path.name for path in checkpoint.files], places, sha256)


def sealed_int8(folder: Path, sites: Sequence[FFNSite], sha256: Callable[[Path], str] = file_sha256) -> dict[str, Any]:
    """The same of a folder with stored int8 weights (`stored_int8`)."""
    places = {}
    for site in sites:
        parameters = sorted({piece.parameter for piece in site.slices()})
        scales = [f"{name}_scale" for name in parameters if name.endswith(".weight")]
        places[site.name] = [[INT8_WEIGHTS, key] for key in [*parameters, *scales]]
    return _sealed(folder, [INT8_WEIGHTS], places, sha256)


def _sealed(
    folder: Path, weight_files: list[str], places: Mapping[str, list[list[str]]], sha256: Callable[[Path], str]
) -> dict[str, Any]:
    """`places` are those of each FFN's tensors."""
    names, headers = ["config.json", *weight_files], dict[str, Header]()
    ffns = {name: {"tensors": listed, "digest": _digest(folder, listed, headers)} for name, listed in places.items()}

    def described(names: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {name: file_described(folder / name, sha256) for name in names}

    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in names)
    return {"files": described(names), "others": described(others), "ffns": ffns}


def altered_others(folder: Path, weights: Mapping[str, Any]) -> list[CorruptArtifactError]:
    """One error per file beside weights and configuration (tokenizer, code) that is not as it was written.

    Loading does not ask: people edit these. Folders of versions before 0.3 do not record them.
    """
    found = []
    for name, entry in weights.get("others", {}).items():
        try:
            _check_file(folder, name, entry, verify=True)
        except CorruptArtifactError as error:
            found.append(error)
    return found


def check_seal(folder: Path, weights: Any, verify: bool = False) -> None:
    """Raise CorruptArtifactError unless the folder's weights are those `weights` was made for.

    `verify` reads every byte, else see the module docstring.
    """
    try:
        for name, entry in weights["files"].items():
            if verify or name != "config.json":  # people edit it, and loading says what is wrong with it
                _check_file(folder, name, entry, verify)
        headers: dict[str, Header] = {}
        for name, ffn in weights["ffns"].items():
            if _digest(folder, ffn["tensors"], headers) != ffn["digest"]:
                raise CorruptArtifactError(
                    f"{folder}: the weights of {name} are not those its experts were made for: another order of its "
                    f"neurons, another model or damage ({_ROWS} rows of each matrix were compared)",
                    WRITE_AGAIN,
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptArtifactError(
            f"{folder}: moefication.json does not describe its weights: {error}", WRITE_AGAIN
        ) from None


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    check_file_name(name, folder / "moefication.json")
    path = folder / name
    try:
        size = path.stat().st_size
        found = file_sha256(path) if verify else entry["sha256"]
    except OSError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error.strerror}", WRITE_AGAIN) from None
    if size != entry["bytes"]:
        raise CorruptArtifactError(f"{path} has {size} bytes, moefication.json says {entry['bytes']}", WRITE_AGAIN)
    if found != entry["sha256"]:
        raise CorruptArtifactError(
            f"{path} was altered: sha256 {found[:12]}.., moefication.json says {entry['sha256'][:12]}..", WRITE_AGAIN
        )


def _digest(folder: Path, places: Sequence[Sequence[str]], headers: dict[str, Header]) -> str:
    """sha256 over dtype, shape and up to 64 evenly spaced rows of every tensor; `headers` keeps those read already."""
    digest = hashlib.sha256()
    for file, key in places:
        path = folder / file
        try:
            if file not in headers:
                headers[file] = read_header(path)
            entry = headers[file].entries[key]
            start, stop = entry["data_offsets"]
            digest.update(f"{key} {entry['dtype']} {entry['shape']}".encode())
            count = max(1, entry["shape"][0])
            size = (stop - start) // count
            with path.open("rb") as opened:
                for row in sorted({number * count // _ROWS for number in range(_ROWS)}):
                    digest.update(os.pread(opened.fileno(), size, headers[file].start + start + row * size))
        except KeyError:
            raise CorruptArtifactError(
                f"{path} has no tensor {key}, which its experts were made for", WRITE_AGAIN
            ) from None
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(f"{path} cannot be read: {error}", WRITE_AGAIN) from None
    return digest.hexdigest()
