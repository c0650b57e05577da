"""The backends by name, what each needs, and the choice made under `auto`.

Every backend computes `(x_TD, selected, ExpertWeights) -> y_TD` and is judged by `reference.masked`; `dense` ignores the
selection. Heavy packages (numba, triton, fmoe) are imported when their backend is first asked for, never here.
A new backend is a file and a line in `BACKENDS`.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moefication_cli.errors import UnavailableError, did_you_mean
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights
from moefication_cli.runtime import reference, torch_backends

log = logging.getLogger(__name__)
ALL_ON_TOKENS = 96  # below, the compiled kernel is faster than torch's matmuls even when every neuron runs
# On CUDA (H200, tests/benchmarks/cuda.md) the Triton kernels take half the dense time for one token through an FFN of 271 MB and
# the same time for 16. Without a CUDA graph their launches from Python take 0.35 ms, as long as reading 1 GiB does.
CUDA_FEW_TOKENS, CUDA_LEAST_BYTES = 8, 1 << 30
# Many tokens: gated FFNs in half precision gain from the dense FFN's arithmetic of 2,048 tokens of llama-7b on, with up to this
# share of it selected; others do not, because half of their arithmetic is the down-projection, which stays dense. `grouped` was
# slower than dense for every size of experts.
CUDA_MANY_FLOPS, CUDA_MANY_SHARE = 5e11, 0.35
# The backends that do not wait for the GPU on CUDA: their calls fit in a CUDA graph
NEVER_WAITING = {"dense", "triton"}


@cache
def installed(package: str) -> bool:
    """Whether that package is there; asked in every call under `auto`, so it is looked up once."""
    return importlib.util.find_spec(package) is not None


def _numba(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cpu.numba_backend import compute

    return compute(x_TD, selected, weights)


def _triton(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cuda.triton_layer import compute

    return compute(x_TD, selected, weights)


def _fastmoe(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    from moefication_cli.runtime.cuda.fastmoe import compute

    return compute(x_TD, selected, weights)


def _fastmoe_layer(weights: ExpertWeights) -> Callable[[Tensor, Tensor], Tensor]:
    from moefication_cli.runtime.cuda.fastmoe import FastMoELayer

    return FastMoELayer(weights)


def _no_obstacle(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    return None


def _grouped_obstacle(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    return torch_backends.grouped_obstacle(weights)


def _unreadable(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    """What kernels that work on addresses cannot read."""
    ffn = weights.ffn
    if ffn.activation not in ACTIVATIONS:
        return f"it does not know the activation {ffn.activation}"
    for name, w_FD in (("up", ffn.w_up_FD), ("gate", ffn.w_gate_FD), ("down", ffn.w_down_FD)):
        if w_FD is not None and (torch.float32 if w_FD.dtype == torch.int8 else w_FD.dtype) != dtype:
            return f"the {name} projection is {w_FD.dtype} and the input {dtype}"
        if w_FD is not None and not w_FD.is_contiguous():
            return f"the {name} projection is not neuron-major and contiguous"
    return None


@dataclass(frozen=True)
class Backend:
    """A row of `BACKENDS`: what computes, and what it needs. None: any device, no package, any dtype.

    `obstacle` says what about these weights, for inputs of this dtype, it cannot work with. `prepare`, where a backend keeps
    weights in a layout of its own, makes once per layer what is then called as `(x_TD, selected) -> y_TD`.
    """

    compute: Callable[[Tensor, Tensor, ExpertWeights], Tensor]
    device: str | None = None
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    obstacle: Callable[[ExpertWeights, torch.dtype], str | None] = _no_obstacle
    prepare: Callable[[ExpertWeights], Callable[[Tensor, Tensor], Tensor]] | None = None

    def missing(self, device: torch.device, dtype: torch.dtype, weights: ExpertWeights | None) -> str | None:
        """Why it cannot run there (on these weights), or None."""
        if self.device is not None and device.type != self.device:
            return f"it runs on {self.device}, the tensors are on {device.type}"
        if self.package is not None and not installed(self.package):
            return f"the package {self.package} is not installed"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}"
        return None if weights is None else self.obstacle(weights, dtype)


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference.masked),
    "dense": Backend(torch_backends.dense),
    "torch": Backend(torch_backends.by_expert),
    "grouped": Backend(torch_backends.grouped, obstacle=_grouped_obstacle),
    "numba": Backend(_numba, "cpu", "numba", (torch.float32, torch.bfloat16), _unreadable),
    "triton": Backend(_triton, "cuda", "triton", obstacle=_unreadable),
    "fastmoe": Backend(_fastmoe, "cuda", "fmoe", prepare=_fastmoe_layer),
}


def backend_of(name: str) -> Backend:
    """The backend of that name. Raises UnavailableError naming those there are."""
    if name not in BACKENDS:
        hint = did_you_mean(name, (*BACKENDS, "auto"), f"use one of {', '.join(BACKENDS)}, or auto")
        raise UnavailableError(f"there is no backend {name!r}", hint)
    return BACKENDS[name]


def available(name: str, device: torch.device, dtype: torch.dtype, weights: ExpertWeights | None = None) -> None:
    """Raises UnavailableError, naming what is missing, unless backend `name` can run there (and on these weights)."""
    missing = backend_of(name).missing(device, dtype, weights)
    if missing is not None:
        raise UnavailableError(f"backend {name} is not available: {missing}", "use --backend auto")


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def say_dense_on_cuda() -> None:
    """Warns, once, that `auto` computes more on a GPU than was selected, and what to do where that is not wanted."""
    _warn_once(
        "calls of the FFNs on the GPU are computed dense where that is faster: all but those of many tokens through large gated "
        "FFNs in half precision (2,048 tokens of a 7B Llama), and of up to 8 tokens through FFNs of 1 GiB and more; in a CUDA "
        'graph one token through smaller ones can gain by load(..., backend="triton")'
    )


def choose(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    weights: ExpertWeights,
    active_fraction: float,
    needs_grad: bool = False,
) -> str:
    """The backend `auto` uses for `num_tokens` tokens of which each computes `active_fraction` of the neurons (0: not known).

    Warns, once, where the fastest one cannot run on this machine or these weights; what is used then computes the same
    mixture. `dense` is only chosen where it is faster: it computes every neuron.
    """

    def can(name: str) -> bool:
        missing = BACKENDS[name].missing(device, dtype, weights)
        if missing is not None:
            _warn_once(f"backend {name} is not available: {missing}; the next best is used")
        return missing is None

    if weights.ffn.quantised:  # dense makes float32 copies of all matrices in every call
        return "numba" if not needs_grad and can("numba") else "torch"
    if active_fraction >= 0.9:
        few = device.type == "cpu" and num_tokens < ALL_ON_TOKENS and active_fraction == 1
        return "numba" if few and not needs_grad and can("numba") else "dense"
    if needs_grad:
        return "torch"
    if device.type == "cuda":
        ffn = weights.ffn
        num_bytes = ffn.w_up_FD.numel() * ffn.w_up_FD.element_size() * (3 if ffn.gated else 2)
        few = num_tokens <= CUDA_FEW_TOKENS and num_bytes >= CUDA_LEAST_BYTES
        flops = 6.0 * num_tokens * ffn.w_up_FD.numel()
        many = ffn.gated and dtype.itemsize == 2 and flops >= CUDA_MANY_FLOPS and 0 < active_fraction <= CUDA_MANY_SHARE
        return "triton" if (few or many) and can("triton") else "dense"
    return "numba" if can("numba") else "torch"
