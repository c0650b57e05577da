"""What the shell offers for arguments: run directories, stages, commands. Imports no torch: it answers at every TAB."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moefication_cli.cli.guide import GUIDE

Complete = Callable[..., list[str]]  # of the context and the beginning of the word; typer goes by these names
_MOST = 200  # names that are offered


def run_directories(ctx: Any, incomplete: str) -> list[str]:
    """Run directories whose path begins so, here or one folder below; where none does the shell offers its own files."""
    parent, _, start = incomplete.rpartition("/")
    base = Path(f"{parent}/") if "/" in incomplete else Path()
    found = []
    try:
        for folder in sorted(p for p in base.iterdir() if p.name.startswith(start) and p.is_dir()):
            inside = [folder] if (folder / "run.json").is_file() else sorted(folder.iterdir())
            found += [str(p) for p in inside if (p / "run.json").is_file()]
    except OSError:  # no such folder, or none that may be read
        return []
    return found[:_MOST]


def stages(ctx: Any, incomplete: str) -> list[str]:
    """The stages of the run directory that the words before name."""
    from moefication_cli.store.artifact import stages_in

    run = ctx.params.get("run")
    return [stage for stage in stages_in(Path(run)) if stage.startswith(incomplete)] if run else []


def runs_and_commands(ctx: Any, incomplete: str) -> list[str]:
    """For `config`: a run directory or the name of a command."""
    return run_directories(ctx, incomplete) + [name for name in GUIDE if name.startswith(incomplete)]


COMPLETE: dict[str, Complete] = {
    "run": run_directories,
    "runs": run_directories,
    "run_or_model": run_directories,
    "model_or_run": run_directories,
    "run_or_command": runs_and_commands,
    "stage": stages,
}  # by the name of the argument
