"""Disk and memory are compared with what a stage needs before it makes anything."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runner import Runner

from moefication_cli.errors import MoEficationError
from moefication_cli.runs.costs import Cost
from moefication_cli.runs.room import shortages

GIB = 2**30


def cost(memory: float = 0, written: float = 0, certain: float = 0) -> Cost:
    return Cost(0, 0, memory * GIB, written * GIB, certain * GIB)


def test_what_will_certainly_not_fit_is_an_error_with_both_numbers() -> None:
    with pytest.raises(MoEficationError, match=r"RUN: 12 GiB will be written and 3 GiB are free") as caught:
        shortages(cost(certain=12, written=12), 0, 3 * GIB, GIB, "RUN", "--x")
    assert caught.value.exit_code == 1 and "moefication clean RUN" in caught.value.hint
    assert shortages(cost(certain=12, written=12), 10 * GIB, 3 * GIB, GIB, "RUN", "--x") == []  # most is there already


def test_what_may_not_fit_is_a_warning_that_says_what_to_do() -> None:
    (disk,) = shortages(cost(written=12), 0, 3 * GIB, GIB, "RUN", "--x")
    assert disk.startswith("warning: RUN: up to 12 GiB may be written and 3 GiB are free")
    (memory,) = shortages(cost(memory=5), 0, GIB, 4 * GIB, "RUN", "--offload")
    assert memory.startswith("warning: about 5 GiB of memory") and memory.endswith("--offload")
    assert shortages(cost(memory=3.9, written=2), 0, 3 * GIB, 4 * GIB, "RUN", "--x") == []


def test_a_stage_refuses_a_full_disk_and_leaves_the_run_as_it_was(
    run_cli: Runner, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = tmp_path / "run", ["--model", bert, "--method", "random", "--expert-size"]
    run_cli.ok("split", run, *words, 4)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    limits: dict[str, Any] = {"free": 100, "memory": 1000}  # 2 layers of 48 neurons, 4 bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=limits["free"]))
    monkeypatch.setattr("moefication_cli.runs.room.total_memory", lambda device: limits["memory"])
    full = run_cli("split", run, *words, 8)
    assert full.code == 1 and "will be written" in full.err
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert not (run / ".split.partial").exists()
    assert run_cli.ok("split", run, *words, 4)["up_to_date"]  # which writes nothing
    limits["free"] = 1000
    done = run_cli("split", run, *words, 8)
    assert done.code == 0 and "--profile-tokens" in done.err
