"""Fit a planned conversion to the whole model: plans are made layer by layer on the dense model's activations, and the
inputs of a converted layer differ from those, because the layers before it are converted too.

Routers, thresholds and compensations are trained by gradient on KL(dense || converted), with a price on compute; the
result is kept only if it is better on sequences it was not trained on. The FFNs' own weights are frozen throughout.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.settle import SPEND, HeldOut, Settled, settle
from moefication_cli.runs.control import Control
from moefication_cli.tasks.examples import Batch

_TRIAL = 4  # the part of the steps after which training must have helped
_WORSE, _SMALLER = 1.25, 3.0  # times the KL before, from which on steps were too large; what they are divided by then
LEARNING_RATE = 0.03  # of each parameter's size, per step of _FULL_PREDICTIONS or more predictions
_FULL_PREDICTIONS = 2048  # fewer carry less signal: the rate shrinks in proportion (a classifier has one a sequence)


@dataclass(frozen=True)
class Outcome:
    """KL per prediction on held-out sequences before and after, at the same share of the dense FFNs' work."""

    kl_before: float
    kl_after: float
    kept: bool


def refine(
    conversion: Conversion, train: Sequence[Batch], heldout: HeldOut, began: Settled, steps: int, control: Control
) -> tuple[Outcome, list[float]]:
    """Train what the conversion added, at its budget; undone unless the KL on the held-out batches fell.

    `began` is what `settle` returned. Where training makes the model much worse its steps were too large: it begins again,
    once, with smaller ones. Returns how it came out, and each FFN's share of its dense work.
    """
    before, start = began.kl, conversion.state()
    if not any(layer.parameters for layer in conversion.layers.values()):  # as where every FFN is left dense
        return Outcome(before, before, False), began.shares
    rate = LEARNING_RATE * signal(conversion, train[0])
    ended = _train(conversion, train, heldout, before, steps, rate, control)
    if not ended.kl < _WORSE * before:  # NaN too
        control.say(
            f"refine: the steps were too large (KL {before:.3g} before, {ended.kl:.3g} after); begins again with steps of a third"
        )
        conversion.restore(start)
        ended = _train(conversion, train, heldout, before, steps, rate / _SMALLER, control)
    if ended.kl < before:
        return Outcome(before, ended.kl, True), ended.shares
    conversion.restore(start)
    return Outcome(before, ended.kl, False), began.shares


def _train(
    conversion: Conversion,
    train: Sequence[Batch],
    heldout: HeldOut,
    before: float,
    steps: int,
    rate: float,
    control: Control,
) -> Settled:
    """How the conversion stands after these steps, or after a quarter of them if it is no better than `before` there.

    The price of compute follows what is spent, so that training stays near the budget; thresholds are settled anew after
    the quarter and at the end.
    """
    target = conversion.budget.fraction * SPEND[1]
    price = max(before, 1e-6) / target
    groups = [
        {"params": [tensor], "lr": rate * layer.step_size(name)}
        for layer in conversion.layers.values()
        for name, tensor in layer.parameters.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    average, source = target, _cycle(train)
    for step in control.track(range(steps), "refine", steps):
        if step == steps // _TRIAL and step:
            tried = settle(conversion, heldout)
            if not tried.kl < before:  # the later steps are unlikely to help where the first quarter did not
                return tried
        kl = conversion.kl(next(source))
        spent = conversion.spent()
        optimizer.zero_grad(set_to_none=True)
        (kl + price * spent).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        average += 0.1 * (float(spent.detach()) - average)
        price *= math.exp(max(-0.1, min(0.1, average / target - 1)))
    return settle(conversion, heldout)


@torch.no_grad()
def signal(conversion: Conversion, batch: Batch) -> float:
    """What a step on such a batch may be of the full size: fewer predictions carry less signal."""
    return min(1.0, len(conversion.logits(batch, dense=True)) / _FULL_PREDICTIONS)


def _warm_cosine(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _cycle(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
