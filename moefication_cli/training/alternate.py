"""Alternating training: FFNs run as mixtures of experts in some phases of a training, and dense in the others.

After "Exploring the Benefit of Activation Sparsity in Pre-training" (SSD, ICML 2024, arXiv 2410.03440,
https://arxiv.org/abs/2410.03440): a sparse phase computes and updates only the experts that each token selects, and dense
phases keep the experts from staying what they were. Unlike there, the lengths of the phases are given and not found from
the change of activations, and the first phase is sparse, because the model is a trained one already. The last is dense.

Experts: balanced k-means on normalised rows (`split.kmeans`), in later phases from the previous partition. Selection: a
fixed k of the `similarity` router, which has nothing to train and follows the weights. Axes: D width, F neurons, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moefication_cli.config import RelufyConfig
from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite
from moefication_cli.models.surgery import install, is_installed, live_weights, pack, uninstall
from moefication_cli.routing.cost import LayerCost
from moefication_cli.routing.routers.similarity import similarity_router
from moefication_cli.routing.rules import TopK
from moefication_cli.runs.inputs import layer_seed
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.split.kmeans import balanced_kmeans, normalised_rows
from moefication_cli.split.partition import divisors, nearest_divisor

EXPERT_SIZE, SPARSE_FRACTION = 32, 0.3  # 32: that of MoEfication (arXiv 2110.01786, section 4.1)


@dataclass(frozen=True)
class Phase:
    """Steps [first, first + steps) of a training, counted from 0."""

    sparse: bool
    first: int
    steps: int


def lengths(schedule: str) -> tuple[int, int]:
    """Steps of a sparse and of a dense phase, from "300:100". Raises ConfigError."""
    parts = schedule.split(":")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 10 and int(p) > 0 for p in parts):
        raise ConfigError(
            f"--schedule {schedule!r} is not two numbers of steps, both at least 1",
            "write sparse:dense, e.g. --schedule 300:300",
        )
    return int(parts[0]), int(parts[1])


def phases(schedule: str, steps: int) -> list[Phase]:
    """The phases of a training of `steps` steps: sparse and dense ones in turns, the last as many steps dense as a dense phase has.

    Raises ConfigError where no step would be sparse.
    """
    sparse, dense = lengths(schedule)
    if steps <= dense:
        raise ConfigError(
            f"--schedule {schedule}: this training takes {steps} steps and its last {dense} are dense: none would be sparse",
            f"use a dense phase of fewer than {steps} steps, or train longer (--steps, --epochs)",
        )
    kinds = groupby(range(steps), lambda step: step < steps - dense and step % (sparse + dense) < sparse)
    found = [(kind, list(taken)) for kind, taken in kinds]
    return [Phase(kind, taken[0], len(taken)) for kind, taken in found]


def layer_costs(sites: Sequence[FFNSite], config: RelufyConfig) -> list[tuple[LayerCost, int]]:
    """Every FFN's cost as experts, and how many of them a token gets. Raises ConfigError: sizes or fraction do not fit."""
    found, fraction = [], config.sparse_fraction or SPARSE_FRACTION
    for site in sites:
        size = config.expert_size or nearest_divisor(site.num_neurons, EXPERT_SIZE)
        if site.num_neurons % size:
            fit = ", ".join(map(str, divisors(site.num_neurons)))
            raise ConfigError(
                f"{site.name}: experts of {size} neurons do not divide {site.num_neurons}", f"--expert-size {fit}"
            )
        experts = site.num_neurons // size
        cost = LayerCost(site.d_model, site.num_neurons, 0, experts, site.flops_per_neuron, experts * site.d_model)
        top_k = math.floor(cost.experts_within(fraction, "flops") + 1e-9)
        if not 1 <= top_k < experts:
            raise ConfigError(
                f"{site.name}: --sparse-fraction {fraction:g} of the FFN pays for its router and {max(0, top_k)} of "
                f"{experts} experts of {size} neurons; at least 1 and not all must run",
                f"one takes {cost.flops(1) / cost.dense_flops:.3f}: use another --sparse-fraction or --expert-size",
            )
        found.append((cost, top_k))
    return found


class _PhaseExperts:
    """An FFN as experts for the length of a phase, over the model's own weights in the model's own order of neurons.

    `install` gives `weights` anew at every training step; rows are brought into the experts' order inside the step, so that
    the model's and the optimiser's tensors keep their order. Only what was selected gets a gradient.
    """

    def __init__(self, ffn: FFNWeights, expert_F: Tensor, top_k: int) -> None:
        self.weights = ExpertWeights(ffn, int(expert_F.max()) + 1)
        self._order_F, self._rule = expert_F.argsort(stable=True), TopK(top_k)

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        ordered = replace(self.weights, ffn=self.weights.ffn.permute(self._order_F))
        with torch.no_grad():
            router = similarity_router(ordered).detach()
        return MoEFFN(ordered, router, self._rule, backend="torch", may_go_dense=False)(x, token_mask)


class Partitions(nn.Module):
    """What of the phases a checkpoint holds: every FFN's experts, -1 before there are any, and how many neurons moved."""

    moved_P: Tensor

    def __init__(self, sites: Sequence[FFNSite], num_sparse: int) -> None:
        super().__init__()
        for site in sites:
            self.register_buffer(f"expert_{site.index}_F", torch.full((site.num_neurons,), -1))
        self.register_buffer("moved_P", torch.zeros(num_sparse, dtype=torch.int64))

    def of(self, site: FFNSite) -> Tensor:
        """expert_F of one FFN."""
        return self.get_buffer(f"expert_{site.index}_F")


class Alternation(TrainerCallback):  # type: ignore[misc]
    """Swaps the FFNs of `model` where phases begin, also when a training goes on in the middle of one.

    To be made before the optimiser: parameters are stored anew, neuron after neuron. Raises what `layer_costs` raises.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[FFNSite], found: Sequence[Phase], config: RelufyConfig, seed: int
    ) -> None:
        self._model, self._sites, self.phases, self._seed = model, sites, found, seed
        self._costs = layer_costs(sites, config)
        self._mask = TokenMask(model)
        self.partitions = Partitions(sites, sum(phase.sparse for phase in found))
        for site in sites:
            pack(model, site)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before step `state.global_step`, counted from 0."""
        step = state.global_step
        now = next(phase for phase in reversed(self.phases) if phase.first <= step)
        if not now.sparse:
            for site in self._sites:
                uninstall(self._model, site)
            return
        if step == now.first:
            self._cluster([phase for phase in self.phases if phase.sparse].index(now))
        elif is_installed(self._model, self._sites[0]):
            return
        for site, (_, top_k) in zip(self._sites, self._costs, strict=True):
            layer = _PhaseExperts(live_weights(self._model, site), self.partitions.of(site), top_k)
            install(self._model, site, layer, self._mask)

    @torch.no_grad()
    def _cluster(self, number: int) -> None:
        """The experts of sparse phase `number`: found anew for the first, then from those before."""
        moved = 0
        for site, (cost, _) in zip(self._sites, self._costs, strict=True):
            ffn, expert_F = live_weights(self._model, site), self.partitions.of(site)
            rows_FD = normalised_rows(ffn.w_up_FD if ffn.w_gate_FD is None else ffn.w_gate_FD)
            before = {"init_F": expert_F.cpu(), "restarts": 0} if number else {}
            seed = layer_seed(self._seed, site.index)
            after_F = balanced_kmeans(rows_FD, cost.num_experts, seed=seed, **before).expert_F  # type: ignore[arg-type]
            moved += int((after_F != expert_F.cpu()).sum())
            expert_F.copy_(after_F)
        self.partitions.moved_P[number] = moved

    def report(self) -> list[dict[str, Any]]:
        """Of every phase: its steps, FFN FLOPs relative to dense ones, and the share of neurons that changed their expert."""
        dense = sum(cost.dense_flops for cost, _ in self._costs)
        spent = sum(cost.flops(top_k) for cost, top_k in self._costs) / dense
        neurons = sum(site.num_neurons for site in self._sites)
        moved = [None, *(count / neurons for count in self.partitions.moved_P.tolist()[1:])]
        return [
            {
                "phase": "sparse" if phase.sparse else "dense",
                "first_step": phase.first + 1,
                "steps": phase.steps,
                "ffn_flops_fraction": spent if phase.sparse else 1.0,
                "moved": moved.pop(0) if phase.sparse else None,
            }
            for phase in self.phases
        ]
