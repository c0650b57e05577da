"""Move the thresholds of a converted model until it spends its budget on sequences that judge it, and see how far it then is
from the dense one.

Axes: B batches, L FFNs, P predictions, C classes or vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefication_cli.conversion.learnable import Conversion, distance
from moefication_cli.tasks.examples import Batch

# Shares of the budget that calibration data may spend. Other data of a task was seen to spend up to 4.6 % more than it
# (0.103 for 0.0985 on the test set of a six-class task): within 1 % of the budget from here.
SPEND = (0.955, 0.965)
_PASSES = 8  # over the held-out sequences to find the thresholds; two or three are usual
_KEPT_BYTES = 256 << 20  # of what the dense model answers to held-out sequences, which is asked for again and again


@dataclass(frozen=True)
class Settled:
    """Each FFN's share of its dense work on held-out sequences, and the KL to the dense model there, batches weighted alike."""

    shares: list[float]
    kl: float


class HeldOut:
    """Sequences to judge by, and what the dense model answers to them, as far as that is small (_KEPT_BYTES)."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.answers: list[Tensor] = []  # to the first of them
        self._room = _KEPT_BYTES

    @torch.no_grad()
    def ask(self, conversion: Conversion) -> None:
        """Has the dense model of this conversion answer to the batches that it has not yet, until there is no more room."""
        while self._room > 0 and len(self.answers) < len(self.batches):
            dense_PC = conversion.logits(self.batches[len(self.answers)], dense=True)
            self._room -= dense_PC.numel() * dense_PC.element_size()
            if self._room > 0:
                self.answers.append(dense_PC)


@dataclass(frozen=True)
class _Spending:
    """Multiply-adds per batch and FFN, up to a factor: done, of the dense work, and what one unit of shift takes off."""

    done_BL: Tensor
    slope_BL: Tensor
    dense_BL: Tensor
    long_B: Tensor  # bool

    def shares(self) -> list[float]:
        found_L = self.done_BL.sum(0) / self.dense_BL.sum(0).clamp_min(1e-30)
        return [float(share) for share in found_L]

    def most(self, group: list[int]) -> float:
        """The share that these FFNs compute, of all sequences or of the long ones, whichever is more."""
        done_B, dense_B = self.done_BL[:, group].sum(1), self.dense_BL[:, group].sum(1)
        return max(float(done_B[part].sum() / dense_B[part].sum()) for part in (slice(None), self.long_B))

    def slope(self, group: list[int]) -> float:
        return float(self.slope_BL[:, group].sum() / self.dense_BL[:, group].sum())


def settle(conversion: Conversion, heldout: HeldOut) -> Settled:
    """Shift the thresholds until the budget is spent on these sequences. A fixed k stays.

    All layers move by the same number of standard deviations of their scores, or each for itself under a uniform
    budget. Newton's method, the slope being the density of scores at the threshold: at most 8 steps of at most 0.5
    standard deviations. Thresholds are accepted when the spend is within SPEND of the budget, from the fifth step on
    when it is at most SPEND[1]. The spend is that of all batches or of the quarter with the longest sequences, whichever
    is more: calibration data is often shorter (phrases) than what is evaluated (sentences).
    """
    heldout.ask(conversion)
    spending, kls = _measure(conversion, heldout)
    for attempt in range(_PASSES):
        if not _shift(conversion, spending, _PASSES // 2 <= attempt):
            break
        spending, kls = _measure(conversion, heldout)
    with torch.no_grad():  # of the batches whose dense answers were not kept
        rest = [float(conversion.kl(batch)) for batch in heldout.batches[len(kls) :]]
    return Settled(spending.shares(), sum(kls + rest) / len(heldout.batches))


def _shift(conversion: Conversion, spending: _Spending, less_will_do: bool) -> bool:
    """One step of `settle`; False where nothing needs to move."""
    budget = conversion.budget
    everyone = list(range(len(conversion.plans)))
    groups = [[n] for n in everyone] if budget.sharing == "uniform" else [everyone]
    low, high = (budget.fraction * part for part in SPEND)
    moved = False
    for group in groups:
        routed = [layer for n in group if (layer := conversion.layers.get(n)) is not None and layer.shifts]
        spent = spending.most(group)
        if not routed or (spent <= high and (spent >= low or less_will_do)):
            continue
        moved = True
        slope = max(spending.slope(group), 1e-3)
        for layer in routed:
            layer.shift += max(-0.5, min(0.5, (spent - (low + high) / 2) / slope))
    return moved


@torch.no_grad()
def _measure(conversion: Conversion, heldout: HeldOut) -> tuple[_Spending, list[float]]:
    """What is spent, and the KL of each batch to which the dense model's answer is known."""
    done, slopes, dense, kls = [], [], [], []
    for number, batch in enumerate(heldout.batches):
        found_PC = conversion.logits(batch)
        if number < len(heldout.answers):
            kls.append(float(distance(heldout.answers[number], found_PC, batch)))
        work = conversion.dense_macs()
        dense.append(work)
        done.append([float(share) * w for share, w in zip(conversion.shares(), work, strict=True)])
        densities = [conversion.layers[n].density if n in conversion.layers else 0.0 for n in range(len(work))]
        slopes.append([density * w for density, w in zip(densities, work, strict=True)])
    length_B = torch.tensor([batch.num_tokens / len(batch.example_B) for batch in heldout.batches])
    done_BL, slope_BL, dense_BL = (torch.tensor(table, dtype=torch.float64) for table in (done, slopes, dense))
    return _Spending(done_BL, slope_BL, dense_BL, length_B >= length_B.quantile(0.75)), kls
