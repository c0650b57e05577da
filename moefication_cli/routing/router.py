"""A router: x_TD -> scores_TE, higher means more needed. One form covers every kind.

scores = act(x' W_in^T + b_in) W_out^T + b_out, with x' = x / ||x|| if `normalise`, and W_out absent for one-layer routers:

    similarity   normalise, W_in = 2 * centroids, b_in = -||c||^2 (same order as -||x' - c||), no W_out
    linear       W_in [E, D]                                                   closed-form ridge, then trained
    mlp          normalise, tanh, W_in [E, D] = centroids, W_out [E, E] = I    MoEfication, section 3.2
    regression   relu, W_in [R, D], W_out [E, R]                               D2DMoE, arXiv 2310.04361
    quadratic    square, W_in [R, D], W_out [E, R]                             low-rank quadratic form, for gated FFNs

Axes: T tokens, D model width, R router width, E experts. Pure tensors: nothing here reads files.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

ROUTER_ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "relu": functional.relu, "square": torch.square}


@dataclass(frozen=True)
class Router:
    """The tensors of one layer's router; see the module docstring for the formula."""

    w_in_RD: Tensor
    b_in_R: Tensor | None = None
    w_out_ER: Tensor | None = None
    b_out_E: Tensor | None = None
    activation: str = "identity"
    normalise: bool = False

    @property
    def num_experts(self) -> int:
        return (self.w_in_RD if self.w_out_ER is None else self.w_out_ER).shape[0]

    @property
    def flops(self) -> int:
        """Multiply-adds per token."""
        return self.w_in_RD.numel() + (0 if self.w_out_ER is None else self.w_out_ER.numel())

    def scores(self, x_TD: Tensor) -> Tensor:
        """scores_TE in the dtype of the router's tensors."""
        x_TD = x_TD.to(self.w_in_RD.dtype)
        if self.normalise:
            x_TD = functional.normalize(x_TD, dim=-1)
        z_TR = ROUTER_ACTIVATIONS[self.activation](functional.linear(x_TD, self.w_in_RD, self.b_in_R))
        return z_TR if self.w_out_ER is None else functional.linear(z_TR, self.w_out_ER, self.b_out_E)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name, as they are stored."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def detach(self) -> "Router":
        """The same router, cut off from autograd."""
        return replace(self, **{k: v.detach() for k, v in self.tensors().items()})  # type: ignore[arg-type]

    def to(self, *args: object, **kwargs: object) -> "Router":
        """The same router on another device or in another dtype."""
        return replace(self, **{k: v.to(*args, **kwargs) for k, v in self.tensors().items()})  # type: ignore[call-overload]


@dataclass(frozen=True)
class Rule:
    """How many experts a token gets; exactly one of these is set.

    top_k        the best k
    threshold    every expert whose score reaches it: tokens that matter get more (an absolute threshold)
    max_ratio    every expert whose score reaches this share of the token's best one (D2DMoE, arXiv 2310.04361, section 3.3)
    cumulative   the fewest experts that hold this share of the token's total score

    The last two take scores below zero as zero.
    """

    top_k: int | None = None
    threshold: float | None = None
    max_ratio: float | None = None
    cumulative: float | None = None

    @property
    def relative(self) -> bool:
        """Whether a token's scores are compared with each other, not with a constant or by rank."""
        return self.max_ratio is not None or self.cumulative is not None

    def setting(self) -> dict[str, int | float]:
        """The one value that is set, under its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def select(self, scores_TE: Tensor) -> Tensor:
        """ids_TK (int64) for a fixed k, mask_TE (bool) for the others: what every backend accepts."""
        if self.threshold is not None:
            return scores_TE >= self.threshold
        if self.max_ratio is not None:
            scores_TE = scores_TE.clamp_min(0)
            return scores_TE >= self.max_ratio * scores_TE.amax(-1, keepdim=True)
        if self.cumulative is not None:
            sorted_TE, order_TE = scores_TE.clamp_min(0).sort(dim=-1, descending=True)
            before_TE = sorted_TE.cumsum(-1) - sorted_TE
            taken_TE = before_TE < self.cumulative * sorted_TE.sum(-1, keepdim=True)
            return torch.zeros_like(taken_TE).scatter_(-1, order_TE, taken_TE)
        assert self.top_k is not None
        return scores_TE.topk(self.top_k, dim=-1, sorted=False).indices
