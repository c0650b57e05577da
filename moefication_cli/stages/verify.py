"""verify: read every byte of a run or of a converted model, and name what is not as it was written."""

from pathlib import Path
from typing import Any

from moefication_cli.errors import CorruptArtifactError, MissingArtifactError, MoEficationError
from moefication_cli.export.record import RECORD, altered_files
from moefication_cli.models.folder.moe_folder import FOLDER, SETTINGS, read_moe_folder
from moefication_cli.models.folder.seal import altered_others
from moefication_cli.models.loading import check_weights, stored_as_int8
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.today import GONE, model_today
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import StagePaths, damaged_files, stages_in
from moefication_cli.store.manifest import BASE_MODEL
from moefication_cli.store.rundir import RunDir

_ALTERED = "is not as it was written"
_RESTORE = "restore run.json, or start a new run directory"


def verify(target: str, control: Control) -> Result:
    """One row per damaged file of a run directory or of a folder that `apply` or `export` wrote; exit code 4 if there is one.

    Raises MissingArtifactError where `target` is neither.
    """
    root = Path(target)
    if (root / FOLDER / SETTINGS).is_file():
        rows = _folder(root)
        checked = 1
    elif (root / RECORD).is_file():
        command = "moefication export RUN --to FORMAT --out DIR"
        altered = [_row("export", f"{root / name} {_ALTERED}", command) for name in altered_files(root)]
        rows = altered + _if_altered("export", root / RECORD, command)
        checked = 1
    elif (root / "run.json").is_file():
        run = RunDir(root)
        stages = stages_in(root)
        rows = _run_record(run)
        for stage in control.track(stages, "verify", len(stages)):
            rows += _stage(run, stage)
        checked = len(stages)
    else:
        raise MissingArtifactError(
            f"{target} is neither a run directory nor a converted or exported model",
            f"it has no run.json, no {FOLDER}/{SETTINGS} and no {RECORD}",
        )
    what = "nothing is damaged" if not rows else f"{len(rows)} of them damaged"
    notes = [f"{checked} {'stages' if checked != 1 else 'folder'} read in full: {what}"]
    return Result("verify", rows, {"damaged": len(rows)}, notes=notes, exit_code=4 if rows else 0)


def _run_record(run: RunDir) -> list[dict[str, Any]]:
    """run.json, and whether the model is still the one it names."""
    try:
        info, path = run.info, run.root / "run.json"
        jsonio.check_seal(jsonio.read_object(path), path)
    except CorruptArtifactError as error:
        return [_row("run.json", error.message, _RESTORE)]
    if altered := _if_altered("run.json", path, _RESTORE):
        return altered
    now = model_today(run).get(BASE_MODEL)
    if now is None or info.fingerprint in (None, now):
        return []
    what = f"{info.model} is {GONE}" if now == GONE else f"{info.model} is not what this run was made from"
    return [_row("run.json", what, "restore the model, or run all stages again")]


def _stage(run: RunDir, stage: str) -> list[dict[str, Any]]:
    paths, command = StagePaths(run.root, stage), f"{run.command(stage)} --force"
    try:
        manifest = paths.read_manifest()
    except CorruptArtifactError as error:
        return [_row(stage, error.message, command)]
    if manifest is None:
        return []
    if altered := _if_altered(stage, paths.manifest, command):
        return altered
    rows = [_row(stage, error.message, command) for error in damaged_files(paths, manifest, run.hashes)]
    run.hashes.save()
    return rows


def _folder(folder: Path) -> list[dict[str, Any]]:
    """Of a folder without its run: what `load(folder, verify=True)` would refuse, and what was altered beside the weights."""
    int8 = " --weights int8" if stored_as_int8(folder) else ""
    command = f"moefication apply RUN{int8} --force"
    try:
        moe = read_moe_folder(folder)
        check_weights(folder, moe, verify=True)
    except MoEficationError as error:
        return [_row("model", error.message, command)]
    if altered := _if_altered("model", folder / FOLDER / SETTINGS, command):
        return altered
    return [_row("model", error.message, command) for error in altered_others(folder, moe.settings.get("weights", {}))]


def _if_altered(stage: str, path: Path, command: str) -> list[dict[str, Any]]:
    """A row if the bytes of a JSON file are not those that this program writes for what it holds."""
    return [] if jsonio.as_written(path) else [_row(stage, f"{path} {_ALTERED}", command)]


def _row(stage: str, damage: str, command: str) -> dict[str, Any]:
    return {"stage": stage, "damage": damage, "command": command}
