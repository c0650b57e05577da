"""Share one compute budget between layers: how much each FFN may spend, from the layers' calibration curves.

Minimises the sum of errors under a bound on the sum of costs. Only candidates on a layer's lower convex hull can be
part of an optimum of the relaxed problem; walking all hulls in order of error saved per cost spent solves it exactly up
to the last step (Everett 1963; Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError


def lower_hull(cost_C: Tensor, error_C: Tensor) -> list[int]:
    """Indices of the candidates on the lower convex hull, cheapest first, errors strictly falling."""
    order = sorted(range(len(cost_C)), key=lambda i: (float(cost_C[i]), float(error_C[i])))
    hull: list[int] = []
    for i in order:
        if hull and float(error_C[i]) >= float(error_C[hull[-1]]):
            continue
        while len(hull) >= 2 and _slope(cost_C, error_C, hull[-2], hull[-1]) <= _slope(cost_C, error_C, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(cost_C: Tensor, error_C: Tensor, a: int, b: int) -> float:
    """Error saved per cost on the way from candidate a to candidate b."""
    return float(error_C[a] - error_C[b]) / max(float(cost_C[b] - cost_C[a]), 1e-12)


def allocate(costs: Sequence[Tensor], errors: Sequence[Tensor], shares: Sequence[float], budget: float) -> list[int]:
    """One candidate index per layer: least total error with sum(share * cost) <= budget.

    `shares` are the layers' parts of the dense compute, summing to 1. Raises ConfigError when even the cheapest
    candidates cost more than the budget.
    """
    hulls = [lower_hull(cost_C, error_C) for cost_C, error_C in zip(costs, errors, strict=True)]
    place = [0] * len(hulls)
    spent = sum(share * float(cost[hull[0]]) for share, cost, hull in zip(shares, costs, hulls, strict=True))
    if spent > budget + 1e-9:
        raise ConfigError(
            f"a budget of {budget:g} of the dense FFNs cannot be met: the least these layers need is {spent:.3f}",
            "raise --fraction, or use smaller experts or a narrower router",
        )
    steps = []
    for layer, hull in enumerate(hulls):
        for number, (a, b) in enumerate(pairwise(hull)):
            gain = _slope(costs[layer], errors[layer], a, b) / shares[layer]
            steps.append((-gain, layer, number + 1, shares[layer] * float(costs[layer][b] - costs[layer][a])))
    closed: set[int] = set()
    for _, layer, number, price in sorted(steps):
        if layer in closed:
            continue
        if spent + price > budget + 1e-9:
            closed.add(layer)  # later steps of this layer build on this one; others may still fit
            continue
        spent, place[layer] = spent + price, number
    return [hull[number] for hull, number in zip(hulls, place, strict=True)]


def best_within(cost_C: Tensor, error_C: Tensor, budget: float) -> int:
    """The candidate of least error within the budget: the same fraction for every layer. Raises ConfigError."""
    affordable = torch.nonzero(cost_C <= budget + 1e-9).squeeze(1)
    if len(affordable) == 0:
        raise ConfigError(
            f"a budget of {budget:g} cannot be met: the least this layer needs is {float(cost_C.min()):.3f}"
        )
    return int(affordable[error_C[affordable].argmin()])
