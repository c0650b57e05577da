"""A loaded model with a learnable layer in every FFN that skips some neurons, and how far it is from the dense one.

Axes: P predictions (tokens of a language model, sequences of a classifier), C classes or vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
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
from moefication_cli.runs.data import flat_predictions, tokens_of_stacks
from moefication_cli.tasks.examples import Batch


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
