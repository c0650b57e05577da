"""--dry-run: what a stage would read and write, and about how long and how much memory it would take."""

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moefication_cli.models.memory import total_memory
from moefication_cli.runs.control import Result
from moefication_cli.runs.costs import Cost
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store.artifact import Artifact

_BYTES_PER_SECOND = 2e8  # reading, permuting and writing weights
_EFFICIENCY = 0.5  # of a large matrix product's rate: what a stage reaches between its products
_PRODUCT = 1024


def estimate(
    command: str, model: RunModel, writes: Path, cost: Cost, reads: Mapping[str, Artifact | None] | None = None
) -> Result:
    """The result of a dry run of one stage; nothing is written."""
    stages = [str(stage.path) for stage in (reads or {}).values() if stage is not None]
    row = {"reads": ", ".join([*stages, str(model.checkpoint.folder)]), "writes": str(writes), **figures(model, cost)}
    return Result(command, [row], {"dry_run": True, "files": _files(model)}, notes=notes(model, cost.memory))


def figures(model: RunModel, cost: Cost) -> dict[str, float]:
    """What a row of a dry run says of a cost."""
    seconds = cost.flops / (_EFFICIENCY * product_rate(model.device)) + cost.num_bytes / _BYTES_PER_SECOND
    return {"gigabytes": cost.num_bytes / 1e9, "seconds": seconds, "memory_gib": cost.memory / 2**30}


def notes(model: RunModel, memory: float) -> list[str]:
    """Sentences under a dry run's table."""
    there = total_memory(model.device)
    said = ["seconds are estimates for a machine that does nothing else, right within a factor of two or so"]
    if memory > 0.8 * there:
        said.append(
            f"it may not fit: about {memory / 2**30:.1f} GiB of memory are needed beside the program and there are "
            f"{there / 2**30:.1f}"
        )
    return [*said, "nothing was written"]


@cache
def product_rate(device: torch.device) -> float:
    """Floating point operations per second of one large float32 matrix product here: the best of five, under a second."""
    a = torch.ones(_PRODUCT, _PRODUCT, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return float(2.0 * _PRODUCT**3 / min(seconds))


def _files(model: RunModel) -> list[str]:
    return [str(path) for path in model.checkpoint.files]


def dry_run_of(rows: list[dict[str, Any]], command: str, model: RunModel) -> Result:
    """The result of a dry run of several stages: their rows and the sum."""
    total = {
        "stage": "total",
        "writes": "",
        "gigabytes": sum(row["gigabytes"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "memory_gib": max(row["memory_gib"] for row in rows),
    }
    payload = {"dry_run": True, "files": _files(model)}
    return Result(command, [*rows, total], payload, notes=notes(model, total["memory_gib"] * 2**30))
