"""The commands that look after runs which exist: report, status, verify, clean, runs, config."""

import time

import typer

from moefication_cli.cli.commands import run_command
from moefication_cli.cli.options import Sources, register
from moefication_cli.config import (
    CleanConfig,
    ControlConfig,
    ReportConfig,
    StatusConfig,
)
from moefication_cli.errors import ConfigError

_WATCH_SECONDS = 3.0  # between two looks of `status --watch`
_STAGES_ONLY = ("device", "seed", "layers", "force", "trust_remote_code")
_READS = (*_STAGES_ONLY, "dry_run")


def _report(runs: list[str], config: ReportConfig, control: ControlConfig, sources: Sources) -> None:
    """Write one HTML page about a run, or several side by side: quality, speed, layers, experts, provenance."""
    from moefication_cli.stages.report import report
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: report([RunDir(run) for run in runs], config, c))


def _status(run: str, config: StatusConfig, control: ControlConfig, sources: Sources) -> None:
    """Say of every stage of a run whether it is up to date, why not, and which command mends it."""
    from moefication_cli.stages.status import status
    from moefication_cli.store.rundir import RunDir

    if config.watch and (control.json or config.exit_code):
        raise ConfigError("--watch is for people: it goes with neither --json nor --exit-code")
    while True:
        if config.watch:
            typer.echo("\x1b[2J\x1b[H", nl=False)  # clears the screen; left out where it is none
        run_command(control, sources, lambda c: status(RunDir(run), config, c))
        if not config.watch:
            return
        time.sleep(_WATCH_SECONDS)


def _verify(target: str, control: ControlConfig, sources: Sources) -> None:
    """Read every byte of a run or of a converted model; name each damaged file and the command that makes it anew."""
    from moefication_cli.stages.verify import verify

    run_command(control, sources, lambda c: verify(target, c))


def _clean(run: str, stage: str, config: CleanConfig, control: ControlConfig, sources: Sources) -> None:
    """Delete a stage, what interrupted work has left, or what `tune` keeps; --dry-run only lists it."""
    from moefication_cli.stages.clean import clean
    from moefication_cli.store.rundir import RunDir

    run_command(control, sources, lambda c: clean(RunDir(run), stage, config, c))


def _runs(folder: str, control: ControlConfig, sources: Sources) -> None:
    """List the runs below a folder: model, method, fraction, quality and state."""
    from moefication_cli.stages.status import list_runs

    run_command(control, sources, lambda c: list_runs(folder))


def _config(target: str, control: ControlConfig, sources: Sources) -> None:
    """Show the options a run was made with, or those of a command, as a file that --config reads."""
    from moefication_cli.stages.show_config import show_config

    run_command(control, sources, lambda c: show_config(target))


def add_commands(app: typer.Typer) -> None:
    """Register them, after those that make runs."""
    register(
        app,
        "report",
        [ReportConfig],
        _report,
        argument="runs",
        argument_help="One run directory or several",
        many=True,
        without=("layers", "dry_run"),
    )
    register(app, "status", [StatusConfig], _status, without=_READS)
    register(
        app,
        "verify",
        [],
        _verify,
        argument="run_or_model",
        argument_help="Run directory, or a folder that apply wrote",
        without=_READS,
    )
    register(
        app,
        "clean",
        [CleanConfig],
        _clean,
        second=("stage", "Stage to delete, e.g. split or router/mlp"),
        without=_STAGES_ONLY,
    )
    register(
        app,
        "runs",
        [],
        _runs,
        argument="folder",
        argument_help="Folder with run directories below it",
        argument_default="artifacts",
        without=_READS,
    )
    register(
        app,
        "config",
        [],
        _config,
        argument="run_or_command",
        argument_help="Run directory, or the name of a command",
        without=_READS,
    )
