"""What `apply` adds to a dense model folder: `moefication/moefication.json` and `moefication/routers.safetensors`.

The JSON has `schema` (`moefication/model@2`), `layers` (one object per FFN in execution order: `layer`, and unless
`dense` is true `num_experts`, `num_shared`, `rule` {top_k | threshold | max_ratio | cumulative} and `router`
{activation, normalise}, and `ffn_flops_fraction` where it is known), `tensors` {sha256, bytes}, `weights` (see `seal`),
`digest` (sha256 of the canonical JSON of all the rest) and whatever else the writer records. Tensors are named
`{position in layers:03d}.{name}` with the names of the router's tensors and of `_COMPENSATION`. Reading trusts nothing:
every defect is a CorruptArtifactError. Axes: D model width, E experts, R router width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moefication_cli.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from moefication_cli.ffn import Compensation
from moefication_cli.models.folder.contents import WRITE_AGAIN
from moefication_cli.routing.router import Router
from moefication_cli.routing.routers import read_router
from moefication_cli.routing.rules import Rule, TopK, read_rule
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write, make_dirs, sha256

SCHEMA, OLD_SCHEMA = "moefication/model@2", "moefication/model@1"  # @1 has neither `weights` nor `digest`
FOLDER, SETTINGS, ROUTERS = "moefication", "moefication.json", "routers.safetensors"
_COMPENSATION = {
    "constant_D": "constant_D",
    "corr_in_RD": "w_in_RD",
    "corr_out_RD": "w_out_RD",
}


@dataclass(frozen=True)
class MoELayer:
    """One FFN of the converted model. A dense one has no router and one expert."""

    name: str
    dense: bool
    num_experts: int = 1
    num_shared: int = 0
    rule: Rule | None = None
    router: Router | None = None
    compensation: Compensation | None = None
    flops_fraction: float = 0.0  # of the dense multiply-adds, router included, on calibration data; 0: not recorded


@dataclass(frozen=True)
class MoEFolder:
    """The settings of a converted model as written, and its layers with their tensors."""

    settings: dict[str, Any]
    layers: tuple[MoELayer, ...]


def layer_tensors(index: int, router: Router | None, compensation: Compensation | None = None) -> dict[str, Tensor]:
    """The tensors of the layer at that position of `layers`, under the names they have in the file."""
    named = {} if router is None else dict(router.tensors())
    if compensation is not None:
        values = {stored: getattr(compensation, field) for stored, field in _COMPENSATION.items()}
        named.update({name: value for name, value in values.items() if value is not None})
    return {f"{index:03d}.{name}": tensor for name, tensor in named.items()}


def write_moe_settings(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Path]:
    """Writes both files below `folder`, synced, the JSON last; fills in `schema` and the digest of the tensors.

    Reads the result back, so that what is written can be read: raises CorruptArtifactError if it cannot.
    """
    target = folder / FOLDER
    make_dirs(target)
    # One canonical metadata key: several come out in random order
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())},
        metadata={"format": "pt"},
    )
    atomic_write(target / ROUTERS, data)
    record = {"sha256": sha256(target / ROUTERS), "bytes": len(data)}
    content = {name: value for name, value in settings.items() if name != "digest"}
    content |= {"schema": SCHEMA, "tensors": record}
    jsonio.write(target / SETTINGS, content | {"digest": jsonio.digest(content)})
    read_moe_folder(folder)
    return [target / ROUTERS, target / SETTINGS]


def read_moe_folder(folder: Path) -> MoEFolder:
    """Reads and checks both files. MissingArtifactError if the folder was never converted."""
    path = folder / FOLDER / SETTINGS
    if not path.is_file():
        raise MissingArtifactError(
            f"{folder} has no {FOLDER}/{SETTINGS}: it is not a MoEfied model", "run: moefication apply RUN"
        )
    settings = jsonio.read_object(path)
    if settings.get("schema") not in (SCHEMA, OLD_SCHEMA):
        newer = isinstance(settings.get("schema"), str) and settings["schema"].startswith("moefication/model@")
        hint = "upgrade moefication, or write the folder again with this version" if newer else WRITE_AGAIN
        raise CorruptArtifactError(f"{path} has schema {settings.get('schema')!r}, expected {SCHEMA!r}", hint)
    content = {name: value for name, value in settings.items() if name != "digest"}
    if settings["schema"] == SCHEMA and settings.get("digest") != jsonio.digest(content):
        raise CorruptArtifactError(f"{path} was altered: its content does not fit its digest", WRITE_AGAIN)
    tensors = _read_tensors(folder / FOLDER / ROUTERS, settings.get("tensors"))
    entries = settings.get("layers")
    if not isinstance(entries, list) or not entries:
        raise CorruptArtifactError(f"{path} lists no layers", WRITE_AGAIN)
    layers = tuple(_layer(path, index, entry, tensors) for index, entry in enumerate(entries))
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise CorruptArtifactError(f"{path} lists a layer twice", WRITE_AGAIN)
    if tensors:
        raise CorruptArtifactError(
            f"{path.with_name(ROUTERS)} has tensors no layer uses: {', '.join(sorted(tensors)[:3])}", WRITE_AGAIN
        )
    return MoEFolder(settings, layers)


def _read_tensors(path: Path, record: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing: a MoE needs its routers", WRITE_AGAIN)
    if not isinstance(record, dict) or set(record) != {"sha256", "bytes"}:
        raise CorruptArtifactError(f"{path.with_name(SETTINGS)} does not say what {path.name} holds", WRITE_AGAIN)
    found = sha256(path)
    if found != record["sha256"]:
        raise CorruptArtifactError(
            f"{path} was altered: sha256 {found[:12]}.., recorded {str(record['sha256'])[:12]}..", WRITE_AGAIN
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}", WRITE_AGAIN) from None


def _layer(path: Path, index: int, entry: Any, tensors: dict[str, Tensor]) -> MoELayer:
    """One checked layer; takes its tensors out of `tensors`."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise CorruptArtifactError(f"{path}, layer {index}: {what}", WRITE_AGAIN)

    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    check(isinstance(entry, dict) and isinstance(entry.get("layer"), str), "no name")
    dense = entry.get("dense", False)
    check(isinstance(dense, bool), "`dense` is not true or false")
    if dense:
        return MoELayer(entry["layer"], dense=True)
    num_experts, num_shared = entry.get("num_experts"), entry.get("num_shared", 0)
    check(whole(num_experts, 1) and whole(num_shared, 0), "num_experts or num_shared is not a count")
    share = entry.get("ffn_flops_fraction", 0.0)
    check(type(share) in (int, float) and math.isfinite(share) and share >= 0, "`ffn_flops_fraction` is not a share")
    prefix = f"{index:03d}."
    mine = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    for name, tensor in mine.items():
        good = tensor.dim() == len(name.rpartition("_")[2]) and tensor.is_floating_point() and tensor.numel() > 0
        check(good and bool(tensor.isfinite().all()), f"tensor {name} of shape {tuple(tensor.shape)} is not usable")
    extra = {stored: mine.pop(stored) for stored in _COMPENSATION if stored in mine}
    try:
        rule, router = _selection(entry, mine, num_experts)
    except ConfigError as error:
        raise CorruptArtifactError(f"{path}, layer {index}: {error.message}", WRITE_AGAIN) from None
    some_D = extra.get("constant_D")
    d_model = router.d_model if router is not None else -1 if some_D is None else len(some_D)
    check(some_D is None or tuple(some_D.shape) == (d_model,), f"tensor constant_D is not of shape {(d_model,)}")
    inward, outward = extra.get("corr_in_RD"), extra.get("corr_out_RD")
    check((inward is None) == (outward is None), "half of a correction")
    if inward is not None and outward is not None:
        check(inward.shape == outward.shape and inward.shape[1] == d_model, "the correction does not fit")
    return MoELayer(
        name=entry["layer"],
        dense=False,
        num_experts=num_experts,
        num_shared=num_shared,
        rule=rule,
        router=router,
        compensation=Compensation(**{_COMPENSATION[stored]: tensor for stored, tensor in extra.items()})
        if extra
        else None,
        flops_fraction=float(share),
    )


def _selection(entry: Any, tensors: dict[str, Tensor], num_experts: int) -> tuple[Rule, Router | None]:
    """The rule and the router of one layer. Raises ConfigError for what does not fit together."""
    setting, recorded = entry.get("rule"), entry.get("router")
    if not isinstance(setting, dict):
        raise ConfigError("no rule")
    rule = read_rule(setting)
    if recorded is None:
        if tensors:
            raise ConfigError(f"tensor {sorted(tensors)[0]}, and no router that it belongs to")
        if rule != TopK(0):  # zero experts beside the always-on neurons: a layer that needs no router
            raise ConfigError("no router, and a rule that needs one")
        return rule, None
    rule.check(num_experts)
    if not isinstance(recorded, dict):
        raise ConfigError("`router` is not an object")
    return rule, read_router(tensors, recorded, num_experts)
