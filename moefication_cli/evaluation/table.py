"""The names of `--selection` that are no trained routers, and what each puts in place of every FFN.

A new one is a function `(Ground, fraction) -> [SelectionRow]` in a file of its own and a line in `SELECTIONS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moefication_cli.config import ApplyConfig, EvalConfig
from moefication_cli.conversion.plan import Budget, RoutedLayer, routed_layers
from moefication_cli.conversion.plan_files import read_plans
from moefication_cli.conversion.search import PlanInputs, make_plans
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.baselines import paper_row, static_row
from moefication_cli.evaluation.cmoe import cmoe_row
from moefication_cli.evaluation.selections import (
    NeuronOracleFFN,
    OwnModel,
    SelectionRow,
    StockFFN,
    dense_layer,
    routed_row,
    selected_row,
)
from moefication_cli.evaluation.teal import teal_row
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.models.int8 import quantise_model
from moefication_cli.models.loading import load_int8, load_model
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.surgery import live_weights, permute_in_place
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import load_whole
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


@dataclass(frozen=True)
class EvalInputs:
    """The artifacts that an evaluation reads. `applied` is RUN/model, if there is one."""

    run: RunDir
    model: RunModel
    split: Artifact
    routers: dict[str, Artifact]
    applied: Artifact | None
    activations: Artifact | None


@dataclass(frozen=True)
class Ground:
    """What all rows stand on: one model whose neurons are in the order of the split, and the options of the command.

    `like` is what `apply` was last asked for: rows of routers are made as it would make them at another fraction.
    """

    inputs: EvalInputs
    net: Any  # a model of transformers
    routed: dict[str, list[RoutedLayer]]
    like: ApplyConfig
    config: EvalConfig
    control: Control
    stored_int8: bool = False  # whether RUN/model holds int8 weights

    @property
    def dtype(self) -> torch.dtype:
        """What the FFNs compute in: baselines with weights of their own do the same."""
        found: torch.dtype = self.net.dtype
        return found

    @property
    def layers(self) -> list[RoutedLayer]:
        """The layers with the router that `apply` used."""
        return self.routed[str(self.like.router)]


def ground_of(inputs: EvalInputs, net: Any, config: EvalConfig, control: Control) -> Ground:
    """Permutes `net` and reads the routers. Raises ConfigError where none is trained."""
    tokens = None
    if inputs.activations is not None:
        tokens = [layer["tokens"] for layer in inputs.activations.metrics["layers"]]
    routed = {name: routed_layers(inputs.model, inputs.split, stage, tokens) for name, stage in inputs.routers.items()}
    if not routed:
        root = inputs.run.root
        raise ConfigError(f"{root}: no router is trained", f"moefication train-router {root}")
    like = ApplyConfig(router=next(iter(routed)), fraction=0.0)
    if inputs.applied is not None:
        like = ApplyConfig.recorded(inputs.applied.config)
    ground = Ground(inputs, net, routed, replace(like, weights=None), config, control, like.weights is not None)
    for layer in ground.layers:
        permute_in_place(net, layer.site, layer.partition.order_F())
    return ground


@dataclass(frozen=True)
class Selection:
    """A row of `SELECTIONS`. `always`: measured whatever is asked for, because other figures need it.

    `default`: measured where nothing is asked for.
    """

    rows: Callable[[Ground, float], list[SelectionRow]]
    reads_activations: bool = False
    always: bool = False
    default: bool = True


def _groundtruth(ground: Ground, fraction: float) -> list[SelectionRow]:
    return [_selected("groundtruth", ground, fraction, ground.control.seed)]


def _random(ground: Ground, fraction: float) -> list[SelectionRow]:
    first = ground.control.seed
    return [_selected("random", ground, fraction, seed) for seed in range(first, first + ground.config.seeds)]


def _selected(name: str, ground: Ground, fraction: float, seed: int) -> SelectionRow:
    layers = ground.layers
    return selected_row(name, ground.net, layers, fraction, layers[0].score, seed, ground.config.backend)


def _neuron(ground: Ground, fraction: float) -> list[SelectionRow]:
    oracles: list[Any] = [
        NeuronOracleFFN(live_weights(ground.net, site), max(1, round(fraction * site.num_neurons)))
        for site in ground.inputs.model.sites
    ]
    meta = {"score": "contribution", "rule": "top_k"}
    return [SelectionRow("neuron", "oracle", fraction, oracles, meta=meta)]


def _static(ground: Ground, fraction: float) -> list[SelectionRow]:
    assert ground.inputs.activations is not None
    model, activations, backend = ground.inputs.model, ground.inputs.activations, ground.config.backend
    return [static_row(model, activations, fraction, backend, ground.dtype, ground.control)]


def _paper(ground: Ground, fraction: float) -> list[SelectionRow]:
    return [paper_row(ground.inputs.run, ground.inputs.model, fraction, ground.config, ground.dtype, ground.control)]


def _teal(ground: Ground, fraction: float) -> list[SelectionRow]:
    inputs = ground.inputs
    assert inputs.activations is not None
    return [teal_row(inputs.run, inputs.model, inputs.activations, ground.net, fraction, ground.control)]


def _cmoe(ground: Ground, fraction: float) -> list[SelectionRow]:
    assert ground.inputs.activations is not None
    budget = Budget(fraction, ground.config.fraction_of)
    model, activations, backend = ground.inputs.model, ground.inputs.activations, ground.config.backend
    return [cmoe_row(model, activations, budget, backend, ground.dtype, ground.control)]


SELECTIONS: dict[str, Selection] = {
    "groundtruth": Selection(_groundtruth, always=True),
    "random": Selection(_random, always=True),  # counts the tokens of every FFN for the other rows
    "static": Selection(_static, reads_activations=True, always=True),
    "neuron": Selection(_neuron),
    "paper": Selection(_paper, reads_activations=True, default=False),  # clusters and trains a router for every layer
    "teal": Selection(_teal, reads_activations=True),
    "cmoe": Selection(_cmoe, reads_activations=True),
}


def rows_by_fraction(ground: Ground, selections: list[str], fractions: list[float]) -> Iterator[list[SelectionRow]]:
    """The rows of every selection, one fraction after the other; of RUN/model too where its fraction is not among them.

    Static pruning and peers hold weights of their own: those of one fraction can go before the next are made.
    """
    applied = ground.inputs.applied is None
    for number, fraction in enumerate(fractions):
        rows: list[SelectionRow] = []
        for name in selections:
            rows += SELECTIONS[name].rows(ground, fraction) if name in SELECTIONS else _routed(ground, name, fraction)
        applied = applied or any(row.applied for row in rows)
        if not applied and number == len(fractions) - 1:
            rows += _converted(ground)
        yield rows


def _converted(ground: Ground) -> list[SelectionRow]:
    """RUN/model: in float, on its fine-tuned weights with every neuron on, and in int8 beside the dense model in int8.

    Where the folder holds int8 weights, the row in int8 is the one that was applied, and fine-tuned float weights are gone.
    """
    like, stored = ground.like, ground.stored_int8
    own, rows = None, list[SelectionRow]()
    if like.finetuned is None or not stored:
        own = None if like.finetuned is None else _own_model(ground)
        rows.append(_model_row(ground, own, applied=not stored))
    rounded = _own_model(ground, "int8") if stored or ground.config.weights is not None else None
    tuned = own or rounded
    if like.finetuned is not None and tuned is not None:
        layers: list[Any] = [dense_layer(tuned.loaded.model, site) for site in ground.inputs.model.sites]
        rows.append(
            SelectionRow("dense-finetuned", "baseline", 1.0, layers, meta={"finetuned": like.finetuned}, own=tuned)
        )
    if rounded is not None:
        dense = load_whole(ground.inputs.run, ground.inputs.model, ground.config.task, ground.config.dtype)
        quantise_model(dense.model, [])
        stock = [StockFFN() for _ in ground.inputs.model.sites]
        beside = OwnModel(dense, TokenMask(dense.model))
        rows.append(SelectionRow("dense-int8", "baseline", 1.0, stock, meta={"weights": "int8"}, own=beside))
        row = _model_row(ground, rounded, applied=stored)
        row.selection, row.meta = f"{row.selection}-int8", row.meta | {"weights": "int8"}
        rows.append(row)
    return rows


def _own_model(ground: Ground, weights: str | None = None) -> OwnModel:
    """The model of RUN/model's own weights, as they are or in int8."""
    assert ground.inputs.applied is not None
    folder, model = ground.inputs.applied.path, ground.inputs.model
    options: dict[str, Any] = {
        "task": ground.config.task or ground.inputs.run.info.task,
        "trust_remote_code": model.checkpoint.trust_remote_code,
    }
    if weights is None:
        loaded = load_model(
            folder, device=model.device, dtype=ground.config.dtype, tokenizer=False, quiet=True, **options
        )
    else:
        loaded, _ = load_int8(folder, read_moe_folder(folder), **options)
    return OwnModel(loaded, TokenMask(loaded.model))


def _model_row(ground: Ground, own: OwnModel | None, applied: bool) -> SelectionRow:
    """What RUN/model does, on the run's own weights or those of `own`."""
    assert ground.inputs.applied is not None
    like = ground.like
    plans = read_plans(ground.inputs.applied.path, ground.layers, ground.inputs.model.device)
    net = ground.net if own is None else own.loaded.model
    row = routed_row(str(like.router), net, plans, like.fraction, ground.config.backend, applied, like.budget)
    row.own = own
    if like.finetuned is not None:
        row.meta["finetuned"] = like.finetuned
    return row


def _routed(ground: Ground, name: str, fraction: float) -> list[SelectionRow]:
    """What `apply` with the options of last time would make of this router at this fraction."""
    inputs, like = ground.inputs, ground.like
    made = replace(like, router=name, fraction=fraction, fraction_of=ground.config.fraction_of, top_k=None)
    if made == like:
        return _converted(ground)
    stages = {"split": inputs.split, f"router/{name}": inputs.routers[name], "activations": inputs.activations}
    made = replace(made, finetuned=None)
    plans = make_plans(PlanInputs(inputs.run, inputs.model, ground.routed[name], stages, ground.control), made)
    return [routed_row(name, ground.net, plans, fraction, ground.config.backend, False, like.budget)]
