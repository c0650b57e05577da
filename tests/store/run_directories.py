"""Stages of a toy run directory, made by the smallest code that makes them."""

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from moefication_cli.store.manifest import Manifest
from moefication_cli.store.options import StageOptions
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.writer import StageWriter

LAYERS = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "encoder.layer.3"]
FORK = multiprocessing.get_context("fork")


def tensors_of(index: int, experts: int) -> dict[str, torch.Tensor]:
    return {"expert_F": torch.arange(64, dtype=torch.int32) % experts + index}


def begin(run: RunDir, experts: int = 4, **options: Any) -> contextlib.AbstractContextManager[StageWriter]:
    options = {"inputs": {"base_model": "f" * 64}, "layers": LAYERS, **options}
    config = {"num_experts": experts, "batch_size": options.pop("batch_size", 8)}
    return run.begin("split", StageOptions(config=config, compared={"num_experts"}, **options))


def split(
    run: RunDir, experts: int = 4, after: Callable[[int], None] = lambda i: None, **options: Any
) -> Manifest | None:
    with begin(run, experts, **options) as work:
        for i in work.pending():
            work.save(i, tensors_of(i, experts), metrics={"index": i})
            after(i)
        return work.finish({"method": "test"})


def done(manifest: Manifest | None) -> Manifest:
    assert manifest is not None
    return manifest


def one_file(run: RunDir, stage: str = "model", content: str = "x", **options: Any) -> Manifest:
    with run.begin(stage, StageOptions(config={"a": 1}, **options)) as work:
        if not work.up_to_date:
            (work.folder / "sub").mkdir()
            (work.folder / "sub" / "file.txt").write_text(content)
        return done(work.finish({"b": 2}))


def fork(target: Callable[[], object]) -> Any:
    process = FORK.Process(target=target)
    process.start()
    return process
