"""A converted layer without a router: its shared neurons run for every token, the rest never does.

What a budget chooses where routing would cost more than it saves. The dropped neurons are stood in for by the
compensation; this is static pruning with a better bias. Axes as in `ffn`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.runtime.backends import available
from moefication_cli.runtime.torch_backends import rows

if TYPE_CHECKING:
    from moefication_cli.runtime.cpu.numba_backend import CompiledLayer


class PrunedFFN:
    """y = FFN of the first `num_shared` neurons (+ compensation).

    `backend` is a name of `backends.BACKENDS`: `numba` is the compiled kernel, `auto` takes it where it can run, and all others mean
    plain torch. `last_backend` names the path of the latest call. After the parameters' storage was replaced assign
    `weights` anew.
    """

    def __init__(self, weights: ExpertWeights, backend: str = "auto") -> None:
        if backend != "auto":
            available(backend, weights.ffn.w_up_FD.device, weights.ffn.w_up_FD.dtype, weights)
        self.weights, self.backend, self.last_backend = weights, backend, ""
        self._prepared: tuple[ExpertWeights, CompiledLayer | None] | None = None

    @property
    def active_fraction(self) -> float:
        """Share of the neurons that run."""
        return self.weights.num_shared / self.weights.ffn.num_neurons

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]. Padding (`token_mask` [...] False) gets 0 of the kernel, in torch what any token gets."""
        compiled = self._compiled(x)
        if compiled is not None:
            self.last_backend = "numba"
            return compiled(x, None, None if token_mask is None else token_mask.reshape(-1).contiguous())
        self.last_backend = "torch"
        ffn, extra, kept = self.weights.ffn, self.weights.compensation, self.weights.num_shared
        head = rows(ffn, 0, kept)
        y = head.hidden(x) @ head.w_down_FD
        for bias_D in (ffn.b_down_D, None if extra is None else extra.constant_D):
            y = y if bias_D is None else y + bias_D
        if extra is not None and extra.w_in_RD is not None and extra.w_out_RD is not None:
            y = y + (x @ extra.w_in_RD.T) @ extra.w_out_RD
        return y

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
            available("numba", ffn.w_up_FD.device, ffn.w_up_FD.dtype, weights)
        except UnavailableError:
            if self.backend == "numba":
                raise
            return None
        from moefication_cli.runtime.cpu.numba_backend import CompiledLayer

        # The neurons that never run are no experts to walk over: one expert of no neurons stands for them, off
        head = replace(rows(ffn, 0, weights.num_shared), b_down_D=ffn.b_down_D)
        extra = None if weights.compensation is None else replace(weights.compensation, taken_back_ED=None)
        return CompiledLayer(ExpertWeights(head, 1, weights.num_shared, extra))
