"""The weights of one FFN, dense or split into experts, and the activations the backends know.

Axes: T tokens, D model width, F FFN neurons, E experts, N neurons per expert, S shared (always-on) neurons,
F = S + E*N. Every projection is neuron-major, [F, D]: a row is one neuron, an expert is a contiguous block of rows.
A dense `down` weight of shape [D, F] whose storage is neuron-major (strides (1, D)) is the same memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def quantise_rows(w_FD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [F, D] contiguous, scale_F float32): symmetric per row, w ~ scale * int8 with int8 in [-127, 127] and scale = max |w| / 127.

    Rounds to nearest, ties to even; a row of zeros gets the scale 0. Raises ConfigError for a row with NaN or infinity.
    """
    most_F = w_FD.detach().abs().amax(dim=1).float()
    if not bool(most_F.isfinite().all()):
        row = int((~most_F.isfinite()).nonzero()[0])
        raise ConfigError(f"row {row} of a weight matrix holds NaN or infinity: it cannot be made int8")
    scale_F = most_F / 127
    steps_FD = w_FD.detach().float() / scale_F.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps_FD.round_().clamp_(-127, 127).to(torch.int8).contiguous(), scale_F


def flops_per_neuron(d_model: int, gated: bool) -> int:
    """Multiply-adds per token of one neuron: D per projection it takes part in."""
    return d_model * (3 if gated else 2)


@dataclass(frozen=True)
class FFNWeights:
    """One feed-forward layer: y = act(x W_up^T + b_up) W_down + b_down, or act(gate) * up when gated."""

    w_up_FD: Tensor
    w_down_FD: Tensor  # neuron-major: row n is what neuron n writes
    w_gate_FD: Tensor | None = None
    b_up_F: Tensor | None = None
    b_gate_F: Tensor | None = None
    b_down_D: Tensor | None = None
    activation: str = "relu"
    # of int8 matrices: what each neuron's row is to be multiplied by, float32; None for all others
    scale_up_F: Tensor | None = None
    scale_down_F: Tensor | None = None
    scale_gate_F: Tensor | None = None

    @property
    def quantised(self) -> bool:
        """Whether the matrices are int8 (see `quantise_rows`); what reads them then computes in float32."""
        return self.w_up_FD.dtype == torch.int8

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that these weights are multiplied with."""
        return torch.float32 if self.quantised else self.w_up_FD.dtype

    def dequantised(self) -> "FFNWeights":
        """The numbers that int8 matrices stand for, as float32 matrices; other weights as they are."""
        if not self.quantised:
            return self

        def wide(w_FD: Tensor | None, scale_F: Tensor | None) -> Any:
            return None if w_FD is None or scale_F is None else w_FD.float() * scale_F[:, None]

        return replace(
            self,
            w_up_FD=wide(self.w_up_FD, self.scale_up_F),
            w_down_FD=wide(self.w_down_FD, self.scale_down_F),
            w_gate_FD=wide(self.w_gate_FD, self.scale_gate_F),
            scale_up_F=None,
            scale_down_F=None,
            scale_gate_F=None,
        )

    @property
    def num_neurons(self) -> int:
        return self.w_up_FD.shape[0]

    @property
    def d_model(self) -> int:
        return self.w_up_FD.shape[1]

    @property
    def gated(self) -> bool:
        return self.w_gate_FD is not None

    @property
    def flops_per_neuron(self) -> int:
        """Multiply-adds per token of one neuron."""
        return flops_per_neuron(self.d_model, self.gated)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Activations h_TF of all neurons, in the dtype of the weights."""
        act, x_TD = ACTIVATIONS[self.activation], x_TD.to(self.w_up_FD.dtype)
        up_TF = functional.linear(x_TD, self.w_up_FD, self.b_up_F)
        if self.w_gate_FD is None:
            return act(up_TF)
        return act(functional.linear(x_TD, self.w_gate_FD, self.b_gate_F)) * up_TF

    def forward(self, x_TD: Tensor) -> Tensor:
        """The dense output y_TD, in the dtype of the input."""
        # T5 keeps its down-projection in float32 under float16
        y_TD = self.hidden(x_TD).to(self.w_down_FD.dtype) @ self.w_down_FD
        return (y_TD if self.b_down_D is None else y_TD + self.b_down_D).to(x_TD.dtype)

    def to(self, *args: Any, **kwargs: Any) -> "FFNWeights":
        """The same weights on another device or in another dtype."""
        tensors: dict[str, Any] = {
            name: t.to(*args, **kwargs) for name, t in vars(self).items() if isinstance(t, Tensor)
        }
        return replace(self, **tensors)

    def rows(self, begin: int, end: int) -> "FFNWeights":
        """The neurons [begin, end) as an FFN of views, without the output bias."""
        cut = slice(begin, end)
        return replace(
            self,
            w_up_FD=self.w_up_FD[cut],
            w_down_FD=self.w_down_FD[cut],
            w_gate_FD=None if self.w_gate_FD is None else self.w_gate_FD[cut],
            b_up_F=None if self.b_up_F is None else self.b_up_F[cut],
            b_gate_F=None if self.b_gate_F is None else self.b_gate_F[cut],
            b_down_D=None,
            scale_up_F=None if self.scale_up_F is None else self.scale_up_F[cut],
            scale_down_F=None if self.scale_down_F is None else self.scale_down_F[cut],
            scale_gate_F=None if self.scale_gate_F is None else self.scale_gate_F[cut],
        )

    def permute(self, order_F: Tensor) -> "FFNWeights":
        """The same function with its neurons in another order."""
        pick = lambda t: None if t is None else t[order_F]  # noqa: E731
        return replace(
            self,
            w_up_FD=self.w_up_FD[order_F],
            w_down_FD=self.w_down_FD[order_F],
            w_gate_FD=pick(self.w_gate_FD),
            b_up_F=pick(self.b_up_F),
            b_gate_F=pick(self.b_gate_F),
            scale_up_F=pick(self.scale_up_F),
            scale_down_F=pick(self.scale_down_F),
            scale_gate_F=pick(self.scale_gate_F),
        )


@dataclass(frozen=True)
class Compensation:
    """What stands in for dropped experts; acts only where at least one expert is off, so all-on stays exact.

    y += constant_D + (x @ w_in_RD^T) @ w_out_RD
    """

    constant_D: Tensor | None = None
    w_in_RD: Tensor | None = None  # optional low-rank correction from the FFN's input
    w_out_RD: Tensor | None = None

    def output(self, x: Tensor) -> Tensor:
        """What is added for inputs x [..., D]: [..., D], or [D] where it is the same for all; in the dtype of the tensors."""
        constant_D = self.constant_D if self.constant_D is not None else x.new_zeros(x.shape[-1])
        if self.w_in_RD is None or self.w_out_RD is None:
            return constant_D
        return constant_D + (x.to(self.w_in_RD.dtype) @ self.w_in_RD.T) @ self.w_out_RD

    def to(self, *args: Any, **kwargs: Any) -> "Compensation":
        """The same tensors on another device or in another dtype."""
        return replace(self, **{k: v.to(*args, **kwargs) for k, v in vars(self).items() if v is not None})

    def detach(self) -> "Compensation":
        """The same tensors, cut off from autograd."""
        return replace(self, **{k: v.detach() for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class ExpertWeights:
    """An FFN whose rows are permuted: S shared neurons first, then expert after expert of N neurons."""

    ffn: FFNWeights
    num_experts: int
    num_shared: int = 0
    compensation: Compensation | None = None

    @property
    def expert_size(self) -> int:
        return (self.ffn.num_neurons - self.num_shared) // self.num_experts
