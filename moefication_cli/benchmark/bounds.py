"""How fast could it be? Arithmetic of the bound that `bench` prints beside every row; no clocks in here.

One FFN takes at least the larger of its arithmetic and its bytes at the machine's rates (roofline):

    time  = max(2 * multiply-adds / P, bytes / W)
    dense   multiply-adds  T * F * p * D                              bytes  F * p * D * b
    MoE     multiply-adds  T * ((S + k * N) * p * D + overhead)       bytes  (S + u * N) * p * D * b + overhead * r
    ffn bound = time of dense / time of MoE; 1 where all experts are on

T tokens, F neurons, S shared, N per expert, p projections (2, gated 3), D model width, b and r bytes per weight of FFN
and router, k experts per token, u distinct experts that the T tokens touch together, overhead = weights of router and
compensation. A whole model adds everything that is no FFN, measured as `other` (Amdahl):

    bound = dense / (other + (dense - other) / ffn bound)

Skipping neurons whose ReLU is zero is not in it and may pass it, and so may rows of a few tokens, where stock matrix
products stay far below P and W. Activations, biases and the reading of inputs are left out on both sides.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What the machine was seen to do: P in floating-point operations and W in bytes, both per second."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, multiply_adds: float, num_bytes: float) -> float:
        """The larger of both times."""
        return max(2 * multiply_adds / self.flops_per_second, num_bytes / self.bytes_per_second)


@dataclass(frozen=True)
class FFNCost:
    """One FFN over one batch of tokens; names as in the module docstring."""

    tokens: int
    d_model: int
    num_neurons: int
    projections: int
    item_bytes: int
    num_shared: int = 0
    num_experts: int = 1
    experts_per_token: float = 1.0  # k
    experts_touched: float = 1.0  # u
    overhead: int = 0
    overhead_bytes: int = 0

    @property
    def active_share(self) -> float:
        """Neurons computed per token, shared ones included."""
        return (self.num_shared + self.experts_per_token * self._expert_size) / self.num_neurons

    @property
    def touched_share(self) -> float:
        """Neurons whose weights are read for the whole batch."""
        return (self.num_shared + self.experts_touched * self._expert_size) / self.num_neurons

    @property
    def _expert_size(self) -> float:
        return (self.num_neurons - self.num_shared) / self.num_experts

    def dense_seconds(self, rates: Rates) -> float:
        """Least time of the dense FFN."""
        weights = self.num_neurons * self.projections * self.d_model
        return rates.seconds(self.tokens * weights, weights * self.item_bytes)

    def moe_seconds(self, rates: Rates) -> float:
        """Least time of the experts and their router; the dense time where every token has all experts."""
        if self.experts_per_token >= self.num_experts:
            return self.dense_seconds(rates)
        weights = self.num_neurons * self.projections * self.d_model
        multiply_adds = self.tokens * (self.active_share * weights + self.overhead)
        return rates.seconds(multiply_adds, self.touched_share * weights * self.item_bytes + self.overhead_bytes)


def ffn_bound(costs: Iterable[FFNCost], rates: Rates) -> float:
    """How many times faster all these FFNs together could be; 1 without any."""
    dense, moe = 0.0, 0.0
    for cost in costs:
        dense += cost.dense_seconds(rates)
        moe += cost.moe_seconds(rates)
    return dense / moe if moe else 1.0


def whole_bound(dense_seconds: float, other_seconds: float, of_ffns: float) -> float:
    """Amdahl: `other_seconds` stay, the rest shrinks by `of_ffns`. Noise may put `other` above `dense`: then 1."""
    other = min(other_seconds, dense_seconds)
    return dense_seconds / (other + (dense_seconds - other) / of_ffns)
