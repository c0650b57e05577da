"""eval: quality and time of the MoE beside the dense model, oracles and baselines, all in one pass over the data.

Every batch goes through the stock dense model and then, in turn, through every row's layers, so that all rows see the
same examples and share the machine's good and bad moments.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moefication_cli.config import ApplyConfig, EvalConfig, options_of
from moefication_cli.conversion.plan import routed_layers
from moefication_cli.conversion.plan_files import read_plans
from moefication_cli.conversion.search import make_plans
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.baselines import paper_variant, static_variant
from moefication_cli.evaluation.plots import plot_quality
from moefication_cli.evaluation.rows import compare_with, lost_to, row_of
from moefication_cli.evaluation.selections import (
    NeuronOracleFFN,
    Variant,
    count_selections,
    routed_variant,
    selected_variant,
)
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.surgery import install, live_weights, permute_in_place
from moefication_cli.runs.control import Control, Result, parse_fractions
from moefication_cli.runs.data import load_whole, open_examples
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import RunModel, begin_options, open_model
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.examples import Batch, Examples, Scores, Summary, compare, summarise

BASELINES = ("static", "paper")  # what a router must beat
ALWAYS = ("groundtruth", "random", "static")
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


def evaluate(run: RunDir, config: EvalConfig, control: Control) -> Result:
    """Measure every selection at every fraction; writes RUN/eval/<name>/metrics.json and quality.png.

    Raises ConfigError (no data, unknown selection), MissingArtifactError, StaleArtifactError.
    """
    model = open_model(run, None, control)
    split = run.require("split")
    routers = {name: run.require(f"router/{name}") for name in run.names("router")}
    applied = run.require("model") if run.manifest("model") is not None else None
    fractions = _fractions(config, applied)
    selections = _selections(config, routers)
    activations = run.require("activations") if {"static", "paper"} & set(selections) else None
    stages = {"split": split, "activations": activations, "model": applied}
    if control.dry_run:
        parameters = float(model.checkpoint.describe()["parameters"])
        passes = 1 + len(fractions) * len(selections)
        return estimate(
            "eval",
            run,
            model,
            writes=run.path(f"eval/{config.name}"),
            num_bytes=1e5,
            flops=2 * parameters * passes * 128 * (config.limit or 1000),
            memory=8 * parameters,
            reads=stages,
        )
    used = {f"router/{name}": stage for name, stage in routers.items() if name in selections}
    options = begin_options(config, control, model, {**stages, **used})
    with run.begin(f"eval/{config.name}", **options) as work:
        if work.up_to_date:
            metrics = jsonio.read_object(run.path(f"eval/{config.name}") / "metrics.json")
        else:
            metrics = _measure(run, model, split, routers, applied, activations, selections, fractions, config, control)
            jsonio.write(work.folder / "metrics.json", metrics)
            plot_quality(metrics, work.folder / "quality.png")
            work.finish({"metric": metrics["dense"]["metric"], "rows": len(metrics["rows"])})
    return _result(run, config, metrics, work.reason is None)


def _fractions(config: EvalConfig, applied: Artifact | None) -> list[float]:
    own = None if applied is None else applied.config.get("fraction")
    if config.fractions is None:
        return [float(own) if own else 0.2]
    return parse_fractions(config.fractions)


def _selections(config: EvalConfig, routers: dict[str, Artifact]) -> list[str]:
    if config.selection is None:
        return [*ALWAYS, "neuron", *routers]
    asked = [name.strip() for name in config.selection.split(",") if name.strip()]
    known = {*ALWAYS, "neuron", "paper", *routers}
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"--selection {name}: no such selection or trained router", f"there are {', '.join(sorted(known))}"
            )
    return list(dict.fromkeys([*ALWAYS, *asked]))


def _measure(
    run: RunDir,
    model: RunModel,
    split: Artifact,
    routers: dict[str, Artifact],
    applied: Artifact | None,
    activations: Artifact | None,
    selections: list[str],
    fractions: list[float],
    config: EvalConfig,
    control: Control,
) -> dict[str, Any]:
    dense, converted = (load_whole(run, model, config.task, config.dtype) for _ in range(2))
    examples = open_examples(run, dense, config, control)
    variants = _variants(
        run, model, converted, split, routers, applied, activations, selections, fractions, config, control
    )
    mask = TokenMask(converted.model)
    summary, seconds, tokens = _run_all(dense, converted, model, examples, variants, mask, config, control)
    reference = {
        "metric": summary.metric,
        "value": summary.value,
        "stderr": summary.stderr,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    sizes = _dense_macs(model, variants)
    scores = [Scores.join(variant.measured) for variant in variants]
    rows = [
        row_of(variant, found, reference, tokens, sizes, control.seed)
        for variant, found in zip(variants, scores, strict=True)
    ]
    for baseline in BASELINES:
        compare_with(baseline, variants, scores, rows, control.seed)
    return {
        "schema": "moefication/metrics@1",
        "model": str(model.checkpoint.source.ref),
        "data": config.data,
        "examples": summary.num_examples,
        "tokens": tokens,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "dense": reference,
        "rows": rows,
    }


def _variants(
    run: RunDir,
    model: RunModel,
    converted: LoadedModel,
    split: Artifact,
    routers: dict[str, Artifact],
    applied: Artifact | None,
    activations: Artifact | None,
    selections: list[str],
    fractions: list[float],
    config: EvalConfig,
    control: Control,
) -> list[Variant]:
    """All rows, on one model whose neurons stand in the order of the split."""
    net = converted.model
    tokens = None if activations is None else [layer["tokens"] for layer in activations.metrics["layers"]]
    routed = {name: routed_layers(model, split, stage, tokens) for name, stage in routers.items()}
    if not routed:
        raise ConfigError(f"{run.root}: no router is trained", f"moefication train-router {run.root}")
    like = ApplyConfig(router=next(iter(routed)), fraction=0.0)
    if applied is not None:
        known = {entry.name for entry in options_of(ApplyConfig)} & set(applied.config)  # another version has others
        like = ApplyConfig(**{name: applied.config[name] for name in known})
    layers = routed[str(like.router)]
    for layer in layers:
        permute_in_place(net, layer.site, layer.partition.order_F())
    score = layers[0].score

    def router_row(name: str, fraction: float) -> Variant:
        """What `apply` with the options of last time would make of this router at this fraction."""
        made = replace(like, router=name, fraction=fraction, fraction_of=config.fraction_of, top_k=None)
        if made == like:
            assert applied is not None
            plans = read_plans(applied.path, routed[name], model.device)
        else:
            inputs = {"split": split, f"router/{name}": routers[name], "activations": activations}
            plans = make_plans(run, model, routed[name], inputs, made, control)
        return routed_variant(name, net, plans, fraction, config.backend, applied=made == like)

    variants: list[Variant] = []
    for fraction in fractions:
        for name in selections:
            if name in ("groundtruth", "random"):
                seeds = range(control.seed, control.seed + (config.seeds if name == "random" else 1))
                for seed in seeds:
                    variants.append(selected_variant(name, net, layers, fraction, score, seed, config.backend))
            elif name == "neuron":
                oracles: list[Any] = []
                for site in model.sites:
                    oracles.append(NeuronOracleFFN(live_weights(net, site), max(1, round(fraction * site.num_neurons))))
                meta = {"score": "contribution", "rule": "top_k"}
                variants.append(Variant("neuron", "oracle", fraction, oracles, meta=meta))
            elif name == "static":
                assert activations is not None
                variants.append(static_variant(run, model, activations, fraction, control))
            elif name == "paper":
                variants.append(paper_variant(run, model, fraction, config, control))
            else:
                variants.append(router_row(name, fraction))
    if applied is not None and not any(variant.applied for variant in variants):
        plans = read_plans(applied.path, layers, model.device)
        variants.append(routed_variant(str(like.router), net, plans, like.fraction, config.backend, applied=True))
    return variants


def _dense_macs(model: RunModel, variants: Sequence[Variant]) -> list[float]:
    """Each FFN's part of the dense work: an encoder-decoder's layers see different numbers of tokens."""
    chance = next(variant for variant in variants if variant.selection == "random")
    counted = [layer.num_counted for layer in chance.layers if isinstance(layer, MoEFFN)]
    return [float(site.num_parameters * count) for site, count in zip(model.sites, counted, strict=True)]


@torch.inference_mode()
def _run_all(
    dense: LoadedModel,
    converted: LoadedModel,
    model: RunModel,
    examples: Examples,
    variants: Sequence[Variant],
    mask: TokenMask,
    config: EvalConfig,
    control: Control,
) -> tuple[Summary, float, int]:
    """One pass over the data. Returns the dense model's summary, its seconds and the number of real tokens."""
    reference: list[Scores] = []
    seconds, tokens, warm = 0.0, 0, False
    batches: Iterable[Batch] = examples.batches(config.batch_size)
    for batch in control.track(batches, "eval"):
        inputs = batch.to(dense.device).inputs
        if not warm:  # compilation and first-touch costs are nobody's speed
            dense.model(**inputs)
            for variant in variants:
                _install(converted, model, variant, mask)
                converted.model(**inputs)
                count_selections(variant)
            warm = True
        logits, spent = _timed(dense, inputs)
        seconds += spent
        tokens += batch.num_tokens
        reference.append(examples.score(logits, batch))
        for variant in variants:
            _install(converted, model, variant, mask)
            other, spent = _timed(converted, inputs)
            variant.seconds += spent
            variant.measured.append(compare(examples, logits, other, batch))
    return summarise(examples.metric, reference), seconds, tokens


def _install(converted: LoadedModel, model: RunModel, variant: Variant, mask: TokenMask) -> None:
    for site, layer in zip(model.sites, variant.layers, strict=True):
        install(converted.model, site, layer, mask)


def _timed(loaded: LoadedModel, inputs: dict[str, Any]) -> tuple[Any, float]:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    logits = loaded.model(**inputs).logits
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return logits, time.perf_counter() - started


def _result(run: RunDir, config: EvalConfig, metrics: dict[str, Any], up_to_date: bool) -> Result:
    dense = metrics["dense"]
    head = {"selection": "dense", "fraction": 1.0, "value": dense["value"], "relative": 1.0, "speedup": 1.0}
    table = [head, *({name: row[name] for name in _TABLE} for row in metrics["rows"])]
    path = run.path(f"eval/{config.name}")
    notes = [
        f"value is {dense['metric']}; KL and agreement are to the dense model; all rows on {metrics['examples']} examples"
    ]
    said = [lost_to(baseline, row) for row in metrics["rows"] for baseline in BASELINES]
    notes += [sentence for sentence in said if sentence is not None]
    notes.append(f"plot: {path / 'quality.png'}   numbers: {path / 'metrics.json'}")
    payload = {key: value for key, value in metrics.items() if key != "rows"} | {"table": table}
    payload["metrics_path"] = str(path / "metrics.json")
    return Result("eval", table, payload | {"rows": metrics["rows"]}, up_to_date=up_to_date, notes=notes)
