"""run: all stages in order, skipping what is up to date."""

from dataclasses import replace

from moefication_cli.config import (
    ApplyConfig,
    CollectConfig,
    EvalConfig,
    GraphConfig,
    RouterConfig,
    RunConfig,
    SplitConfig,
)
from moefication_cli.conversion.search import default_steps
from moefication_cli.errors import ConfigError
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.inputs import open_model
from moefication_cli.runs.ranks import Ranks
from moefication_cli.stages.apply_experts import apply_experts
from moefication_cli.stages.build_graph import build_graph
from moefication_cli.stages.collect_activations import collect_activations
from moefication_cli.stages.evaluate import evaluate as evaluate_stage
from moefication_cli.stages.split_neurons import split_neurons
from moefication_cli.stages.train_router import train_router
from moefication_cli.store.rundir import RunDir


def run_all(
    run: RunDir,
    extra: RunConfig,
    collect: CollectConfig,
    split: SplitConfig,
    router: RouterConfig,
    apply: ApplyConfig,
    evaluate: EvalConfig,
    control: Control,
) -> Result:
    """collect-activations, (build-graph), split, train-router, apply and, with --eval-data, eval.

    Ranks share all but the last two.
    """
    if collect.data is None and run.manifest("activations") is None:
        raise ConfigError("run needs data to calibrate on", "name it with --data")
    if extra.recipe == "paper":
        split = replace(split, method="kmeans", expert_size=32, num_experts=None, shared_fraction=0.0)
        router = replace(router, router="mlp", recipe="paper")
    done: list[Result] = []
    collect = _remembered(run, collect, control)
    done.append(collect_activations(run, collect, control))
    if split.method == "graph":
        done.append(build_graph(run, GraphConfig(), control))
    done.append(split_neurons(run, split, control))
    done.append(train_router(run, router, control))
    if control.ranks.rank > 0:
        return _last(done)  # the rest is not shared over ranks
    control = replace(control, ranks=Ranks())
    apply = replace(apply, router=apply.router or router.router)
    if apply.refine is None:
        apply = replace(apply, refine=default_steps(run, open_model(run, None, control), apply, control) or None)
    done.append(apply_experts(run, apply, control))
    if extra.eval_data is None:
        control.say("no --eval-data: nothing was measured; moefication eval RUN --data ... does it")
        return _last(done)
    fractions = tuple(dict.fromkeys((*(evaluate.fractions or ()), apply.fraction)))
    baselines = ("groundtruth", "neuron", "random", "static", "paper")
    selection = evaluate.selection or (*baselines, str(apply.router))
    config = replace(
        evaluate,
        data=extra.eval_data,
        split=extra.eval_split,
        limit=extra.eval_limit,
        fractions=fractions,
        selection=selection,
        fraction_of=apply.fraction_of,
    )
    done.append(evaluate_stage(run, config, control))
    return _last(done)


def _remembered(run: RunDir, collect: CollectConfig, control: Control) -> CollectConfig:
    """A re-run without --data calibrates on the data of last time."""
    if collect.data is not None:
        return collect
    made = run.read_stage("activations").config
    control.say(f"calibration data as before: {made['data']}")
    return replace(collect, data=made["data"], split=made["split"], header=made["header"], documents=made["documents"])


def _last(done: list[Result]) -> Result:
    """The last stage's table; every stage's payload under `stages`."""
    last = done[-1]
    stages = {result.command: {"up_to_date": result.up_to_date, **result.payload} for result in done}
    return replace(
        last, command="run", payload=last.payload | {"stages": stages}, up_to_date=all(r.up_to_date for r in done)
    )
