"""Fit a planned conversion to the whole model: plans are made layer by layer on the dense model's activations, and the
inputs of a converted layer differ from those, because the layers before it are converted too.

`settle` moves the thresholds until the converted model spends its budget on calibration data. `refine` trains routers,
thresholds and compensations by gradient on KL(dense || converted), with a price on compute, and keeps the result only
if it is better on sequences it was not trained on. The FFNs' own weights are frozen throughout.

Axes: P predictions (tokens of a language model, sequences of a classifier), C classes or vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moefication_cli.conversion.plan import Budget, LayerPlan
from moefication_cli.conversion.straight_through import StraightThroughMoEFFN
from moefication_cli.ffn import ExpertWeights
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.surgery import install, live_weights, uninstall
from moefication_cli.routing.cost import overhead_flops
from moefication_cli.routing.rules import Threshold, TopK
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import flat_predictions, tokens_of_stacks
from moefication_cli.tasks.examples import Batch

# Shares of the budget that calibration data may spend. Other data of a task was seen to spend up to 4.6 % more than it
# (0.103 for 0.0985 on the test set of a six-class task): within 1 % of the budget from here.
SPEND = (0.955, 0.965)
_PASSES = 8  # over the held-out sequences to find the thresholds; two or three are usual
_TRIAL = 4  # the part of the steps after which training must have helped
LEARNING_RATE = 0.03  # of each parameter's size, per step of _FULL_PREDICTIONS or more predictions
_FULL_PREDICTIONS = 2048  # fewer carry less signal: the rate shrinks in proportion (a classifier has one a sequence)


@dataclass(frozen=True)
class Outcome:
    """KL per prediction on held-out sequences before and after, at the same share of the dense FFNs' work."""

    kl_before: float
    kl_after: float
    kept: bool


class Conversion:
    """A loaded model whose neurons stand in the order of the split, with a learnable layer in every FFN that skips some.

    Plans are of thresholds or of a fixed k. `teacher` is the dense model where the weights of this one change, in any order of its neurons.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plans: Sequence[LayerPlan],
        budget: Budget,
        mask: TokenMask,
        teacher: LoadedModel | None = None,
    ) -> None:
        self.loaded, self.plans, self.budget, self.mask, self.teacher = loaded, list(plans), budget, mask, teacher
        self.layers: dict[int, StraightThroughMoEFFN] = {}
        self.overheads: dict[int, float] = {}
        self.tokens: dict[str, int] = {}
        loaded.model.requires_grad_(False)
        for number, plan in enumerate(plans):
            site = plan.layer.site
            if plan.rule is None or plan.rule == TopK(plan.num_experts):
                continue
            assert isinstance(plan.rule, Threshold | TopK)  # other rules are refused before (`search`)
            overhead = overhead_flops(plan.router, plan.compensation) if budget.fraction_of == "flops" else 0
            self.overheads[number] = overhead / (site.num_neurons * site.flops_per_neuron)
            weights = ExpertWeights(
                live_weights(loaded.model, site), plan.num_experts, plan.num_shared, plan.compensation
            )
            constant = budget.compensation != "none"
            self.layers[number] = StraightThroughMoEFFN(weights, plan.router, plan.rule, constant)
        self.install()

    def install(self) -> None:
        """Put these layers into the model, in place of those of another conversion."""
        for number, plan in enumerate(self.plans):
            if number in self.layers:
                install(self.loaded.model, plan.layer.site, self.layers[number], self.mask)
            else:
                uninstall(self.loaded.model, plan.layer.site)

    def outputs(self, batch: Batch, *, dense: bool = False, hidden: bool = False) -> Any:
        """What transformers returns for this batch: of the converted model, or of the dense one it was made from.

        `hidden` asks for the hidden states as well.
        """
        inputs: dict[str, Any] = dict(batch.to(self.loaded.device).inputs)
        if hidden:
            inputs["output_hidden_states"] = True
        if dense and self.teacher is not None:
            return self.teacher.model(**inputs)
        for layer in self.layers.values():
            layer.as_dense = dense
        self.tokens = tokens_of_stacks(batch)
        return self.loaded.model(**inputs)

    def logits(self, batch: Batch, *, dense: bool = False) -> Tensor:
        """logits_PC of this batch's predictions (or embeddings), by the converted model or by the dense one it was made from."""
        return flat_predictions(batch.answers(self.outputs(batch, dense=dense)), batch)

    def kl(self, batch: Batch) -> Tensor:
        """Mean `distance` to the dense model over this batch's predictions; differentiable."""
        with torch.no_grad():
            dense_PC = self.logits(batch, dense=True)
        return distance(dense_PC, self.logits(batch), batch)

    def dense_macs(self) -> list[float]:
        """Each dense FFN's multiply-adds in the latest call, up to a common factor."""
        return [self.tokens[p.layer.site.stack] * float(p.layer.site.num_parameters) for p in self.plans]

    def shares(self) -> list[Tensor]:
        """What each FFN computed in the latest call, as a share of dense, counted as `eval` counts; differentiable."""
        return [
            torch.ones((), device=self.loaded.device)  # the others' counts are there
            if number not in self.layers
            else self.layers[number].active + self.overheads[number]
            for number in range(len(self.plans))
        ]

    def spent(self) -> Tensor:
        """The same over all FFNs."""
        work = self.dense_macs()
        return torch.stack([w * share for w, share in zip(work, self.shares(), strict=True)]).sum() / sum(work)

    def finished(self, shares: Sequence[float]) -> list[LayerPlan]:
        """The plans with what was learned; `shares` is what each FFN computes."""
        found = []
        for number, plan in enumerate(self.plans):
            layer = self.layers.get(number)
            if layer is not None:
                extra = layer.learned_compensation()
                plan = replace(plan, compensation=None if extra is None else extra.detach())
                if plan.router is not None:
                    plan = replace(plan, router=layer.learned_router().detach())
                if isinstance(plan.rule, Threshold):
                    rule = Threshold(plan.rule.threshold + layer.shift * layer.spread)
                    plan = replace(plan, rule=rule)
                if plan.router is None or layer.shifts:  # a fixed k computes what was planned
                    plan = replace(plan, flops_fraction=shares[number])
            found.append(plan)
        return found

    def state(self) -> dict[int, tuple[dict[str, Tensor], float]]:
        """A copy of what is learned, thresholds included, for `restore`."""
        return {
            number: ({name: tensor.detach().clone() for name, tensor in layer.parameters.items()}, layer.shift)
            for number, layer in self.layers.items()
        }

    @torch.no_grad()
    def restore(self, state: dict[int, tuple[dict[str, Tensor], float]]) -> None:
        """Back to what `state` returned."""
        for number, (tensors, shift) in state.items():
            self.layers[number].shift = shift
            for name, tensor in tensors.items():
                self.layers[number].parameters[name].copy_(tensor)


def kl_divergence(dense_PC: Tensor, found_PC: Tensor) -> Tensor:
    """Mean KL(dense || found) over predictions, in nats, of logits."""
    expected_PC, found_PC = dense_PC.log_softmax(-1), found_PC.log_softmax(-1)
    return torch.nn.functional.kl_div(found_PC, expected_PC, log_target=True, reduction="sum") / len(found_PC)


def distance(dense_PC: Tensor, found_PC: Tensor, batch: Batch) -> Tensor:
    """Mean KL(dense || found) over predictions, in nats; of embeddings, which have none, 1 - cosine (`tasks.embedding`)."""
    if batch.pool_RT is None:
        return kl_divergence(dense_PC, found_PC)
    return 1 - torch.nn.functional.cosine_similarity(dense_PC, found_PC, dim=-1).mean()


def settle(conversion: Conversion, batches: Sequence[Batch]) -> list[float]:
    """Shift the thresholds until the budget is spent on these batches; returns each FFN's share of dense. A fixed k stays.

    All layers move by the same number of standard deviations of their scores, or each for itself under a uniform
    budget. Newton's method, the slope being the density of scores at the threshold: at most 8 steps of at most 0.5
    standard deviations. Thresholds are accepted when the spend is within SPEND of the budget, from the fifth step on
    when it is at most SPEND[1]. The spend is that of all batches or of the quarter with the longest sequences, whichever
    is more: calibration data is often shorter (phrases) than what is evaluated (sentences).
    """
    budget = conversion.budget
    everyone = list(range(len(conversion.plans)))
    groups = [[n] for n in everyone] if budget.sharing == "uniform" else [everyone]
    low, high = (budget.fraction * part for part in SPEND)
    for attempt in range(_PASSES):
        spending = _measure(conversion, batches)
        settled = True
        for group in groups:
            routed = [layer for n in group if (layer := conversion.layers.get(n)) is not None and layer.shifts]
            spent = spending.most(group)
            if not routed or (spent <= high and (spent >= low or attempt >= _PASSES // 2)):
                continue
            settled = False
            slope = max(spending.slope(group), 1e-3)
            for layer in routed:
                layer.shift += max(-0.5, min(0.5, (spent - (low + high) / 2) / slope))
        if settled:
            break
    return spending.shares()


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


@torch.no_grad()
def _measure(conversion: Conversion, batches: Sequence[Batch]) -> _Spending:
    done, slopes, dense = [], [], []
    for batch in batches:
        conversion.logits(batch)
        work = conversion.dense_macs()
        dense.append(work)
        done.append([float(share) * w for share, w in zip(conversion.shares(), work, strict=True)])
        densities = [conversion.layers[n].density if n in conversion.layers else 0.0 for n in range(len(work))]
        slopes.append([density * w for density, w in zip(densities, work, strict=True)])
    length_B = torch.tensor([batch.num_tokens / len(batch.example_B) for batch in batches])
    done_BL, slope_BL, dense_BL = (torch.tensor(table, dtype=torch.float64) for table in (done, slopes, dense))
    return _Spending(done_BL, slope_BL, dense_BL, length_B >= length_B.quantile(0.75))


@torch.no_grad()
def mean_kl(conversion: Conversion, batches: Sequence[Batch]) -> float:
    """KL per prediction, batches weighted alike."""
    return sum(float(conversion.kl(batch)) for batch in batches) / len(batches)


def refine(
    conversion: Conversion, train: Sequence[Batch], heldout: Sequence[Batch], steps: int, control: Control
) -> Outcome:
    """Train what the conversion added, at its budget; undone unless the KL on the held-out batches fell.

    Call `settle` first. The price of compute follows what is spent, so that training stays near the budget. Thresholds
    are settled anew at the end, and after a quarter of the steps, when training that does not help is given up.
    """
    target = conversion.budget.fraction * SPEND[1]
    before, start = mean_kl(conversion, heldout), conversion.state()
    if not any(layer.parameters for layer in conversion.layers.values()):  # as where every FFN is left dense
        return Outcome(before, before, False)
    price = max(before, 1e-6) / target
    rate = LEARNING_RATE * signal(conversion, train[0])
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
            settle(conversion, heldout)
            after = mean_kl(conversion, heldout)
            if not after < before:  # the later steps are unlikely to help where the first quarter did not
                break
        kl = conversion.kl(next(source))
        spent = conversion.spent()
        optimizer.zero_grad(set_to_none=True)
        (kl + price * spent).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        average += 0.1 * (float(spent.detach()) - average)
        price *= math.exp(max(-0.1, min(0.1, average / target - 1)))
    else:
        settle(conversion, heldout)
        after = mean_kl(conversion, heldout)
    if not after < before:  # NaN too
        conversion.restore(start)
    return Outcome(before, after, after < before)


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
