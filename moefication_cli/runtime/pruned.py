"""A layer without a router: the same neurons run for every token, the rest never does.

What a budget chooses where routing would cost more than it saves, and what static pruning is. The dropped neurons are
stood in for by the compensation. Axes as in `ffn`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.runtime.backends import available
from moefication_cli.runtime.reference import unrouted

if TYPE_CHECKING:
    from moefication_cli.runtime.cpu.numba_backend import CompiledLayer


class PrunedFFN:
    """y = FFN of the first `num_shared` neurons (+ compensation).

    `backend` is a name of `backends.BACKENDS`: `numba` is the compiled kernel, `auto` takes it where it can run, and all
    others mean plain torch. `last_backend` names the path of the latest call. `of_neurons`: how many the dense FFN has,
    where `weights` hold the kept ones alone. After the parameters' storage was replaced assign `weights` anew.
    """

    def __init__(self, weights: ExpertWeights, backend: str = "auto", of_neurons: int | None = None) -> None:
        if backend != "auto":
            available(backend, weights.ffn.w_up_FD.device, weights.ffn.dtype, weights)
        self.weights, self.backend, self.last_backend = weights, backend, ""
        self.of_neurons = of_neurons or weights.ffn.num_neurons
        self._prepared: tuple[ExpertWeights, CompiledLayer | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: without what is prepared, which holds addresses in this process's memory."""
        return {**self.__dict__, "_prepared": None}

    @property
    def active_fraction(self) -> float:
        """Share of the dense FFN's neurons that run."""
        return self.weights.num_shared / self.of_neurons

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]. Padding (`token_mask` [...] False) gets 0 of the kernel, in torch what any token gets."""
        compiled = self._compiled(x)
        if compiled is not None:
            self.last_backend = "numba"
            return compiled(x, None, None if token_mask is None else token_mask.reshape(-1).contiguous())
        self.last_backend = "torch"
        return unrouted(x, self.weights)

    def _compiled(self, x: Tensor) -> "CompiledLayer | None":
        if self._prepared is None or self._prepared[0] is not self.weights:
            self._prepared = (self.weights, self._prepare())
        compiled = self._prepared[1]
        if compiled is None or self.backend == "numba":
            return compiled
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.weights.ffn.w_up_FD.requires_grad)
        return None if needs_grad or x.dtype != compiled.dtype else compiled

    def _prepare(self) -> "CompiledLayer | None":
        if self.backend not in ("auto", "numba"):
            return None
        weights, ffn = self.weights, self.weights.ffn
        try:
            available("numba", ffn.w_up_FD.device, ffn.dtype, weights)
        except UnavailableError:
            if self.backend == "numba":
                raise
            return None
        from moefication_cli.runtime.cpu.numba_backend import CompiledLayer

        # The neurons that never run are no experts to walk over: one expert of no neurons stands for them, off
        head = replace(ffn.rows(0, weights.num_shared), b_down_D=ffn.b_down_D)
        return CompiledLayer(ExpertWeights(head, 1, weights.num_shared, weights.compensation))
