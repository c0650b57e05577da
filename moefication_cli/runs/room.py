"""Before a stage starts: whether there is disk for what it will write, and memory for what it will hold."""

import shutil
from pathlib import Path

from moefication_cli.errors import MoEficationError
from moefication_cli.models.memory import total_memory
from moefication_cli.runs.control import Control
from moefication_cli.runs.costs import Cost
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store.writer import StageWriter

_GIB = 2**30


def check_room(work: StageWriter, model: RunModel, cost: Cost, control: Control, less: str) -> None:
    """Compare a stage's cost with the disk of the run and the memory of its device; for a stage that is not up to date.

    `less` names the options that need less memory. Raises MoEficationError where the disk cannot hold what will
    certainly be written; says what may be short.
    """
    if work.up_to_date or control.ranks.rank > 0:
        return
    # Of an interrupted stage, its bookkeeping apart
    kept = (path for path in work.folder.rglob("*") if path.is_file() and path.suffix != ".json")
    there = sum(path.stat().st_size for path in kept)
    free = shutil.disk_usage(_existing(work.folder)).free
    for warning in shortages(cost, there, free, total_memory(model.device), str(work.paths.run), less):
        control.say(warning)


def shortages(cost: Cost, there: int, free: int, memory: int, run: str, less: str) -> list[str]:
    """The warnings, from bytes: `there` are written already, `free` can be, `memory` is what the device has in all.

    Raises MoEficationError naming what is needed and what there is.
    """
    hint = (
        f"`moefication clean {run} --partial --trials` frees what is not needed, or choose a directory on another disk"
    )
    if cost.certain - there > free:
        raise MoEficationError(f"{run}: {_gib(cost.certain - there)} will be written and {_gib(free)} are free", hint)
    found = []
    if cost.written - there > free:
        found.append(
            f"warning: {run}: up to {_gib(cost.written - there)} may be written and {_gib(free)} are free: {hint}"
        )
    if cost.memory > memory:
        found.append(
            f"warning: about {_gib(cost.memory)} of memory are needed beside the program and there are {_gib(memory)}: "
            f"less is needed with {less}"
        )
    return found


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.3g} GiB"


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())
