"""The mixture of experts of a converted folder in plain torch: what its own code runs where this package is not installed.

`embedded` writes this module into the folder behind the modules it imports, so it uses nothing but them, torch, transformers,
safetensors and huggingface_hub. It computes what the `reference` backend computes, and saves no time: all neurons are computed.
Axes as in `ffn`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from moefication_cli.errors import CorruptArtifactError, MissingArtifactError
from moefication_cli.ffn import Compensation, ExpertWeights
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite, find_sites
from moefication_cli.models.surgery import install, live_weights, pack
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Rule, read_rule
from moefication_cli.runtime.reference import masked, unrouted

_SCHEMAS = ("moefication/model@1", "moefication/model@2")
_STORED_AS = {"constant_D": "constant_D", "w_in_RD": "corr_in_RD", "w_out_RD": "corr_out_RD"}


@dataclass(frozen=True)
class PlainSource:
    """What a mixture was made from, kept with its model for `save_pretrained`: settings, routers, the model's FFNs by name."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    sites: dict[str, FFNSite]


class PlainFFN:
    """y = FFN(x) of the experts each token selects; without a router, of the shared neurons alone."""

    def __init__(self, weights: ExpertWeights, router: TwoLayerRouter | None, rule: Rule) -> None:
        self.weights, self.router, self.rule = weights, router, rule

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]; of a routed layer 0 where `token_mask` [...] is False."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.router is None:
            return unrouted(x_TD, self.weights).view(x.shape)
        real_T = None if token_mask is None else token_mask.reshape(-1)
        if real_T is None or bool(real_T.all()):
            return self._routed(self.router, x_TD).view(x.shape)
        y_TD = torch.zeros_like(x_TD)
        y_TD[real_T] = self._routed(self.router, x_TD[real_T])
        return y_TD.view(x.shape)

    def _routed(self, router: TwoLayerRouter, x_TD: Tensor) -> Tensor:
        return masked(x_TD, self.rule.select(router.scores(x_TD)), self.weights)


def attach_plain(model: Any, folder: str | Path, revision: str | None = None) -> None:
    """Make a loaded dense model the mixture of experts that its folder or hub repository describes.

    A part of the converted model gets the experts of its own layers. Raises MissingArtifactError (no experts there),
    CorruptArtifactError (they were altered, or do not fit).
    """
    local = Path(folder)
    if not local.is_dir():
        local = Path(snapshot_download(str(folder), revision=revision, allow_patterns=["moefication/*"]))
    settings, tensors = _read(local)
    sites = {site.name: site for site in find_sites(model.eval(), settings.get("ffn"))}
    layers = [(i, e) for i, e in enumerate(settings["layers"]) if e["layer"] in sites and not e.get("dense")]
    if not layers and not all(entry.get("dense") for entry in settings["layers"]):
        raise CorruptArtifactError(f"{local}: the layers in moefication.json are not the FFNs of the model")
    model._moefication_source = PlainSource(settings, tensors, sites)
    token_mask = TokenMask(model)
    for index, entry in layers:
        prefix = f"{index:03d}."
        mine = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        site = sites[entry["layer"]]
        install(model, site, _layer(model, site, entry, mine), token_mask)


def _read(local: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings, and the tensors of routers and compensation. Weight files must have the sizes that were recorded."""
    path = local / "moefication" / "moefication.json"
    if not path.is_file():
        raise MissingArtifactError(f"{local} has no moefication/moefication.json: its experts are missing")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("schema") not in _SCHEMAS:
        raise CorruptArtifactError(f"{path} has schema {settings.get('schema')!r}, which this code does not know")
    routers = path.with_name("routers.safetensors")
    if not routers.is_file() or hashlib.sha256(routers.read_bytes()).hexdigest() != settings["tensors"]["sha256"]:
        raise CorruptArtifactError(f"{routers} is missing or was altered")
    for name, entry in settings.get("weights", {}).get("files", {}).items():
        file = local / name
        if name.endswith(".safetensors") and file.is_file() and file.stat().st_size != entry["bytes"]:
            raise CorruptArtifactError(f"{file} is not the one the experts were made for")
    return settings, load_file(routers)


def _layer(model: Any, site: FFNSite, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PlainFFN:
    extra = {name: tensors.pop(stored) for name, stored in _STORED_AS.items() if stored in tensors}
    pack(model, site)
    ffn = live_weights(model, site)
    num_experts, device = entry["num_experts"], ffn.w_up_FD.device
    if device.type == "meta":  # offloaded
        device = torch.device("cpu")
    rule, router = read_rule(entry["rule"]), None
    neurons = site.num_neurons - entry.get("num_shared", 0)
    if neurons < 0 or neurons % num_experts:
        raise CorruptArtifactError(f"{site.name}: {num_experts} experts of {neurons} neurons do not fit the model")
    if entry.get("router") is not None:
        rule.check(num_experts)
        router = TwoLayerRouter.read(tensors, entry["router"], num_experts).to(device)
    fix = Compensation(**extra).to(device) if extra else None
    return PlainFFN(ExpertWeights(ffn, num_experts, entry.get("num_shared", 0), fix), router, rule)
