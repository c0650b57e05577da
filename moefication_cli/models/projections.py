"""The weights that one FFN's projections hold: how they lie in memory, and views on them, neuron-major. Axes as in `ffn`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.models.sites import FFNSite

SCALE = "weight_scale"  # buffer beside an int8 weight (see `models.int8`)


def without_memory(weights: ExpertWeights) -> ExpertWeights:
    """With tensors that have no memory in place of the views on parameters."""
    with torch.no_grad():
        return replace(weights, ffn=weights.ffn.to("meta"))


def pack_parts(up: Any, gate: Any, down: Any) -> None:
    """Stores the projections neuron-major and in the widest of their dtypes, where they do not lie so already."""
    parts = [part for part in (up, None if gate is up else gate, down) if part is not None]
    dtype = max((part.weight.dtype for part in parts), key=lambda kind: kind.itemsize)
    if not dtype.is_floating_point:  # made neuron-major when they were quantised
        return
    for part in parts:
        old, learns = part.weight, part.weight.requires_grad
        neurons_first = (part is down) == isinstance(part, Conv1D)
        rows = old.detach() if neurons_first else old.detach().t()
        if not rows.is_contiguous() or old.dtype != dtype:
            rows = rows.to(dtype).contiguous()
            part.weight = nn.Parameter(rows if neurons_first else rows.t(), requires_grad=learns)
        if part.bias is not None and part.bias.dtype != dtype:
            part.bias = nn.Parameter(part.bias.detach().to(dtype), requires_grad=learns)


def rows_of(part: Any, reads: bool) -> Tensor:
    """The [F, D] view of a projection that reads (up, gate) or writes (down) the residual stream."""
    weight: Tensor = part.weight
    return weight if reads != isinstance(part, Conv1D) else weight.t()


def same_memory(new: FFNWeights, old: FFNWeights) -> bool:
    """Whether views derived anew would read what the old ones read, cut off from autograd as they are."""
    for name, value in vars(new).items():
        before = getattr(old, name)
        if isinstance(value, Tensor) and isinstance(before, Tensor):
            if before.requires_grad or value.data_ptr() != before.data_ptr():
                return False
            if (value.dtype, value.device, value.stride()) != (before.dtype, before.device, before.stride()):
                return False
        elif value is not before and value != before:
            return False
    return True


def views(up: Any, gate: Any, down: Any, site: FFNSite) -> FFNWeights:
    """The FFN's weights as views on the parameters of its projections."""
    modules = {"up": up, "gate": gate, "down": down}
    ffn = site.weights_of(lambda piece: piece.of(getattr(modules[piece.part], piece.kind)))
    if not ffn.quantised:
        return ffn
    scales = {
        f"scale_{piece.part}_F": getattr(modules[piece.part], SCALE)[piece.start : piece.stop]
        for piece in site.slices()
        if piece.kind == "weight"
    }
    return replace(ffn, **scales)
