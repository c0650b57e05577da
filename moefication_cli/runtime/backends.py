"""The backends by name, what each needs, and the choice made under `auto`.

Every backend is `(x_TD, selected, ExpertWeights) -> y_TD` and is judged by `reference.masked`; `dense` ignores the selection.
Heavy packages (numba, triton, fmoe) are imported when their backend is first asked for, never here.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights
from moefication_cli.runtime import reference
from moefication_cli.runtime import torch_backends as portable

log = logging.getLogger(__name__)
Backend = Callable[[Tensor, Tensor, ExpertWeights], Tensor]
ALL_ON_TOKENS = 96  # below, the compiled kernel is faster than torch's matmuls even when every neuron runs


def _numba(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cpu.numba_backend import compute

    return compute(x_TD, selected, weights)


def _triton(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cuda.triton_kernels import compute

    return compute(x_TD, selected, weights)


def _fastmoe(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cuda.fastmoe import compute

    return compute(x_TD, selected, weights)


BACKENDS: dict[str, Backend] = {
    "reference": reference.masked,
    "dense": portable.dense,
    "torch": portable.by_expert,
    "grouped": portable.grouped,
    "numba": _numba,
    "triton": _triton,
    "fastmoe": _fastmoe,
}


def available(name: str, device: torch.device, dtype: torch.dtype, weights: ExpertWeights | None = None) -> None:
    """Raises UnavailableError, naming what is missing, unless backend `name` can run there (and on these weights)."""
    if name not in BACKENDS:
        raise UnavailableError(f"there is no backend {name!r}", f"use one of {', '.join(BACKENDS)}, or auto")
    missing = _missing(name, device, dtype, weights)
    if missing is not None:
        raise UnavailableError(f"backend {name} is not available: {missing}", "use --backend auto")


def _missing(name: str, device: torch.device, dtype: torch.dtype, weights: ExpertWeights | None) -> str | None:
    if name == "grouped" and weights is not None:
        return portable.grouped_obstacle(weights)
    package, kind = {"numba": ("numba", "cpu"), "triton": ("triton", "cuda"), "fastmoe": ("fmoe", "cuda")}.get(
        name, ("", "")
    )
    if not package:
        return None
    if device.type != kind:
        return f"it runs on {kind}, the tensors are on {device.type}"
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if name == "numba":
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 and bfloat16, not {dtype}"
    return None if weights is None or name == "fastmoe" else _unreadable(weights, dtype)


def _unreadable(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    """What kernels that work on addresses cannot read."""
    ffn = weights.ffn
    if ffn.activation not in ACTIVATIONS:
        return f"it does not know the activation {ffn.activation}"
    for name, w_FD in (("up", ffn.w_up_FD), ("gate", ffn.w_gate_FD), ("down", ffn.w_down_FD)):
        if w_FD is not None and w_FD.dtype != dtype:
            return f"the {name} projection is {w_FD.dtype} and the input {dtype}"
        if w_FD is not None and not w_FD.is_contiguous():
            return f"the {name} projection is not neuron-major and contiguous"
    return None


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    weights: ExpertWeights,
    active_fraction: float,
    needs_grad: bool = False,
) -> str:
    """The backend `auto` uses for `num_tokens` tokens of which each computes `active_fraction` of the neurons.

    Warns, once, where the fastest one cannot run on this machine or these weights.
    """

    def can(name: str) -> bool:
        missing = _missing(name, device, dtype, weights)
        if missing is not None:
            _warn_once(f"backend {name} is not available: {missing}; the next best is used")
        return missing is None

    if active_fraction >= 0.9:
        few = device.type == "cpu" and num_tokens < ALL_ON_TOKENS and active_fraction == 1
        return "numba" if few and not needs_grad and can("numba") else "dense"
    if needs_grad:
        return "torch"
    if device.type == "cuda":
        if num_tokens <= 32 and can("triton"):
            return "triton"
        return "grouped" if can("grouped") else "torch"
    if can("numba"):
        return "numba"
    return "torch" if num_tokens >= 64 else "dense"
