"""How many experts a compute budget buys, and what a converted layer really costs. Pure arithmetic.

Compute is counted in multiply-adds per token; a fraction is relative to the dense FFN. Everything the conversion adds
counts: router, compensation. Element-wise work (activations, biases, the sum over experts) is left out on both sides.
Axes as in `ffn`: D, F = S + E*N.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import Compensation
from moefication_cli.routing.router import Router


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds per token of one converted FFN and of its dense original."""

    d_model: int
    num_neurons: int
    num_shared: int
    num_experts: int
    flops_per_neuron: int
    overhead: int  # router and compensation, paid for every token

    @property
    def expert_size(self) -> int:
        return (self.num_neurons - self.num_shared) // self.num_experts

    @property
    def dense_flops(self) -> int:
        return self.num_neurons * self.flops_per_neuron

    def flops(self, experts_per_token: float) -> float:
        """Multiply-adds per token when that many experts run; the dense path when all of them do."""
        if experts_per_token >= self.num_experts:
            return float(self.dense_flops)
        neurons = self.num_shared + experts_per_token * self.expert_size
        return neurons * self.flops_per_neuron + self.overhead

    def experts_within(self, fraction: float, fraction_of: Literal["flops", "neurons"]) -> float:
        """How many experts per token `fraction` of the dense FFN pays for, unrounded; negative when not even the rest fits.

        `neurons` is the paper's reading: the share of the experts, nothing else counted.
        """
        if fraction >= 1:
            return float(self.num_experts)
        if fraction_of == "neurons":
            return fraction * self.num_experts
        left = fraction * self.dense_flops - self.overhead - self.num_shared * self.flops_per_neuron
        return left / (self.expert_size * self.flops_per_neuron)


def overhead_flops(router: Router | None, compensation: Compensation | None) -> int:
    """Multiply-adds per token that a layer pays whichever experts run."""
    correction = 0 if compensation is None or compensation.w_in_RD is None else 2 * compensation.w_in_RD.numel()
    return correction + (0 if router is None else router.flops)


def top_k_within(cost: LayerCost, fraction: float, fraction_of: Literal["flops", "neurons"], where: str) -> int:
    """The fixed k of a budget: max(1, round(F * E)) for neurons, as many as fit for flops.

    Raises ConfigError when the budget does not even pay for the router and one expert.
    """
    experts = cost.experts_within(fraction, fraction_of)
    if fraction_of == "neurons":
        return max(1, min(cost.num_experts, round(experts)))
    top_k = min(cost.num_experts, math.floor(experts + 1e-9))
    if top_k < 1:
        least = (cost.flops(1)) / cost.dense_flops
        raise ConfigError(
            f"{where}: --fraction {fraction:g} of the dense FFN does not pay for its router and one expert (at least {least:.3f})",
            "raise --fraction, train a narrower router (train-router --width), or count with --fraction-of neurons",
        )
    return top_k
