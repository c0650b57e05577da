"""A router: x_TD -> scores_TE, higher means more needed. `Router` is what the package asks of one.

`TwoLayerRouter` is the form that every shipped kind has (`routers/` makes them):

    scores = act(x' W_in^T + b_in) W_out^T + b_out, with x' = x / ||x|| if `normalise`, and W_out absent for one layer

    similarity   normalise, W_in = 2 * centroids, b_in = -||c||^2 (same order as -||x' - c||), no W_out
    linear       W_in [E, D]
    mlp          normalise, tanh, W_in [E, D], W_out [E, E]       MoEfication, section 3.2
    regression   relu, W_in [R, D], W_out [E, R]                  D2DMoE, arXiv 2310.04361
    quadratic    square, W_in [R, D], W_out [E, R]                low-rank quadratic form, for gated FFNs

Axes: T tokens, D model width, R router width, E experts. Pure tensors: nothing here reads files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.errors import ConfigError

ROUTER_ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "relu": functional.relu, "square": torch.square}


class Router(Protocol):
    """One layer's router. `tensors` and `settings` together are what is stored; `read` makes the router of them again."""

    form: ClassVar[str]  # names the class in stored settings
    fused_by: ClassVar[frozenset[str]]  # backends whose kernels compute the scores; for the others torch does

    @property
    def num_experts(self) -> int: ...

    @property
    def d_model(self) -> int:
        """Width of the inputs."""
        ...

    @property
    def width(self) -> int:
        """Numbers computed per token on the way to the scores, as reported."""
        ...

    @property
    def flops(self) -> int:
        """Multiply-adds per token."""
        ...

    def scores(self, x_TD: Tensor) -> Tensor:
        """scores_TE in the dtype of the router's tensors."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name, as they are stored. Names end in their axes."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything else that `read` needs, as JSON values."""
        ...

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_experts: int) -> Self:
        """The router of stored tensors and settings. Raises ConfigError for what does not fit together."""
        ...

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same router with other values in some tensors."""
        ...

    def bias_scales(self, x_TD: Tensor) -> dict[str, float]:
        """Spread of what each bias is added to, by name, on these inputs: the unit in which training should move it."""
        ...

    def detach(self) -> Self:
        """The same router, cut off from autograd."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same router on another device or in another dtype."""
        ...


@dataclass(frozen=True)
class TwoLayerRouter:
    """The tensors of one layer's router; see the module docstring for the formula."""

    w_in_RD: Tensor
    b_in_R: Tensor | None = None
    w_out_ER: Tensor | None = None
    b_out_E: Tensor | None = None
    activation: str = "identity"
    normalise: bool = False
    form: ClassVar[str] = "two_layer"
    fused_by: ClassVar[frozenset[str]] = frozenset({"numba", "triton"})

    @property
    def num_experts(self) -> int:
        return (self.w_in_RD if self.w_out_ER is None else self.w_out_ER).shape[0]

    @property
    def d_model(self) -> int:
        return self.w_in_RD.shape[1]

    @property
    def width(self) -> int:
        return self.w_in_RD.shape[0]

    @property
    def flops(self) -> int:
        return self.w_in_RD.numel() + (0 if self.w_out_ER is None else self.w_out_ER.numel())

    def scores(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(self.w_in_RD.dtype)
        return self.scores_of(functional.normalize(x_TD, dim=-1) if self.normalise else x_TD)

    def scores_of(self, x_TD: Tensor) -> Tensor:
        """scores_TE of inputs that are normalised already, where this router normalises."""
        z_TR = ROUTER_ACTIVATIONS[self.activation](functional.linear(x_TD, self.w_in_RD, self.b_in_R))
        return z_TR if self.w_out_ER is None else functional.linear(z_TR, self.w_out_ER, self.b_out_E)

    def tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def settings(self) -> dict[str, Any]:
        return {"activation": self.activation, "normalise": self.normalise}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_experts: int) -> "TwoLayerRouter":
        """Raises ConfigError for an unknown activation, unknown or missing tensors and shapes that do not fit."""
        activation, normalise = settings.get("activation"), settings.get("normalise")
        if activation not in ROUTER_ACTIVATIONS or not isinstance(normalise, bool):
            raise ConfigError("router lacks a known activation or normalise")
        known = {f.name for f in fields(cls)} - {"activation", "normalise"}
        if odd := sorted(tensors.keys() - known):
            raise ConfigError(f"a router has no tensor {odd[0]}")
        w_in_RD, w_out_ER = tensors.get("w_in_RD"), tensors.get("w_out_ER")
        if w_in_RD is None:
            raise ConfigError("no router tensors")
        sizes = {"R": w_in_RD.shape[0], "D": w_in_RD.shape[-1], "E": num_experts}
        for name, tensor in tensors.items():
            expected = tuple(sizes[axis] for axis in name.rpartition("_")[2])
            if tuple(tensor.shape) != expected or not tensor.numel():
                raise ConfigError(f"tensor {name} of shape {tuple(tensor.shape)} is not of shape {expected}")
        if w_out_ER is None and sizes["R"] != num_experts:
            raise ConfigError(f"the router scores {sizes['R']} experts, not {num_experts}")
        return cls(**dict(tensors), activation=str(activation), normalise=normalise)  # type: ignore[arg-type]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "TwoLayerRouter":
        return replace(self, **dict(tensors))  # type: ignore[arg-type]

    def bias_scales(self, x_TD: Tensor) -> dict[str, float]:
        hidden_TR = x_TD.to(self.w_in_RD.dtype) @ self.w_in_RD.T
        return {"b_in_R": float(hidden_TR.std()), "b_out_E": float(self.scores(x_TD).std()) or 1.0}

    def detach(self) -> "TwoLayerRouter":
        return self.with_tensors({name: tensor.detach() for name, tensor in self.tensors().items()})

    def to(self, *args: Any, **kwargs: Any) -> "TwoLayerRouter":
        return self.with_tensors({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()})
