"""--dry-run: what a stage would read and write, and roughly how long and how much memory it would take.

The rates are orders of magnitude of one ordinary CPU core, times the threads there are; they tell minutes from hours.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from moefication_cli.runs.control import Result
from moefication_cli.runs.inputs import RunModel
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

_FLOPS_PER_CORE = 3e10  # multiply-adds x 2 per second, float32 matrix products
_BYTES_PER_SECOND = 2e8  # reading, permuting and writing weights
_FLOAT = 4


def estimate(
    command: str,
    run: RunDir,
    model: RunModel,
    *,
    writes: Path,
    num_bytes: float,
    flops: float,
    memory: float,
    reads: Mapping[str, Artifact | None] | None = None,
) -> Result:
    """The result of a dry run; nothing is written. `flops` counts multiply-adds twice, `memory` is the peak in bytes."""
    files = [str(path) for path in model.checkpoint.files]
    stages = [str(stage.path) for stage in (reads or {}).values() if stage is not None]
    seconds = flops / (_FLOPS_PER_CORE * torch.get_num_threads()) + num_bytes / _BYTES_PER_SECOND
    row = {
        "reads": ", ".join([*stages, str(model.checkpoint.folder)]),
        "writes": str(writes),
        "gigabytes": num_bytes / 1e9,
        "seconds": seconds,
        "memory_gib": memory / 2**30,
    }
    note = "estimates: tell minutes from hours, not more; nothing was written"
    return Result(command, [row], {"dry_run": True, "files": files}, notes=[note])


def ffn_bytes(model: RunModel) -> float:
    """Float32 bytes of the largest FFN."""
    return float(max(site.num_parameters for site in model.sites) * _FLOAT)


def total_ffn_flops(model: RunModel, tokens: float) -> float:
    """Multiply-adds, counted twice, of all FFNs over that many tokens."""
    return 2.0 * tokens * sum(site.num_parameters for site in model.sites)
