"""eval: quality and time of the MoE beside the dense model, oracles and baselines. `evaluation.measure` does the work."""

from dataclasses import replace
from typing import Any

from moefication_cli.config import ApplyConfig, EvalConfig
from moefication_cli.errors import ConfigError, did_you_mean
from moefication_cli.evaluation.measure import BASELINES, measure
from moefication_cli.evaluation.plots import plot_quality
from moefication_cli.evaluation.rows import by_data, legend, lost_to
from moefication_cli.evaluation.table import SELECTIONS, EvalInputs
from moefication_cli.models.int8 import check_weights_option
from moefication_cli.models.loading import resolve_dtype
from moefication_cli.runs.card import with_quality
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import eval_cost
from moefication_cli.runs.data import data_inputs
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import absolute, begin_options, open_model
from moefication_cli.runs.room import check_room
from moefication_cli.stages.harness import harness
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.files import atomic_write
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import named_data

_TABLE = (
    "selection",
    "fraction",
    "value",
    "relative",
    "agreement",
    "kl",
    "active_fraction",
    "ffn_flops_fraction",
    "speedup",
    "backend",
)


def evaluate(run: RunDir, config: EvalConfig, control: Control = Control()) -> Result:
    """Measure every selection at every fraction, on every data set; writes RUN/eval/<name>/metrics.json and quality.png.

        evaluate(RunDir("RUN"), EvalConfig(data="test.txt")).rows
        evaluate(RunDir("RUN"), EvalConfig(data="valid=valid.txt,other=other.txt")).rows  # each with its `data`

    With `lm_eval` it is `harness.harness` that measures. Raises ConfigError (no data, unknown selection),
    MissingArtifactError, StaleArtifactError.
    """
    if config.lm_eval is not None:
        if config.weights is not None:
            raise ConfigError("--weights int8 is not measured by --lm-eval", "leave out one of them")
        return harness(run, config, control)
    model = open_model(run, None, control)
    check_weights_option(config.weights, model.device, resolve_dtype(config.dtype, model.device))
    split = run.require("split")
    routers = {name: run.require(f"router/{name}") for name in run.names("router")}
    wanted = config.weights is not None or run.manifest("model") is not None
    applied = run.require("model") if wanted else None
    weights = config.weights or (None if applied is None else ApplyConfig.recorded(applied.config).weights)
    check_weights_option(weights, model.device, resolve_dtype(config.dtype, model.device))
    fractions = _fractions(config, applied)
    selections = _selections(config, routers)
    activations = None
    if any(SELECTIONS[name].reads_activations for name in selections if name in SELECTIONS):
        activations = run.require("activations")
    stages = {"split": split, "activations": activations, "model": applied}
    cost = eval_cost(model, config.data, config.limit, len(fractions) * len(selections), weights)
    if control.dry_run:
        return estimate("eval", model, run.path(f"eval/{config.name}"), cost, stages)
    used = {f"router/{name}": stage for name, stage in routers.items() if name in selections}
    data = {name: str(absolute(path)) for name, path in named_data(config.data).items()}
    digests: dict[str, str] = {}
    for name, path in data.items():
        found = data_inputs(run, model, replace(config, data=path))
        digests |= {f"data/{name}" if name and key == "data" else key: digest for key, digest in found.items()}
    config = replace(config, data=",".join(f"{name}={path}" if name else path for name, path in data.items()))
    options = begin_options(config, control, model, {**stages, **used}, digests)
    with run.begin(f"eval/{config.name}", options) as work:
        check_room(work, model, cost, control, "--dtype bfloat16 or a smaller --batch-size")
        if work.up_to_date:
            metrics = jsonio.read_object(run.path(f"eval/{config.name}") / "metrics.json")
        else:
            inputs = EvalInputs(run, model, split, routers, applied, activations)
            metrics = measure(inputs, selections, fractions, data, config, control)
            jsonio.write(work.folder / "metrics.json", metrics)
            plot_quality(metrics, work.folder / "quality.png")
            if applied is not None and (card := applied.path / "README.md").is_file():
                atomic_write(work.folder / "README.md", with_quality(card.read_text("utf-8"), metrics).encode())
            work.finish({"metric": metrics["dense"]["metric"], "rows": len(metrics["rows"])})
    return _result(run, config, metrics, work.reason is None)


def _fractions(config: EvalConfig, applied: Artifact | None) -> list[float]:
    own = None if applied is None else applied.config.get("fraction")
    if config.fractions is None:
        return [float(own) if own else 0.2]
    return list(dict.fromkeys(config.fractions))


def _selections(config: EvalConfig, routers: dict[str, Artifact]) -> list[str]:
    always = [name for name, selection in SELECTIONS.items() if selection.always]
    if config.selection is None:
        return [*(name for name, selection in SELECTIONS.items() if selection.default), *routers]
    asked, known = config.selection, [*SELECTIONS, *routers]
    if asked == ("all",):
        return known
    for name in asked:
        if name not in known:
            hint = did_you_mean(name, known, f"there are all, {', '.join(sorted(known))}")
            raise ConfigError(f"--selection {name}: no such selection or trained router", hint)
    return list(dict.fromkeys([*always, *asked]))


def _result(run: RunDir, config: EvalConfig, metrics: dict[str, Any], up_to_date: bool) -> Result:
    table: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, part in by_data(metrics).items():
        dense, label = part["dense"], {"data": name} if name else {}
        head = {"selection": "dense", "fraction": 1.0, "value": dense["value"], "relative": 1.0, "speedup": 1.0}
        table += [label | head, *(label | {key: row[key] for key in _TABLE} for row in part["rows"])]
        of = f"{name}: " if name else ""
        beside = "KL and agreement are to the dense model"
        if dense["metric"] in ("cosine", "spearman"):
            beside = "in place of a KL, kl is 1 - cosine to the dense model's embeddings"
        notes.append(f"{of}value is {dense['metric']}; {beside}; all rows on {part['examples']} examples")
        notes.append(legend([row["selection"] for row in part["rows"]]))
        said = [lost_to(baseline, row) for row in part["rows"] for baseline in BASELINES]
        notes += [of + sentence for sentence in said if sentence is not None]
        ratios = [row["kl_over_float"] for row in part["rows"] if row.get("kl_over_float") is not None]
        notes += [f"{of}int8 weights: KL to dense is {ratio:.3f}x that of RUN/model in float" for ratio in ratios]
    path = run.path(f"eval/{config.name}")
    notes.append(f"plot: {path / 'quality.png'}   numbers: {path / 'metrics.json'}")
    payload = {key: value for key, value in metrics.items() if key != "rows"} | {"table": table}
    payload["metrics_path"] = str(path / "metrics.json")
    return Result("eval", table, payload | {"rows": metrics["rows"]}, up_to_date=up_to_date, notes=notes)
