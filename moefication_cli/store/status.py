"""The state of every stage of a run, for people and scripts. Reads only, but for the hash cache; imports no torch.

missing      not made, and something that is made or always needed wants it
current      made, and what it was made from is as it was
stale        what it was made from has changed since
interrupted  a process stopped in the middle; running the command again goes on from there
running      a live process works on it
corrupt      its files are not what its manifest says
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import jsonio, locks
from moefication_cli.store.artifact import COMMANDS, StagePaths, stages_of, verified
from moefication_cli.store.manifest import Manifest, differences
from moefication_cli.store.rundir import RunDir

State = Literal["missing", "current", "stale", "interrupted", "running", "corrupt"]
# Digests, as of now, of a stage's inputs that no stage made: model, data, tokenizer
Today = Callable[[Manifest], Mapping[str, str]]

_ALWAYS = ("activations", "split", "router", "model")  # listed as missing where they are not there
_EXIT_CODES: dict[State, int] = {"running": 5, "corrupt": 4, "stale": 3, "missing": 3, "interrupted": 3, "current": 0}


@dataclass(frozen=True)
class StageState:
    """What `status` says of one stage. `command` is what mends it, "" where there is nothing to mend."""

    stage: str
    state: State
    reason: str = ""
    command: str = ""
    layers_done: int | None = None
    layers: int | None = None
    seconds: float | None = None
    num_bytes: int | None = None


def stage_states(run: RunDir, today: Today) -> list[StageState]:
    """Every stage that is there, begun or always needed, in the order of the pipeline."""
    found: dict[str, StageState] = {}
    made: dict[str, Manifest] = {}
    for kind in COMMANDS:
        names = stages_of(run.root, kind)
        for stage in names:
            manifest = StagePaths(run.root, stage).read_manifest_or_none()
            if manifest is not None:
                made[stage] = manifest
            found[stage] = _state(run, stage, today, found, made)
        if not names and kind in _ALWAYS:
            found[kind] = StageState(kind, "missing", "has not been made", _command(run, kind))
    order = list(COMMANDS)
    for kind in _ALWAYS:  # a router that needs no training needs no activations either
        if kind in found and found[kind].state == "missing":
            later = [m for stage, m in made.items() if order.index(stage.partition("/")[0]) > order.index(kind)]
            if kind != "model" and later and not any(n.partition("/")[0] == kind for m in later for n in m.inputs):
                del found[kind]
    return list(found.values())


def exit_code(states: list[StageState]) -> int:
    """0 all current, 3 something stale, missing or interrupted, 4 corrupt, 5 running; the highest counts."""
    return max((_EXIT_CODES[state.state] for state in states), default=3)


def _command(run: RunDir, kind: str) -> str:
    """The command that makes a stage which is not there."""
    return run.command(f"{kind}/regression" if kind == "router" else kind)


def _state(
    run: RunDir, stage: str, today: Today, upstream: Mapping[str, StageState], made: Mapping[str, Manifest]
) -> StageState:
    paths = StagePaths(run.root, stage)
    done, layers = _progress(paths)
    command = run.command(stage)
    if holder := _worker(paths):
        return StageState(stage, "running", holder, "", done, layers)
    try:
        manifest = paths.read_manifest()
        if manifest is None:
            at = f"at layer {done} of {layers}" if layers else "before its files were complete"
            return StageState(stage, "interrupted", f"stopped {at}", command, done, layers)
        verified(paths, manifest, run.hashes)
    except CorruptArtifactError as error:
        return StageState(stage, "corrupt", error.message, f"{command} --force")
    reason = _why_stale(manifest, today, upstream, made)
    if done is not None:
        begun = "another version of it was begun" + (f" and stopped at layer {done} of {layers}" if layers else "")
        reason = f"{reason}; {begun}" if reason else None
    size = sum(int(entry["bytes"]) for entry in manifest.files.values())
    count = len(manifest.layers) or None
    if reason is None:
        return StageState(stage, "current", "", "", count, count, manifest.seconds, size)
    return StageState(stage, "stale", reason, command, count, count, manifest.seconds, size)


def _why_stale(
    manifest: Manifest, today: Today, upstream: Mapping[str, StageState], made: Mapping[str, Manifest]
) -> str | None:
    known = {**today(manifest), **{name: other.digest for name, other in made.items()}}
    digests = {name: known.get(name, recorded) for name, recorded in manifest.inputs.items()}
    values = {name: entry["value"] for name, entry in manifest.config.items() if entry["compared"]}
    if reason := differences(manifest, values, digests, None):
        return reason
    for name in manifest.inputs:
        if name in upstream and upstream[name].state in ("stale", "corrupt"):
            return f"`{name}` is {upstream[name].state}"
    return None


def _progress(paths: StagePaths) -> tuple[int | None, int | None]:
    """(layers finished, layers in all) of work that was begun; None without any, and in all None where it is not known."""
    work = paths.partial / ".work"
    try:
        layers = jsonio.read_object(work / "key.json").get("layers")
    except (OSError, CorruptArtifactError):
        return (0, None) if paths.partial.is_dir() else (None, None)
    return len(list(work.glob("layer_*.json"))), layers if isinstance(layers, int) and layers else None


def _worker(paths: StagePaths) -> str | None:
    """Who works on the stage, and since when."""
    path = paths.live_claim()
    if path is None:
        return None
    since = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return f"{locks.holder(path)} works on {path.stem.replace('_', ' ')} since {since}"
