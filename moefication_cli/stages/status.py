"""status and runs: what state every stage of a run is in, and the runs below a folder. Write nothing, import no torch."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moefication_cli.config import StatusConfig
from moefication_cli.errors import ConfigError, CorruptArtifactError, MissingArtifactError, MoEficationError
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.today import inputs_today
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import StagePaths
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.status import StageState, exit_code, stage_states

_ORDER = ("running", "corrupt", "stale", "interrupted", "missing", "current")  # the state of a run is the first it has


def status(run: RunDir, config: StatusConfig, control: Control) -> Result:
    """One row per stage: its state, why, and the command that mends it.

    Raises MissingArtifactError where there is no run.
    """
    if not (run.root / "run.json").exists():
        raise MissingArtifactError(
            f"{run.root} is no run directory: it has no run.json",
            f"moefication run {run.root} --model MODEL --data DATA; moefication runs DIR lists the runs there are",
        )
    states = stage_states(run, inputs_today(run))
    code = exit_code(states)
    mend = next((state.command for state in states if state.state not in ("current", "running")), None)
    notes = [] if mend is None else [f"next: {mend}"]
    payload = {"stages": [asdict(state) for state in states], "state": _state_of(states), "model": run.info.model}
    return Result("status", [_row(state) for state in states], payload, notes=notes, exit_code=code * config.exit_code)


def list_runs(folder: str) -> Result:
    """One row per run directory below `folder`: its model, method, fraction, quality and state.

    Raises ConfigError where the folder is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{folder} is not a folder", "name the parent of your run directories, e.g. artifacts")
    rows = []
    for place, folders, files in os.walk(root):
        folders.sort()
        if "run.json" in files:
            folders.clear()  # what is below belongs to this run
            rows.append(_run_row(Path(place)))
    notes = [] if rows else [f"no run directories below {folder}"]
    return Result("runs", rows, notes=notes)


def _row(state: StageState) -> dict[str, Any]:
    layers = None if state.layers is None else f"{state.layers_done} of {state.layers}"
    size = None if state.num_bytes is None else state.num_bytes / 1e6
    return {
        "stage": state.stage,
        "state": state.state,
        "layers": layers,
        "seconds": state.seconds,
        "megabytes": size,
        "why": state.reason,
    }


def _state_of(states: list[StageState]) -> str:
    return next(name for name in _ORDER if any(state.state == name for state in states) or name == "current")


def _run_row(place: Path) -> dict[str, Any]:
    run = RunDir(place)
    row: dict[str, Any] = {"run": str(place)}
    try:
        states = stage_states(run, inputs_today(run))
        split, model = (StagePaths(place, stage).read_manifest_or_none() for stage in ("split", "model"))
        row |= {
            "model": Path(run.info.model or "?").name,
            "task": run.info.task,
            "method": None if split is None else split.values.get("method"),
            "router": None if model is None else model.values.get("router"),
            "fraction": None if model is None else model.values.get("fraction"),
            **_quality(run),
            "state": _state_of(states),
        }
    except MoEficationError as error:
        row["state"] = f"corrupt: {error.message}"
    return row


def _quality(run: RunDir) -> dict[str, Any]:
    """Of what RUN/model does, as the latest evaluation found it."""
    finished = [path for name in run.names("eval") if (path := run.path(f"eval/{name}") / "metrics.json").is_file()]
    for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            metrics = jsonio.read_object(path)
            applied = next(row for row in metrics["rows"] if row["applied"])
            return {"metric": metrics["dense"]["metric"], "relative": applied["relative"], "kl": applied["kl"]}
        except (CorruptArtifactError, KeyError, TypeError, StopIteration):
            continue
    return {"metric": None, "relative": None, "kl": None}
