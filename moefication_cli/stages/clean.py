"""clean: delete a stage of a run, what interrupted work has left, or what `tune` keeps. Imports no torch."""

from pathlib import Path
from typing import Any

from moefication_cli.config import CleanConfig
from moefication_cli.errors import ConfigError, MissingArtifactError, did_you_mean
from moefication_cli.runs.control import Control, Result
from moefication_cli.store.artifact import leftovers_in, stages_in
from moefication_cli.store.rundir import RunDir

TRIALS = "trials"  # where `tune` keeps its splits and routers


def clean(run: RunDir, stage: str, config: CleanConfig, control: Control) -> Result:
    """Delete what was asked for and say how many bytes that frees; with `dry_run` only say it.

    Links are deleted, never what they point to. Raises ConfigError where nothing or no such stage was named,
    MissingArtifactError where there is no run, LockedError while another process works on it.
    """
    if not (run.root / "run.json").exists():
        raise MissingArtifactError(f"{run.root} is no run directory: it has no run.json", "name a run directory")
    stages, leftovers = stages_in(run.root), leftovers_in(run.root)
    trials = sorted(p for p in (run.root / TRIALS).glob("*") if p.is_dir()) if (run.root / TRIALS).is_dir() else []
    if not stage and not config.trials and not config.partial:
        there = [*stages, *(["--partial"] if leftovers else []), *(["--trials"] if trials else [])]
        raise ConfigError("nothing to delete was named", f"name a stage or an option; there are {', '.join(there)}")
    if stage and stage not in stages:
        hint = did_you_mean(stage, stages, f"there are {', '.join(stages)}")
        raise ConfigError(f"{run.root} has no stage {stage!r}", hint)
    rows: list[dict[str, Any]] = []
    if stage:
        rows.append(_row(run.path(stage)))
    rows += [_row(path) for path in leftovers * config.partial]
    rows += [_row(path) for path in trials * config.trials]
    if not control.dry_run:
        if stage:
            run.remove(stage)
        if config.partial:
            run.remove_leftovers()
        for path in trials * config.trials:
            RunDir(path).remove_all()
    freed = sum(row["megabytes"] for row in rows)
    said = "would be freed" if control.dry_run else "freed"
    return Result("clean", rows, {"dry_run": control.dry_run}, notes=[f"{freed:,.1f} MB {said}"])


def _row(path: Path) -> dict[str, Any]:
    files = [] if path.is_symlink() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return {"deleted": str(path), "files": len(files), "megabytes": sum(p.stat().st_size for p in files) / 1e6}
