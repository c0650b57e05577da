"""The experts of a loaded model: what was read from a converted folder installed in it, and another budget at run time."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefication_cli.errors import ConfigError, CorruptArtifactError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.models.folder.contents import WRITE_AGAIN
from moefication_cli.models.folder.moe_folder import MoEFolder, MoELayer
from moefication_cli.models.installed import FFNLayer
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.saving import refuse_to_save, save_converted
from moefication_cli.models.sites import FFNSite, find_sites
from moefication_cli.models.surgery import install, live_weights, pack, uninstall
from moefication_cli.routing.rules import TopK
from moefication_cli.runtime.backends import installed
from moefication_cli.runtime.kernel_times import SHARES, FFNKind, KernelTimes
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN

log = logging.getLogger(__name__)


class Experts:
    """`model.moefication`: the budget of a loaded mixture of experts. Copied and pickled with its model."""

    def __init__(self, model: nn.Module, sites: list[FFNSite], layers: tuple[MoELayer, ...], backend: str) -> None:
        self._model, self._sites, self._layers = model, sites, layers
        self._token_mask = TokenMask(model)
        self.backend = backend

    def set(self, fraction: float | None = None, top_k: int | None = None) -> None:
        """Another budget from the next call on; without arguments the recorded one.

        `fraction` replaces the recorded rule by the best `max(1, round(fraction * E))` experts; a layer without a router runs
        that share of its experts, the most important ones, for every token. `top_k` replaces it by the best k (all, where there
        are fewer) in the layers with a router and leaves the others as recorded. Layers that were left dense stay so.
        Raises ConfigError for a fraction outside (0, 1], a k that is not a positive integer, and both at once.
        """
        check_budget(fraction, top_k)
        times = self._times()
        masked: set[int] = set()
        for site, layer in zip(self._sites, self._layers, strict=True):
            if layer.dense:
                continue
            if fraction == 1 and layer.router is None:  # all neurons on: the dense layer
                ffn = live_weights(self._model, site)
                if ffn.quantised:  # whose own modules multiply no int8
                    whole = ExpertWeights(ffn, 1, site.num_neurons)
                    install(self._model, site, PrunedFFN(whole, self.backend), self._token_mask)
                else:
                    uninstall(self._model, site)
                continue
            made = _moe_ffn(self._model, site, layer, self.backend, fraction, top_k)
            if times is not None and isinstance(made, MoEFFN):
                least = _masked_from(times, self.kinds(made.weights.ffn.w_up_FD.dtype)[site.name], made)
                if least is not None:
                    made.masked_from = least
                    masked.add(least)
            install(self._model, site, made, self._token_mask)
        if masked:
            log.warning(
                "FFN calls of %d tokens and more compute all neurons and zero those not selected, the same mixture: "
                "faster than the experts alone where `bench` measured it (%s)",
                min(masked),
                times and times.path,
            )

    def kinds(self, dtype: torch.dtype) -> dict[str, FFNKind]:
        """What decides the time of every FFN, by its name, with weights of this dtype."""
        return dict(zip((site.name for site in self._sites), ffn_kinds(self._sites, dtype), strict=True))

    def _times(self) -> KernelTimes | None:
        """What was measured on this machine, for `auto` on the CPU."""
        device = next(self._model.parameters()).device
        if self.backend != "auto" or device.type != "cpu" or not installed("numba"):
            return None
        return KernelTimes(log.warning)


def _masked_from(times: KernelTimes, kind: FFNKind, layer: MoEFFN) -> int | None:
    """From how many tokens on masked products are known to be faster than this layer's experts.

    Where tokens run different numbers of experts, they must be faster than the fewest that were measured.
    """
    weights, rule = layer.weights, layer.rule
    share = SHARES[0]
    if isinstance(rule, TopK):
        share = (weights.num_shared + rule.top_k * weights.expert_size) / weights.ffn.num_neurons
    return times.masked_from(kind, weights.expert_size, share)


def ffn_kinds(sites: Sequence[FFNSite], dtype: torch.dtype) -> list[FFNKind]:
    """What decides the time of each FFN of a model, all of whose FFNs are `sites`."""
    shapes = [(site.d_model, site.num_neurons, site.gated, site.activation) for site in sites]
    name = str(dtype).removeprefix("torch.")
    return [FFNKind(*shape, dtype=name, layers=shapes.count(shape)) for shape in shapes]


def check_budget(fraction: float | None, top_k: int | None) -> None:
    """Raises ConfigError for what `Experts.set` cannot take."""
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if fraction is not None and not (number and 0 < fraction <= 1):
        raise ConfigError(f"fraction {fraction!r} is not a number in (0, 1]")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ConfigError(f"top_k {top_k!r} is not a positive integer")
    if fraction is not None and top_k is not None:
        raise ConfigError("fraction and top_k are two ways to say one thing", "give one of them")


def sites_of(model: nn.Module, folder: Path, moe: MoEFolder) -> list[FFNSite]:
    """The FFNs of the dense model of `folder`. Raises CorruptArtifactError where they are not those the experts are for."""
    sites = find_sites(model, moe.settings.get("ffn"))
    if [site.name for site in sites] != [layer.name for layer in moe.layers]:
        raise CorruptArtifactError(
            f"{folder}: the layers in moefication.json are not the FFNs of the model", WRITE_AGAIN
        )
    return sites


def attach_experts(
    model: Any,
    sites: list[FFNSite],
    folder: Path,
    moe: MoEFolder,
    backend: str = "auto",
    fraction: float | None = None,
    top_k: int | None = None,
) -> None:
    """Install the layers read from `folder` in the dense model of that folder, whose `save_pretrained` then writes both.

    `model.moefication` is their `Experts`. Raises CorruptArtifactError if they do not fit.
    """
    model.moefication = Experts(model, sites, moe.layers, backend)
    model.moefication.set(fraction, top_k)
    rounded = any(parameter.dtype == torch.int8 for parameter in model.parameters())
    model.save_pretrained = refuse_to_save if rounded else partial(save_converted, model, moe)
    experts = sum(not layer.dense for layer in moe.layers)
    log.info("%s: mixture of experts in %d of %d FFNs, backend %s", folder, experts, len(sites), backend)


def _moe_ffn(
    model: nn.Module, site: FFNSite, layer: MoELayer, backend: str, fraction: float | None, top_k: int | None
) -> FFNLayer:
    router, rule = layer.router, layer.rule
    assert rule is not None
    neurons = site.num_neurons - layer.num_shared
    width = site.d_model if router is None else router.d_model
    if width != site.d_model or neurons < 0 or neurons % layer.num_experts:
        raise CorruptArtifactError(
            f"{site.name}: {layer.num_experts} experts of {neurons} neurons, router input {width}: "
            f"does not fit F={site.num_neurons}, D={site.d_model}",
            WRITE_AGAIN,
        )
    num_experts, num_shared = layer.num_experts, layer.num_shared
    if router is not None and top_k is not None:
        rule = TopK(min(top_k, num_experts))
    elif router is not None and fraction is not None:
        rule = TopK(max(1, round(fraction * num_experts)))
    elif fraction is not None:  # neurons stand in order of importance, expert after expert
        size = neurons // num_experts
        num_shared = min(max(1, round(fraction * site.num_neurons / size)) * size, site.num_neurons - size)
        num_experts = (site.num_neurons - num_shared) // size
    pack(model, site)
    ffn = live_weights(model, site)
    device = ffn.w_up_FD.device  # routers and compensation stay float32, as they were measured
    if device.type == "meta":  # offloaded: where the weights come to is known when they are there
        device = torch.device("cpu")
    extra = None if layer.compensation is None else layer.compensation.to(device)
    weights = ExpertWeights(ffn, num_experts, num_shared, extra)
    if router is None:
        return PrunedFFN(weights, backend)
    return MoEFFN(weights, router.to(device), rule, backend=backend, share=layer.flops_fraction)
