"""Budgets in time: what a converted layer takes on this machine, as a share of its dense FFN, from `runtime.kernel_times`.

The experts' time is measured for the size of experts the layer has, with a router of d_model / 8. Routers of other widths and
corrections differ from that by their multiply-adds, at the dense FFN's rate; so do neurons that run for every token, which need
no router. The measured line is a model: what a conversion takes is for `eval` and `bench` to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefication_cli.config import ApplyConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.experts import ffn_kinds
from moefication_cli.routing.calibrate import Curve
from moefication_cli.routing.router import Router
from moefication_cli.runs.control import Control
from moefication_cli.runtime.kernel_times import FFNTimes, KernelTimes

if TYPE_CHECKING:
    from moefication_cli.conversion.plan import Budget, RoutedLayer


@dataclass(frozen=True)
class LayerTimes:
    """The times of one layer's FFN, and the multiply-adds per token of the dense one."""

    times: FFNTimes
    dense_flops: int

    def share(self, router: Router | None, active: float, correction: float) -> float:
        """Time over the dense FFN's, of this share of the neurons. `correction`: its multiply-adds over the dense FFN's."""
        if router is None or active >= 1:
            return active + correction
        wider = (router.flops - self.times.router_flops) / self.dense_flops
        return max(0.0, self.times.experts(active) / self.times.dense + wider) + correction

    def of_curve(self, curve: Curve, routers: Sequence[Router], d_model: int) -> Tensor:
        """cost_C: the share of every candidate of a calibration curve."""
        found = []
        for number, rank, active in zip(
            curve.router_C.tolist(), curve.rank_C.tolist(), curve.active_C.tolist(), strict=True
        ):
            router = None if number < 0 else routers[number]
            found.append(self.share(router, active, 2 * rank * d_model / self.dense_flops))
        return torch.tensor(found, dtype=torch.float64)


def timed(
    budget: "Budget", config: ApplyConfig, layers: Sequence["RoutedLayer"], device: torch.device, control: Control
) -> "Budget":
    """The budget with the times of these layers on this machine, where `--objective time` asks for them; else as it is.

    Measures what is not known yet: seconds. Raises ConfigError on other devices than the CPU.
    """
    if config.objective != "time":
        return budget
    if device.type != "cpu":
        raise ConfigError("--objective time knows the kernels of the CPU alone", "add --device cpu")
    known = KernelTimes(control.say)
    kinds = ffn_kinds([layer.site for layer in layers], torch.float32)
    found = tuple(
        LayerTimes(known.of(kind, layer.partition.expert_size, config.objective_tokens), layer.cost().dense_flops)
        for kind, layer in zip(kinds, layers, strict=True)
    )
    return replace(budget, times=found)
