"""run: all stages in order, skipping what is up to date; and the same as a function, `convert`."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moefication_cli.config import (
    ApplyConfig,
    CollectConfig,
    ControlConfig,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    GraphConfig,
    RouterConfig,
    RunConfig,
    SplitConfig,
    options_of,
    same_option,
)
from moefication_cli.config.option import distribute, offered_options
from moefication_cli.conversion.search import default_steps
from moefication_cli.errors import ConfigError, did_you_mean
from moefication_cli.export.gguf_shape import suitable_size
from moefication_cli.export.write import check_source
from moefication_cli.models.heads import checked_task
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import (
    apply_cost,
    calibration_tokens,
    collect_cost,
    eval_cost,
    finetune_cost,
    graph_cost,
    num_experts,
    router_cost,
    split_cost,
)
from moefication_cli.runs.data import check_evaluation_data
from moefication_cli.runs.estimate import dry_run_of, figures
from moefication_cli.runs.inputs import RunModel, open_model
from moefication_cli.runs.ranks import Ranks
from moefication_cli.split.methods import expert_counts
from moefication_cli.stages.apply_experts import apply_experts
from moefication_cli.stages.build_graph import build_graph
from moefication_cli.stages.collect_activations import collect_activations
from moefication_cli.stages.evaluate import evaluate as evaluate_stage
from moefication_cli.stages.finetune import finetune
from moefication_cli.stages.outcomes import told
from moefication_cli.stages.recipe import Recipe, check_digests, print_recipe, read_recipe, said_options
from moefication_cli.stages.split_neurons import split_neurons
from moefication_cli.stages.train_router import train_router
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write, make_dirs
from moefication_cli.store.rundir import RunDir

_MEASURED = ("groundtruth", "neuron", "random", "static", "paper", "teal", "cmoe")  # besides the router
CONFIGS = (RunConfig, CollectConfig, EvalConfig, SplitConfig, RouterConfig, ApplyConfig)


@dataclass(frozen=True)
class Pipeline:
    """The options of `run`: its own and those of its stages, in the order of CONFIGS."""

    extra: RunConfig
    collect: CollectConfig
    evaluate: EvalConfig
    split: SplitConfig
    router: RouterConfig
    apply: ApplyConfig
    graph: GraphConfig = GraphConfig()
    tuning: FinetuneConfig | None = None
    recipe: Recipe | None = None  # where the options come from that nobody said

    def training(self) -> FinetuneConfig | None:
        """How the converted model is fine-tuned: as the recipe says, or for the steps of `--finetune`."""
        if self.recipe is None and self.extra.finetune:
            return self.tuning or FinetuneConfig(steps=self.extra.finetune, train=self.extra.train)
        return self.tuning

    def evaluation(self, router: str | None) -> EvalConfig:
        """What is evaluated: this router and every baseline, at the fraction of `apply` and those asked for.

        A recipe that says what to evaluate means just that.
        """
        extra = self.extra
        made = replace(self.evaluate, data=extra.eval_data, split=extra.eval_split, limit=extra.eval_limit)
        if self.recipe is not None and "eval" in self.recipe.tables:
            return made
        return replace(
            made,
            fractions=tuple(dict.fromkeys((*(self.evaluate.fractions or ()), self.apply.fraction))),
            selection=self.evaluate.selection or (*_MEASURED, str(router)),
            fraction_of=self.apply.fraction_of,
        )

    def replayed(self, control: Control) -> "Pipeline":
        """With the options of `--recipe FILE` wherever nobody said another. Raises ConfigError."""
        recipe, extra = read_recipe(self.extra.recipe), self.extra
        said, table = said_options(control, RunConfig), recipe.tables.get("eval", {})
        for own, name in {"eval_data": "data", "eval_split": "split", "eval_limit": "limit"}.items():
            if own not in said and table.get(name) is not None:
                extra = replace(extra, **{own: table[name]})
        tuning = FinetuneConfig(steps=extra.finetune, train=extra.train) if extra.finetune else None
        if "finetune" in recipe.tables and extra.finetune != 0:
            tuning = recipe.config("finetune", FinetuneConfig(), control)
            tuning = replace(tuning, steps=extra.finetune or tuning.steps)
            tuning = replace(tuning, train=extra.train if "train" in said else tuning.train)
        return Pipeline(
            replace(extra, recipe="default"),
            recipe.config("collect-activations", self.collect, control),
            recipe.config("eval", self.evaluate, control),
            recipe.config("split", self.split, control),
            recipe.config("train-router", self.router, control),
            recipe.config("apply", self.apply, control),
            recipe.config("build-graph", self.graph, control),
            tuning,
            recipe,
        )

    def control_of(self, command: str, control: Control) -> Control:
        """The control of one stage: its seed may be the recipe's."""
        return control if self.recipe is None else self.recipe.control(command, control)


def convert(
    model: Any,
    *,
    out: str | Path,
    data: str | Path | None = None,
    texts: Iterable[str] | None = None,
    tokenizer: Any = None,
    control: Control | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Result:
    """What `moefication run` does, as a function: RUN/model is where `.path` of the result says.

        made = convert("MODEL", data="calibration.txt", fraction=0.2, out="RUN")
        made = convert(model, tokenizer=tokenizer, texts=["...", "..."], fraction=0.2, out="RUN")

    `model` is a hub id, a folder or a model of transformers in memory, which is then saved to OUT/source with its
    tokenizer; `texts` are saved beside it and take the place of `data`. `options` are the options of `run` by name
    (`expert_size=4`, `eval_data="test.tsv"`), `control` has the device, the seed and how progress is shown. Calling it
    again does only what is out of date.

    Raises ConfigError for unknown options and bad values, and what the stages raise.
    """
    unknown = sorted(options.keys() - offered_options(CONFIGS).keys())
    if unknown:
        raise ConfigError(f"convert has no option {unknown[0]!r}", did_you_mean(unknown[0], offered_options(CONFIGS)))
    run, source = RunDir(out), Path(out) / "source"
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer", "pass tokenizer=...")
        make_dirs(source)
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        model = source
    if texts is not None:
        if data is not None:
            raise ConfigError("data and texts exclude each other", "pass one of them")
        make_dirs(source)
        data = source / "texts.jsonl"
        atomic_write(data, b"".join(jsonio.canonical({"text": text}) + b"\n" for text in texts))
    values = {**options, "model": str(model), "data": None if data is None else str(data)}
    control = control or Control()
    said: dict[type, dict[str, str]] = {ControlConfig: {"seed": "argument"} if control.seed else {}}
    for config in CONFIGS:
        own = [e.name for e in options_of(config) if same_option(e, offered_options(CONFIGS)[e.name])]
        said[config] = {name: "argument" for name in own if values.get(name) is not None}
    trust = trust_remote_code or control.trust_remote_code
    control = replace(control, sources=said | control.sources, trust_remote_code=trust)
    return run_stages(run, Pipeline(*distribute(values, CONFIGS)), control)


def run_stages(run: RunDir, asked: Pipeline, control: Control) -> Result:
    """collect-activations, (build-graph), split, train-router, (finetune), apply and, with --eval-data, eval.

    Ranks share all but the last two.
    """
    if asked.extra.print_recipe:
        return print_recipe(run)
    if asked.extra.recipe_is_file:
        asked = asked.replayed(control)
    if asked.collect.data is None and run.manifest("activations") is None:
        raise ConfigError("run needs data to calibrate on", "name it with --data")
    extra, collect, split, router, apply = asked.extra, asked.collect, asked.split, asked.router, asked.apply
    if extra.recipe == "paper":
        split = replace(split, method="kmeans", expert_size=32, num_experts=None, shared_fraction=0.0)
        router = replace(router, router="mlp", recipe="paper")
    if apply.host is not None:
        router = replace(router, router="native")
        split = _hosted_split(apply, split, open_model(run, collect, control), control)
    if asked.recipe is not None:
        check_digests(asked.recipe, run, collect, asked.evaluation(apply.router), control)
    if extra.eval_data is not None:  # now, and not when everything else is done
        check_evaluation_data(run, open_model(run, collect, control), asked.evaluation(apply.router), control)
    if control.dry_run:
        return estimate_stages(run, replace(asked, split=split, router=router), control)
    done: list[Result] = []
    collect = _remembered(run, collect, control)
    of = asked.control_of
    done.append(told(control, lambda: collect_activations(run, collect, of("collect-activations", control))))
    if split.method == "graph":
        done.append(told(control, lambda: build_graph(run, asked.graph, of("build-graph", control))))
    done.append(told(control, lambda: split_neurons(run, split, of("split", control))))
    done.append(told(control, lambda: train_router(run, router, of("train-router", control))))
    if control.ranks.rank > 0:
        return _last(done)  # the rest is not shared over ranks
    control = replace(control, ranks=Ranks())
    apply = replace(apply, router=apply.router or router.router)
    if apply.refine is None:
        sequences = run.read_stage("activations").metrics["layers"][0]["sequences"]
        apply = replace(apply, refine=default_steps(open_model(run, None, control), apply, sequences, control) or None)
    tuning = asked.training()
    if tuning is not None:
        done.append(told(control, lambda: finetune(run, tuning, of("finetune", control), conversion=apply)))
        apply = replace(apply, finetuned=tuning.name if done[-1].payload.get("kept") else None)
    done.append(told(control, lambda: apply_experts(run, apply, of("apply", control))))
    if extra.eval_data is None:
        control.say("no --eval-data: nothing was measured; moefication eval RUN --data ... does it")
        return _last(done)
    done.append(told(control, lambda: evaluate_stage(run, asked.evaluation(apply.router), of("eval", control))))
    return _last(done)


def _hosted_split(apply: ApplyConfig, split: SplitConfig, model: RunModel, control: Control) -> SplitConfig:
    """The split with the expert size that `--for` wants. Raises ConfigError, before any work, where the format cannot hold the model."""
    assert apply.host is not None
    sized = split.num_experts is not None or split.expert_size is not None
    if apply.host == "gguf" and not sized:
        split = replace(split, expert_size=suitable_size([site.num_neurons for site in model.sites], apply.fraction))
    if split.from_partition is None:
        counts = [expert_counts(site.num_neurons, split, model.device.type) for site in model.sites]
        check_source(apply.host, model.checkpoint.config.to_dict(), model.sites, counts)
    if apply.host == "gguf" and not sized:
        control.say(f"experts of {split.expert_size} neurons, which suit llama.cpp; --expert-size takes others")
    return split


def estimate_stages(run: RunDir, asked: Pipeline, control: Control) -> Result:
    """The dry run of `run_stages`: one row per stage, whatever is up to date included, and their sum. Writes nothing."""
    collect, split, router, apply = asked.collect, asked.split, asked.router, asked.apply
    model = open_model(run, collect, control)
    checked_task(model.checkpoint.config, collect.task or run.info.task, model.checkpoint.source.ref)
    tokens, experts = calibration_tokens(collect), num_experts(model, split)
    apply = replace(apply, router=apply.router or router.router)
    if apply.refine is None:
        apply = replace(apply, refine=default_steps(model, apply, None, control) or None)
    costs = {"activations": collect_cost(model, collect)}
    if split.method == "graph":
        costs["graph"] = graph_cost(model, asked.graph, tokens)
    costs |= {
        "split": split_cost(model, split),
        f"router/{router.router}": router_cost(model, router, tokens, experts),
    }
    if (tuning := asked.training()) is not None:
        costs[f"finetuned/{tuning.name}"] = finetune_cost(model, tuning)
    costs["model"] = apply_cost(model, apply, activations=True)
    if asked.extra.eval_data is not None:
        config = asked.evaluation(apply.router)
        measured = len(config.selection or ()) * len(config.fractions or ())
        costs[f"eval/{config.name}"] = eval_cost(model, config.data, config.limit, measured)
    rows = [
        {"stage": name.partition("/")[0], "writes": str(run.path(name)), **figures(model, cost)}
        for name, cost in costs.items()
    ]
    return dry_run_of(rows, "run", model)


def _remembered(run: RunDir, collect: CollectConfig, control: Control) -> CollectConfig:
    """A re-run without --data calibrates on the data of last time."""
    if collect.data is not None:
        return collect
    made = CollectConfig.recorded(run.read_stage("activations").config)
    control.say(f"calibration data as before: {made.data}")
    return replace(collect, **{f.name: getattr(made, f.name) for f in fields(DataConfig) if f.name != "limit"})


def _last(done: list[Result]) -> Result:
    """The last stage's table; every stage's payload under `stages`."""
    last = done[-1]
    stages = {result.command: {"up_to_date": result.up_to_date, **result.payload} for result in done}
    paths = [stage["path"] for stage in stages.values() if "path" in stage]
    path = {"path": paths[0]} if paths else {}
    return replace(
        last,
        command="run",
        payload=last.payload | {"stages": stages, **path},
        up_to_date=all(r.up_to_date for r in done),
    )
