"""`save_pretrained` of the mixture that `plain` installs: the converted folder again, where this package is not installed.

Written into converted folders behind `plain` (see `embedded`), so it uses nothing but the modules before it, torch and safetensors.
What it writes is what `saving` writes: `folder.moe_folder` reads and `folder.seal` checks it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.plain import PlainSource
from moefication_cli.models.sites import FFNSite

_SEALED_ROWS = 64  # of each matrix, as in `folder.seal`


def refuse_upload(options: dict[str, Any]) -> None:
    """Raise ConfigError for `push_to_hub`, before anything is written."""
    if options.get("push_to_hub"):
        raise ConfigError("push_to_hub would upload the dense model alone", "save to a folder and upload that")


def save_plain(model: Any, folder: Path) -> None:
    """Complete what transformers' own `save_pretrained` wrote: names in config.json, routers, settings and their seal."""
    source: PlainSource = model._moefication_source
    kind = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = {auto: str(name).rpartition("--")[2] for auto, name in config["auto_map"].items()}  # without a hub id
    _write_json(folder / "config.json", config | {"architectures": [kind.__name__], "auto_map": code})
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, entry in enumerate(source.settings["layers"]):
        if entry["layer"] in source.sites:  # a part of the converted model has some of its layers
            old, new = f"{index:03d}.", f"{len(layers):03d}."
            mine = [name for name in source.tensors if name.startswith(old)]
            tensors |= {new + name.removeprefix(old): source.tensors[name] for name in mine}
            layers.append(entry)
    target = folder / "moefication"
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "routers.safetensors", {"format": "pt"})
    content = {name: value for name, value in source.settings.items() if name != "digest"}
    content |= {"schema": "moefication/model@2", "layers": layers, "weights": _seal(folder, source.sites)}
    content["tensors"] = _described(target / "routers.safetensors")
    canonical = json.dumps(content, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    _write_json(target / "moefication.json", content | {"digest": hashlib.sha256(canonical.encode()).hexdigest()})


def _seal(folder: Path, sites: dict[str, FFNSite]) -> dict[str, Any]:
    """The `weights` object of moefication.json; an FFN whose tensors are stored under other names is left to the files' hashes."""
    homes: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            homes |= dict.fromkeys(file.keys(), path)
    names = ["config.json", *sorted({path.name for path in homes.values()})]
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in names)
    ffns = {}
    for site in sites.values():
        keys = sorted({piece.parameter for piece in site.slices()})
        if all(key in homes for key in keys):
            digest = hashlib.sha256()
            for key in keys:
                _digest_rows(homes[key], key, digest)
            ffns[site.name] = {"tensors": [[homes[key].name, key] for key in keys], "digest": digest.hexdigest()}
    described = {kind: {name: _described(folder / name) for name in found} for kind, found in
                 (("files", names), ("others", others))}  # fmt: skip
    return {**described, "ffns": ffns}


def _digest_rows(path: Path, key: str, digest: Any) -> None:
    """Dtype, shape and evenly spaced rows of a tensor, as `folder.seal` reads them."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(key)
        shape = list(stored.get_shape())
        digest.update(f"{key} {stored.get_dtype()} {shape}".encode())
        count = max(1, shape[0])
        for row in sorted({number * count // _SEALED_ROWS for number in range(_SEALED_ROWS)}):
            digest.update(stored[row : row + 1].contiguous().view(torch.uint8).numpy().tobytes())


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=2, separators=(",", ": "))
    path.write_text(text + "\n", encoding="utf-8")
