"""One FFN as a mixture of experts, ready to stand in for the dense one: routing, backend choice, padding, statistics.

`MoEFFN` is a callable object and not an nn.Module: it holds views on parameters that belong to the model, so attaching it adds
no names to the state dict and no bytes to memory. It reads no files and prints nothing. Axes as in `ffn`.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import Router
from moefication_cli.routing.rules import Rule, TopK
from moefication_cli.runtime.backends import (
    ALL_ON_TOKENS,
    BACKENDS,
    CUDA_FEW_TOKENS,
    available,
    choose,
    say_dense_on_cuda,
)

if TYPE_CHECKING:
    from moefication_cli.runtime.cpu.numba_backend import CompiledLayer
    from moefication_cli.runtime.cuda.triton_layer import TritonLayer

Selection = Callable[[Tensor, ExpertWeights], Tensor]
_SETTINGS = frozenset({"weights", "router", "rule", "select", "backend", "may_go_dense", "masked_from", "share"})


class MoEFFN:
    """y = FFN(x) computed by the experts each token selects.

    `select`, when set, replaces router and rule: `(x_TD, ExpertWeights) -> ids_TK | mask_TE` (oracle, random, ...).
    `backend` is a name of `backends.BACKENDS` or `auto`; under `auto` a call may go dense where sparse would lose, unless
    `may_go_dense` is False (quality is to be measured: dense computes more than was selected). On the CPU calls of
    `masked_from` tokens and more compute every neuron and zero those that were not selected (backend `reference`), the
    same mixture: where that was measured to be faster (`kernel_times`). `share`, for rules that give tokens different numbers of
    experts: the mean share of the FFN's work that one costs, 0 where it is not known. `last_backend` names the path of the latest call.
    Assigning `router`, `rule`, `select` or `backend` takes effect with the next call; after the parameters' storage was
    replaced (`model.to(...)`) assign `weights` anew.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        router: Router | None = None,
        rule: Rule | None = None,
        backend: str = "auto",
        select: Selection | None = None,
        may_go_dense: bool = True,
        masked_from: int = sys.maxsize,
        share: float = 0.0,
    ) -> None:
        if select is None and (router is None or rule is None):
            raise ConfigError("a MoE layer needs a router and a rule, or a selection of its own")
        if router is not None and router.num_experts != weights.num_experts:
            raise ConfigError(f"the router scores {router.num_experts} experts, the layer has {weights.num_experts}")
        if rule is not None:
            rule.check(weights.num_experts)
        if backend != "auto":
            available(backend, weights.ffn.w_up_FD.device, weights.ffn.dtype, weights)
        self.weights = weights
        self.router = router
        self.rule = rule
        self.select = select
        self.backend = backend
        self.may_go_dense = may_go_dense
        self.masked_from = masked_from
        self.share = share
        self.last_backend = ""
        self.counts_E: Tensor | None = None
        self.num_counted = 0

    def __setattr__(self, name: str, value: object) -> None:
        """A new setting makes what was prepared for the old ones stale."""
        object.__setattr__(self, name, value)
        if name in _SETTINGS:
            self._prepared: CompiledLayer | None = None
            self._layout: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None  # of a backend that prepares
            self._launched: TritonLayer | None = None
            self._fast: CompiledLayer | TritonLayer | None = None  # set where calls without gradients need no choice
            self._fast_below = sys.maxsize  # ... of inputs with fewer elements than this

    def count_selections(self, on: bool = True) -> None:
        """Starts (from zero) or stops counting, per expert, how many tokens selected it: `counts_E`, of `num_counted` tokens."""
        device = self.weights.ffn.w_up_FD.device  # copying to the CPU would wait for the GPU in every layer
        self.counts_E = torch.zeros(self.weights.num_experts, dtype=torch.int64, device=device) if on else None
        self.num_counted = 0

    @property
    def active_fraction(self) -> float:
        """Measured share of neurons computed per token since `count_selections`, shared ones included; NaN before any token."""
        if self.counts_E is None or self.num_counted == 0:
            return float("nan")
        F, S, N = self.weights.ffn.num_neurons, self.weights.num_shared, self.weights.expert_size
        return (S + N * float(self.counts_E.sum()) / self.num_counted) / F

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]. `token_mask` [...] (bool) is False at padding: such tokens are not routed, their y is 0.

        (Dense calls compute padding like any token.) Raises ConfigError for shapes that do not fit and for selections out of
        range, UnavailableError where a backend named by the user cannot run.
        """
        # Small layers take microseconds: once the choice is made, nothing stands between here and the compiled call.
        fast = self._fast
        if fast is not None and (torch.is_grad_enabled() or x.dtype != fast.dtype or x.numel() >= self._fast_below):
            fast = None
        if fast is not None and token_mask is None and self.counts_E is None and x.shape[-1] == fast.width:
            return fast(x)
        D = self.weights.ffn.d_model
        if x.shape[-1] != D:
            raise ConfigError(f"FFN input of width {x.shape[-1]}, the layer has d_model {D}")
        real_T = None
        if token_mask is not None:
            real_T = token_mask.reshape(-1).contiguous()
            if token_mask.shape != x.shape[:-1] or real_T.dtype != torch.bool:
                raise ConfigError(
                    f"padding mask {tuple(token_mask.shape)} {token_mask.dtype} for input {tuple(x.shape)}",
                    "pass bools",
                )
        if fast is not None and fast is self._prepared:
            return self._run_compiled(fast, x, real_T)
        return self._tokens(x.reshape(-1, D), real_T).view(x.shape)

    def _tokens(self, x_TD: Tensor, real_T: Tensor | None) -> Tensor:
        name = self._auto(x_TD) if self.backend == "auto" else self.backend
        self.last_backend = name
        if name in ("dense", "reference"):
            self._fast = None  # so that the next call of few tokens says its path again
        if name == "dense":
            if self.counts_E is not None:
                self._count(None, x_TD if real_T is None else x_TD[real_T])
            return BACKENDS[name].compute(x_TD, x_TD, self.weights)
        if name == "triton" and self.counts_E is None and not self._all_on and self._fused_by(name):
            launched = self._launch()
            if self.backend == "triton" or len(x_TD) <= CUDA_FEW_TOKENS:
                self._fast = launched
                self._fast_below = sys.maxsize if self.backend == "triton" else (CUDA_FEW_TOKENS + 1) * launched.width
            # Leaving padding out would wait for the GPU in every layer; computing it costs less
            y_TD = launched(x_TD)
            return y_TD if real_T is None else y_TD.masked_fill(~real_T.unsqueeze(1), 0)
        if name == "numba" and (self._all_on or self._fused_by(name)):
            compiled = self._compile()
            y_TD = self._run_compiled(compiled, x_TD, real_T)
            self._fast = compiled
            if self.backend == "auto":
                most = ALL_ON_TOKENS if self._all_on else self.masked_from
                self._fast_below = min(sys.maxsize, most * compiled.width)
            return y_TD
        if real_T is not None and x_TD.is_cuda and len(x_TD) <= CUDA_FEW_TOKENS and self.counts_E is None:
            # Leaving padding out would wait for the GPU in every layer; computing it costs less
            return self._selected(name, x_TD).masked_fill(~real_T.unsqueeze(1), 0)
        if real_T is not None and not bool(real_T.all()):
            y_TD = torch.zeros_like(x_TD)
            y_TD[real_T] = self._selected(name, x_TD[real_T])
            return y_TD
        return self._selected(name, x_TD)

    def _fused_by(self, name: str) -> bool:
        """Whether that backend's kernels compute the scores and select; else torch does, and they are given the selection."""
        if self.select is not None or self.router is None or self.rule is None:
            return False
        return name in self.router.fused_by & self.rule.fused_by

    @property
    def _top_k(self) -> int | None:
        """Experts of every token, where the rule fixes their number."""
        return self.rule.top_k if self.select is None and isinstance(self.rule, TopK) else None

    @property
    def _all_on(self) -> bool:
        return self._top_k == self.weights.num_experts

    def _compile(self) -> "CompiledLayer":
        if self._prepared is None:
            from moefication_cli.runtime.cpu.numba_backend import CompiledLayer

            if self._all_on:  # no selection to make, no experts to keep apart: every neuron is a shared one
                ffn = self.weights.ffn
                self._prepared = CompiledLayer(ExpertWeights(ffn, 1, num_shared=ffn.num_neurons))
            elif self._fused_by("numba"):
                self._prepared = CompiledLayer(self.weights, self.router, self.rule)
            else:
                self._prepared = CompiledLayer(self.weights)
        return self._prepared

    def _launch(self) -> "TritonLayer":
        if self._launched is None:
            from moefication_cli.runtime.cuda.triton_layer import TritonLayer

            self._launched = TritonLayer(self.weights, self.router, self.rule)
        return self._launched

    def _run_compiled(self, compiled: "CompiledLayer", x: Tensor, real_T: Tensor | None) -> Tensor:
        if self.counts_E is None:
            return compiled(x, None, real_T)
        num_tokens = x.numel() // compiled.width if real_T is None else int(real_T.sum())
        self.num_counted += num_tokens
        if not self._all_on:
            return compiled(x, None, real_T, self.counts_E)
        self.counts_E += num_tokens
        return compiled(x, None, real_T)

    def _selected(self, name: str, x_TD: Tensor) -> Tensor:
        if self.select is not None:
            selected = self.select(x_TD, self.weights)
        else:
            assert self.router is not None and self.rule is not None
            selected = self.rule.select(self.router.scores(x_TD))
        self._count(selected, x_TD)
        if name == "numba":
            return self._compile()(x_TD, selected)
        backend = BACKENDS[name]
        if backend.prepare is None:
            return backend.compute(x_TD, selected, self.weights)
        if self._layout is None or self._layout[0] != name:
            self._layout = name, backend.prepare(self.weights)
        return self._layout[1](x_TD, selected)

    def _auto(self, x_TD: Tensor) -> str:
        weights, top_k = self.weights, self._top_k
        share = self.share if x_TD.is_cuda else 0.0  # the CPU's kernels gain whatever is selected
        if top_k is not None:
            share = (weights.num_shared + weights.expert_size * top_k) / weights.ffn.num_neurons
        needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weights.ffn.w_up_FD.requires_grad)
        name = choose(x_TD.device, x_TD.dtype, x_TD.shape[0], weights, share, needs_grad)
        if name == "dense" and not (self.may_go_dense or self._all_on):
            grouped = x_TD.is_cuda and BACKENDS["grouped"].missing(x_TD.device, x_TD.dtype, weights) is None
            return "grouped" if grouped else "torch"
        if name == "dense" and x_TD.is_cuda and not self._all_on:
            say_dense_on_cuda()
        if name != "dense" and len(x_TD) >= self.masked_from and not needs_grad and not x_TD.is_cuda:
            return "reference"
        return name

    def _count(self, selected: Tensor | None, x_TD: Tensor) -> None:
        if self.counts_E is None:
            return
        self.num_counted += x_TD.shape[0]
        if selected is None:
            self.counts_E += x_TD.shape[0]
        elif selected.dtype == torch.bool:
            self.counts_E += selected.sum(dim=0)
        else:
            ids = selected.reshape(-1).long()
            self.counts_E.scatter_add_(0, ids, torch.ones_like(ids))
