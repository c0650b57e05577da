"""tune: sweep split, expert size, router, budget and compensation on calibration data; the Pareto front of what is lost
against what is spent, in FLOPs and in measured time.

Every split is a run directory of its own, RUN/trials/<method>-<size>, that shares the activations: its stages are cached
and resume like any others. Judged on sequences that neither split nor router saw, where the data has enough of them.
"""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from moefication_cli.config import ApplyConfig, RouterConfig, SplitConfig, TuneConfig
from moefication_cli.conversion.learnable import distance
from moefication_cli.conversion.plan import check_budget, plan_layers, routed_layers, time_fraction
from moefication_cli.conversion.plan_files import budget_of
from moefication_cli.conversion.times import timed
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.measure import timed_logits
from moefication_cli.evaluation.selections import SelectionRow, count_selections, flops_fractions, routed_row
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.surgery import install, permute_in_place
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import Cost, forward_flops, model_parameters, num_experts, router_cost, split_cost
from moefication_cli.runs.data import calibration_data, flat_predictions, load_whole, open_examples
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import RunModel, begin_options, open_model
from moefication_cli.split.methods import expert_counts
from moefication_cli.stages.split_neurons import split_neurons
from moefication_cli.stages.train_router import train_router
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.examples import Batch

_KEYS = ("method", "expert_size", "router", "budget", "compensation", "fraction")


@dataclass
class Trial:
    """One combination, and its sums over the held-out batches."""

    choice: dict[str, Any]
    row: SelectionRow
    kl: float = 0.0
    agreed: float | None = 0.0  # None of embedders, which choose nothing
    dense_seconds: float = 0.0


def tune(run: RunDir, config: TuneConfig, control: Control) -> Result:
    """Measure every combination the options span; rows on a Pareto front are marked. Writes RUN/tune/metrics.json.

    Raises ConfigError when no combination can be made, MissingArtifactError without activations.
    """
    model = open_model(run, None, control)
    activations = run.require("activations")
    if control.dry_run:
        return estimate(
            "tune", model, run.path("tune"), _cost(model, activations, config), {"activations": activations}
        )
    options = begin_options(config, control, model, {"activations": activations})
    with run.begin("tune", options) as work:
        if work.up_to_date:
            rows = jsonio.read_object(run.path("tune") / "metrics.json")["rows"]
        else:
            rows = _sweep(run, model, activations, config, control)
            mark_front(rows, "ffn_flops_fraction", "pareto_flops")
            mark_front(rows, "seconds", "pareto_time")
            mark_best(rows)
            jsonio.write(work.folder / "metrics.json", {"schema": "moefication/tune@1", "rows": rows})
            work.finish({"rows": len(rows)})
    front = [row for row in rows if row["pareto_flops"] or row["pareto_time"] or row.get("best")]
    spent = "modelled time" if config.objective == "time" else "compute"
    notes = [
        f"best: the least KL of all combinations at the same --fraction of {spent}",
        f"{len(front)} of {len(rows)} combinations are on a front (no other loses less at the same cost) or best",
        f"KL to dense (embedders: 1 - cosine) on held-out calibration data, not refined; all rows: {run.path('tune') / 'metrics.json'}",
    ]
    table = sorted(front, key=lambda row: float(row["ffn_flops_fraction"]))
    return Result("tune", table, {"all": rows}, up_to_date=work.reason is None, notes=notes)


def _cost(model: RunModel, activations: Artifact, config: TuneConfig) -> Cost:
    """Of every split that divides the FFNs, its routers, and two passes over the held-out tokens per combination."""
    collected = activations.metrics["layers"][0]["tokens"]
    parts = []
    for method, size in itertools.product(config.methods, config.expert_sizes):
        splitting = SplitConfig(method=method, expert_size=size)
        with suppress(ConfigError):
            experts = num_experts(model, splitting)
            trained = (RouterConfig(router=router, max_tokens=config.max_tokens) for router in config.routers)
            parts += [split_cost(model, splitting), *(router_cost(model, c, collected, experts) for c in trained)]
    measured = len(config.budgets) * len(config.compensations) * len(dict.fromkeys(config.fractions)) * len(parts)
    passes = forward_flops(model) * config.heldout_tokens * measured
    memory = max([2 * model_parameters(model) * 4, *(part.memory for part in parts)])
    return Cost(sum(part.num_bytes for part in parts), passes + sum(part.flops for part in parts), memory)


def _sweep(
    run: RunDir, model: RunModel, activations: Artifact, config: TuneConfig, control: Control
) -> list[dict[str, Any]]:
    dense, converted = (load_whole(run, model) for _ in range(2))
    batches = _heldout(run, model, dense, activations, config, control)
    mask = TokenMask(converted.model)
    rows: list[dict[str, Any]] = []
    quiet = Control(device=control.device, seed=control.seed, say=control.say)
    for method, size in control.track(list(itertools.product(config.methods, config.expert_sizes)), "tune"):
        splitting = SplitConfig(method=method, expert_size=size)
        try:
            for site in model.sites:
                expert_counts(site.num_neurons, splitting)
        except ConfigError as error:
            control.say(f"experts of {size} neurons are left out: {error.message}")
            continue
        trial = run.branch(f"trials/{method}-{size}", share=["activations"])
        split_neurons(trial, splitting, quiet)
        trials: list[Trial] = []
        for router in config.routers:
            training = RouterConfig(router=router, max_tokens=config.max_tokens)
            train_router(trial, training, quiet)
            tokens = [layer["tokens"] for layer in activations.metrics["layers"]]
            layers = routed_layers(model, trial.require("split"), trial.require(f"router/{router}"), tokens)
            for budget, compensation, fraction in itertools.product(
                config.budgets, config.compensations, dict.fromkeys(config.fractions)
            ):
                asked = ApplyConfig(
                    fraction=fraction,
                    budget=budget,
                    compensation=compensation,
                    objective=config.objective,
                    objective_tokens=config.objective_tokens,
                )
                wanted = timed(budget_of(asked), asked, layers, model.device, control)
                try:
                    check_budget(layers, activations, wanted)
                except ConfigError:
                    continue  # the router alone costs more
                plans = plan_layers(model, activations, layers, wanted, control.seed)
                row = routed_row(router, converted.model, plans, fraction, "auto")
                choice = dict(zip(_KEYS, (method, size, router, budget, compensation, fraction), strict=True))
                if config.objective == "time":
                    choice["ffn_time_fraction"] = time_fraction(plans, wanted)
                trials.append(Trial(choice, row))
        for layer in layers:
            permute_in_place(converted.model, layer.site, layer.partition.order_F())
        _measure(dense, converted, model, trials, batches, mask)
        for layer in layers:
            permute_in_place(converted.model, layer.site, layer.partition.order_F().argsort())
        rows += [_row(trial, model, len(batches)) for trial in trials]
    if not rows:
        raise ConfigError("no combination can be made of these options", "see `moefication inspect` for expert sizes")
    return rows


def _heldout(
    run: RunDir, model: RunModel, loaded: LoadedModel, activations: Artifact, config: TuneConfig, control: Control
) -> list[Batch]:
    examples = open_examples(run, loaded, calibration_data(run, model, activations), control)
    return list(examples.calibration(config.heldout_tokens, control.seed + 1, config.batch_size))


@torch.no_grad()  # tensors packed in inference mode could not be permuted back
def _measure(
    dense: LoadedModel,
    converted: LoadedModel,
    model: RunModel,
    trials: Sequence[Trial],
    batches: Sequence[Batch],
    mask: TokenMask,
) -> None:
    """Dense and every trial in turns on every batch; the first batch also warms up, uncounted."""
    for number, batch in enumerate([batches[0], *batches]):
        placed = batch.to(dense.device)
        logits, dense_seconds = timed_logits(dense, placed)
        expected_PC = flat_predictions(logits, batch)
        for trial in trials:
            for site, layer in zip(model.sites, trial.row.layers, strict=True):
                install(converted.model, site, layer, mask)
            logits, seconds = timed_logits(converted, placed)
            found_PC = flat_predictions(logits, batch)
            if number == 0:
                count_selections(trial.row)
                continue
            trial.kl += float(distance(expected_PC, found_PC, batch))
            if trial.agreed is not None:
                same = (expected_PC.argmax(-1) == found_PC.argmax(-1)).float().mean()
                trial.agreed = None if batch.pool_RT is not None else trial.agreed + float(same)
            trial.row.seconds += seconds
            trial.dense_seconds += dense_seconds


def _row(trial: Trial, model: RunModel, num_batches: int) -> dict[str, Any]:
    sizes = [float(site.num_parameters) for site in model.sites]
    shares = flops_fractions(trial.row)
    return trial.choice | {
        "kl": trial.kl / num_batches,
        "agreement": None if trial.agreed is None else trial.agreed / num_batches,
        "ffn_flops_fraction": sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes),
        "seconds": trial.row.seconds,
        "speedup": trial.dense_seconds / trial.row.seconds,
    }


def mark_best(rows: list[dict[str, Any]]) -> None:
    """Marks, for every fraction, the row of least KL: which method, size of experts and router to take."""
    least: dict[float, dict[str, Any]] = {}
    for row in rows:
        row["best"] = False
        if row["fraction"] not in least or row["kl"] < least[row["fraction"]]["kl"]:
            least[row["fraction"]] = row
    for row in least.values():
        row["best"] = True


def mark_front(rows: list[dict[str, Any]], cost: str, mark: str) -> None:
    """Marks the rows that no other row beats in KL at the same or a lower cost."""
    least = float("inf")
    for row in sorted(rows, key=lambda row: (row[cost], row["kl"])):
        row[mark] = bool(row["kl"] < least)
        least = min(least, row["kl"])
