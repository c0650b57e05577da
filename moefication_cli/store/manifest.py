"""`manifest.json`: the commit record of a stage, written last. A folder with a manifest is a finished stage.

    schema       "moefication/split@1"; another version is refused, never patched
    stage        "split", "router/mlp", ...
    config       {name: {value, source, compared}}; `compared` names decide freshness, the rest is only recorded
    inputs       {name: digest}: upstream stages by their names, `base_model` by its fingerprint, data by theirs
    layers       FFN module paths in execution order; layer i is `layer_%03d.safetensors`
    files        {relative path: {sha256, bytes}}
    digest       sha256 over schema, compared config values and the files' hashes: content, not when or where
    metrics      what the stage measured; `layers` inside it holds one object per layer
    seconds      work, without imports and compilation
    environment  versions, device, command line, host
    seal         sha256 over all of the above: later stages decide by inputs and metrics too. Absent before 0.3

Freshness is comparison of this record with today's configuration and inputs. Reads no other file, imports no torch.
"""

import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import jsonio

SCHEMA_VERSION = 1
BASE_MODEL = "base_model"  # the input name of the source model's fingerprint ("model" is a stage)
_PACKAGES = ("torch", "transformers", "safetensors", "moefication")


def schema_of(stage: str) -> str:
    """The schema name of a stage: `router/mlp` -> `moefication/router@1`."""
    return f"moefication/{stage.split('/')[0]}@{SCHEMA_VERSION}"


def layer_name(index: int) -> str:
    """File name of layer `index`."""
    return f"layer_{index:03d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """See the module docstring. Build new ones with `Manifest.make`, which computes the digest."""

    schema: str
    stage: str
    config: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    layers: Sequence[str]
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    metrics: Mapping[str, Any]
    seconds: float
    environment: Mapping[str, Any]
    seal: str = ""

    @classmethod
    def make(cls, *, stage: str, files: Mapping[str, Mapping[str, Any]], **rest: Any) -> "Manifest":
        """A manifest with its digest; `rest` holds the other fields but `schema` and `digest`."""
        schema = schema_of(stage)
        digest = _content_digest(schema, _compared(rest["config"]), files)
        made = cls(schema=schema, stage=stage, files=files, digest=digest, **rest)
        return replace(made, seal=jsonio.seal(made.to_json()))

    @property
    def values(self) -> dict[str, Any]:
        """The configuration's values by name."""
        return {name: entry["value"] for name, entry in self.config.items()}

    @property
    def key(self) -> str:
        """Identifies the work: what goes in, not what came out. Equal keys mean the same layers may be kept."""
        return work_key(self.stage, _compared(self.config), self.inputs, self.layers)

    @property
    def command_line(self) -> list[str]:
        """The words of the command that made the stage; empty where that is not recorded."""
        argv = self.environment.get("argv")
        return ["moefication", *map(str, argv[1:])] if isinstance(argv, list) and argv else []

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `manifest.json`."""
        value: dict[str, Any] = jsonio.plain(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], stage: str, where: Path) -> "Manifest":
        """Check keys, types, schema, file names and digest; `CorruptArtifactError` naming `where` otherwise."""
        check_schema(value.get("schema"), stage.split("/")[0], where)
        value = {"seal": "", **value}
        check_fields(value, cls, where)
        if value["seal"] and value["seal"] != jsonio.seal(value):
            raise corrupt(where, "was altered: its content does not fit its seal")
        manifest = cls(**value)
        if manifest.stage != stage:
            raise corrupt(where, f"is the manifest of `{manifest.stage}`, not of `{stage}`")
        for name, entry in manifest.config.items():
            if not isinstance(entry, dict) or set(entry) != {"value", "source", "compared"}:
                raise corrupt(where, f"`config`: {name!r} does not hold exactly value, source and compared")
        if not all(isinstance(d, str) for d in manifest.inputs.values()):
            raise corrupt(where, "`inputs` must map names to digests")
        for name, entry in manifest.files.items():
            check_file_name(name, where)
            if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"} or type(entry["bytes"]) is not int:
                raise corrupt(where, f"`files`: {name!r} does not hold exactly sha256 and bytes")
            if not isinstance(entry["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
                raise corrupt(where, f"`files`: {name!r} has no sha256")
        if not all(isinstance(name, str) for name in manifest.layers):
            raise corrupt(where, "`layers` must be names")
        if absent := {layer_name(i) for i in range(len(manifest.layers))} - set(manifest.files):
            raise corrupt(where, f"`files` lacks {sorted(absent)[0]}")
        expected = _content_digest(manifest.schema, _compared(manifest.config), manifest.files)
        if manifest.digest != expected:
            raise corrupt(where, f"has digest {manifest.digest[:16]}, but its content gives {expected[:16]}")
        return manifest


def _compared(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in config.items() if entry["compared"]}


def _content_digest(schema: str, compared: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    return jsonio.digest({"schema": schema, "config": compared, "files": hashes})


def work_key(stage: str, compared: Mapping[str, Any], inputs: Mapping[str, str], layers: Sequence[str]) -> str:
    """sha256 over everything that decides a stage's output."""
    return jsonio.digest(
        {"schema": schema_of(stage), "stage": stage, "config": compared, "inputs": inputs, "layers": list(layers)}
    )


def differences(
    manifest: Manifest, compared: Mapping[str, Any], inputs: Mapping[str, str], layers: Sequence[str] | None = None
) -> str | None:
    """Why a stage made under `manifest` does not fit today's configuration and inputs, as a sentence; None if it does.

    "`num_experts` 96 -> 48; `activations` changed"
    """
    was, now = _compared(manifest.config), jsonio.plain(compared)
    reasons = [f"`{name}` {_show(was, name)} -> {_show(now, name)}" for name in sorted({*was, *now}) if name not in was
               or name not in now or not _same(was[name], now[name])]  # fmt: skip
    for name in sorted({*manifest.inputs, *inputs}):
        if name not in inputs:
            reasons.append(f"`{name}` is no longer an input")
        elif name not in manifest.inputs:
            reasons.append(f"`{name}` is a new input")
        elif manifest.inputs[name] != inputs[name]:
            reasons.append(f"`{name}` changed")
    if layers is not None and list(manifest.layers) != list(layers):
        reasons.append(f"`layers` {len(manifest.layers)} -> {len(layers)}"
                       if len(manifest.layers) != len(layers) else "`layers` changed")  # fmt: skip
    return "; ".join(reasons) or None


def _same(was: Any, now: Any) -> bool:
    """Equal, or a list and the comma list that versions before 0.2 recorded for it."""
    if isinstance(was, list) != isinstance(now, list):
        return _items(was) == _items(now)
    return bool(was == now)


def _items(value: Any) -> list[Any] | None:
    pieces = value.split(",") if isinstance(value, str) else value
    if not isinstance(pieces, list):
        return None
    try:
        return [float(piece) for piece in pieces]
    except ValueError:
        return [str(piece).strip() for piece in pieces]


def _show(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "(unset)"
    value = values[name]
    text = value if isinstance(value, str) and value else jsonio.canonical(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."


def corrupt(where: Path, problem: str) -> CorruptArtifactError:
    """`CorruptArtifactError` for a record at `where`."""
    return CorruptArtifactError(f"{where} {problem}", "run the stage that wrote it again, with --force")


def check_schema(schema: object, kind: str, where: Path) -> None:
    """Accept exactly this version's schema of `kind`; a later version asks for an upgrade."""
    if schema == f"moefication/{kind}@{SCHEMA_VERSION}":
        return
    match = re.fullmatch(r"moefication/([a-z]+)@(\d{1,9})", schema) if isinstance(schema, str) else None
    if match and match[1] == kind and int(match[2]) > SCHEMA_VERSION:
        raise CorruptArtifactError(
            f"{where} was written by a newer version of moefication: {schema}, this one reads @{SCHEMA_VERSION}",
            "upgrade moefication, or run the stage again with --force",
        )
    raise corrupt(where, f"has schema {schema!r}, expected 'moefication/{kind}@{SCHEMA_VERSION}'")


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "float": (int, float),
    "Mapping": (dict,),
    "Sequence": (list,),
    "None": (type(None),),
    "bool": (bool,),
}


def check_fields(value: Mapping[str, Any], cls: type, where: Path) -> None:
    """The keys must be exactly the fields of the dataclass `cls`, the values of their outermost types."""
    names = {f.name for f in fields(cls)}
    if value.keys() != names:
        odd = sorted(names ^ value.keys())
        raise corrupt(where, "; ".join(f"{'lacks' if n in names else 'has unknown key'} `{n}`" for n in odd))
    for field in fields(cls):
        annotation = field.type if isinstance(field.type, str) else _annotation(field.type)
        allowed = tuple(t for part in annotation.split("|") for t in _KINDS.get(part.split("[")[0].strip(), (object,)))
        item = value[field.name]
        if not isinstance(item, allowed) or (isinstance(item, bool) and bool not in allowed and object not in allowed):
            raise corrupt(where, f"`{field.name}` is {type(item).__name__}, expected {annotation}")


def _annotation(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", ()) else str(kind)
    return text.replace("collections.abc.", "").replace("typing.", "")


def check_file_name(name: object, where: Path) -> None:
    """A relative POSIX path that cannot leave its folder; `CorruptArtifactError` otherwise."""
    ok = isinstance(name, str) and name != "" and "\0" not in name and "\\" not in name and ":" not in name
    if ok and isinstance(name, str):
        parts = name.split("/")
        ok = not PurePosixPath(name).is_absolute() and not {"", ".", ".."} & set(parts)
    if not ok:
        raise corrupt(where, f"names a file outside its folder: {name!r}")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what this process runs; recorded, never compared. Imports none of the packages it names."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": device,
        "argv": list(sys.argv),
        "host": socket.gethostname(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
