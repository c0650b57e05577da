"""The commands: each builds its config, calls one stage function (torch is imported only then) and prints the result."""

import shlex
from collections.abc import Callable
from contextlib import nullcontext

import typer

from moefication_cli import __version__
from moefication_cli.cli.console import Console
from moefication_cli.cli.early_end import early_end_asked
from moefication_cli.cli.guide import GUIDE
from moefication_cli.cli.options import Sources, check_tables, read_config, register
from moefication_cli.config import (
    ApplyConfig,
    BenchConfig,
    CollectConfig,
    ControlConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    GraphConfig,
    ModelConfig,
    RelufyConfig,
    RouterConfig,
    RunConfig,
    SplitConfig,
    TuneConfig,
)
from moefication_cli.runs.control import Control, Result, stopping
from moefication_cli.runs.ranks import Ranks, local_device, open_ranks, rank_and_size

app = typer.Typer(
    name="moefication",
    help="Turn the feed-forward layers of trained transformers into mixtures of experts (arXiv 2110.01786).",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moefication {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: str | None = typer.Option(None, "--config", help="TOML file with defaults, one table per command"),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version"),
) -> None:
    """Stages share one run directory; every stage can be re-run alone."""
    if config is not None:
        tables = read_config(config)
        check_tables(tables, context, config)
        context.default_map = dict(tables)


def run_command(
    control: ControlConfig,
    sources: Sources,
    call: Callable[[Control], Result],
    *,
    shared: bool = False,
    by_layer: bool = False,
    target: str = "",
) -> None:
    """Everything a command does around its stage: console, progress, result; under torchrun, the ranks.

    With the run directory (or the model) as `target` it ends with the command that usually follows.
    What is not `shared` is done by rank 0 alone, which is also the only one that prints results.
    """
    rank, size = rank_and_size()
    console = Console(json_mode=control.json, quiet=control.quiet or rank > 0, progress=control.progress)
    if rank > 0 and not shared:
        return
    if control.layers is not None and not by_layer:
        console.say("warning: --layers changes nothing here: this stage does all layers in one go")
    with open_ranks() if shared else nullcontext(Ranks()) as ranks:
        if size > 1 and not shared:
            console.say("this command is not shared over ranks: rank 0 does it alone")
        result = call(
            Control(
                device=local_device(control.device, size),
                seed=control.seed,
                layers=control.layers,
                force=control.force,
                dry_run=control.dry_run,
                trust_remote_code=control.trust_remote_code,
                sources=sources,
                say=console.say,
                track=stopping(console.track, early_end_asked),
                stop=early_end_asked,
                ranks=ranks,
            )
        )
        if rank == 0:
            console.result(result)
            then = GUIDE[result.command].then if target and result.payload.get("complete", True) else ""
            if then and not (control.json or control.dry_run or result.exit_code):
                console.say(f"next: moefication {then.format(shlex.quote(target))}")
        if result.exit_code:
            raise typer.Exit(result.exit_code)


def _collect(run: str, config: CollectConfig, control: ControlConfig, sources: Sources) -> None:
    """Run the model over data; store every FFN's inputs and its neurons' statistics."""
    from moefication_cli.stages.collect_activations import collect_activations
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: collect_activations(RunDir(run), config, c), target=run, shared=True)


def _graph(run: str, config: GraphConfig, control: ControlConfig, sources: Sources) -> None:
    """Build the co-activation graph of every FFN from the collected inputs."""
    from moefication_cli.stages.build_graph import build_graph
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: build_graph(RunDir(run), config, c), target=run, shared=True, by_layer=True)


def _split(run: str, config: SplitConfig, control: ControlConfig, sources: Sources) -> None:
    """Assign every FFN neuron to an expert; experts are always exactly balanced."""
    from moefication_cli.stages.split_neurons import split_neurons
    from moefication_cli.store.rundir import RunDir

    run_command(
        control, sources, lambda c: split_neurons(RunDir(run), config, c), target=run, shared=True, by_layer=True
    )


def _router(run: str, config: RouterConfig, control: ControlConfig, sources: Sources) -> None:
    """Train the routers that pick the experts each token needs."""
    from moefication_cli.stages.train_router import train_router
    from moefication_cli.store.rundir import RunDir

    run_command(
        control, sources, lambda c: train_router(RunDir(run), config, c), target=run, shared=True, by_layer=True
    )


def _apply(run: str, config: ApplyConfig, control: ControlConfig, sources: Sources) -> None:
    """Write RUN/model: a normal Hugging Face folder that loads dense with transformers and as the MoE with `load`."""
    from moefication_cli.stages.apply_experts import apply_experts
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: apply_experts(RunDir(run), config, c), target=run)


def _eval(run: str, config: EvalConfig, control: ControlConfig, sources: Sources) -> None:
    """Measure quality and time of the MoE beside the dense model, oracles and baselines."""
    from moefication_cli.stages.evaluate import evaluate
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: evaluate(RunDir(run), config, c), target=run)


def _inspect(model: str, config: ModelConfig, control: ControlConfig, sources: Sources) -> None:
    """List the FFNs found in a model, the expert counts that divide them, and their share of the parameters."""
    from moefication_cli.stages.inspect_model import inspect_model

    run_command(control, sources, lambda c: inspect_model(model, config, c), target=model)


def _pipeline(
    run: str,
    extra: RunConfig,
    collect: CollectConfig,
    evaluate: EvalConfig,
    split: SplitConfig,
    router: RouterConfig,
    apply: ApplyConfig,
    control: ControlConfig,
    sources: Sources,
) -> None:
    """All stages in order for any model, skipping what is up to date."""
    from moefication_cli.stages.convert import Pipeline, run_stages
    from moefication_cli.store.rundir import RunDir

    asked = Pipeline(extra, collect, evaluate, split, router, apply)
    run_command(control, sources, lambda c: run_stages(RunDir(run), asked, c), shared=True)


def _tune(run: str, config: TuneConfig, control: ControlConfig, sources: Sources) -> None:
    """Sweep split, expert size, router, budget and compensation; print the Pareto front of quality against cost."""
    from moefication_cli.stages.tune import tune
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: tune(RunDir(run), config, c), target=run)


def _finetune(run: str, config: FinetuneConfig, control: ControlConfig, sources: Sources) -> None:
    """Train the converted model, its selection in the loop, to do what the dense one does at the same compute."""
    from moefication_cli.stages.finetune import finetune
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: finetune(RunDir(run), config, c), target=run)


def _relufy(out: str, config: RelufyConfig, control: ControlConfig, sources: Sources) -> None:
    """Put ReLU in place of a model's activation and train it until it works again: sparse, so that `run` loses little.

    OUT becomes an ordinary Hugging Face folder; OUT/relufy.json says what was done and what it did. A killed training
    goes on at its last checkpoint.
    """
    from moefication_cli.stages.relufy import relufy

    run_command(control, sources, lambda c: relufy(out, config, c), target=out)


def _demo(run: str, config: DemoConfig, control: ControlConfig, sources: Sources) -> None:
    """Convert the demo model that ships with the package and show what is kept at which cost."""
    from moefication_cli.stages.demo import demo
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: demo(RunDir(run), config, c))


def _bench(target: str, config: BenchConfig, control: ControlConfig, sources: Sources) -> None:
    """Measure dense and MoE in turns, and how fast the MoE could be.

    An FFN needs at least max(2 x multiply-adds / P, bytes / W) at the machine's measured rates P and W; its bound is
    that of dense over that of the MoE, router and the experts that all tokens of a batch touch together counted. The
    bound of a whole model is dense / (other + (dense - other) / bound of its FFNs), `other` measured without FFNs.
    Skipping neurons whose ReLU is zero is not in it.
    """
    from moefication_cli.stages.bench import bench

    run_command(control, sources, lambda c: bench(target or None, config, c))


def _export(run: str, config: ExportConfig, control: ControlConfig, sources: Sources) -> None:
    """Write the converted model as a native MoE checkpoint (Mixtral, Qwen, Granite, GLM) that needs no package of ours."""
    from moefication_cli.stages.export import export
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: export(RunDir(run), config, c))


register(app, "collect-activations", [CollectConfig], _collect)
register(app, "build-graph", [GraphConfig], _graph)
register(app, "split", [SplitConfig], _split)
register(app, "train-router", [RouterConfig], _router)
register(app, "apply", [ApplyConfig], _apply)
register(app, "eval", [EvalConfig], _eval)
register(
    app,
    "inspect",
    [ModelConfig],
    _inspect,
    argument="model",
    argument_help="Hub id or local folder",
    without=("device", "seed", "layers", "force", "dry_run"),
)
register(
    app,
    "run",
    [RunConfig, CollectConfig, EvalConfig, SplitConfig, RouterConfig, ApplyConfig],
    _pipeline,
    without=("layers", "lm_eval", "include_path", "num_fewshot"),
)
register(app, "tune", [TuneConfig], _tune, without=("layers",))
register(app, "finetune", [FinetuneConfig], _finetune, without=("layers",))
register(
    app,
    "relufy",
    [RelufyConfig],
    _relufy,
    argument="out",
    argument_help="Folder to write the ReLU model to",
    without=("layers",),
)
register(app, "demo", [DemoConfig], _demo, argument_default="artifacts/demo-run", without=("layers",))
register(
    app,
    "bench",
    [BenchConfig],
    _bench,
    argument="model_or_run",
    argument_help="Hub id, local folder or run directory with a converted model; none with --shape",
    argument_default="",
    without=("layers", "force"),
)
register(app, "export", [ExportConfig], _export, without=("layers", "dry_run"))
