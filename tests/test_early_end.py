"""SIGUSR1 in long stages: the present layer is finished and kept, exit code 75, and the same command does the rest."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from test_interruption import KILLER, SAVE, contents
from test_stages import world  # noqa: F401  a fixture

from moefication_cli.errors import RunAgainError
from moefication_cli.runs.control import stopping
from moefication_cli.stages import collect_activations

SIGNALS = KILLER.replace("SIGKILL", "SIGUSR1")  # the signal, and on it goes: the same places as in the tests of kills
REFINE = ["--refine", "6", "--fraction", "0.6"]
TRAIN = ["--steps", "4", "--tokens", "64", "--train", "all"]
# command -> (stage, after which call the signal comes, options)
STAGES: dict[str, tuple[str, str, list[str]]] = {
    "collect-activations": ("activations", "moefication_cli.stages.collect_activations:collect_shard", []),
    "split": ("split", SAVE, ["--expert-size", "4"]),
    "train-router": ("router/regression", SAVE, ["--epochs", "2"]),
    "apply": ("model", "moefication_cli.conversion.refine:settle", REFINE),
    "finetune": ("finetuned/default", "moefication_cli.training.trainer:_Watch.on_pre_optimizer_step", TRAIN),
}


def signalled(where: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SIGNALS, where, *words],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_long_stage_ends_early_and_goes_on(
    world: Any,  # noqa: F811
    run_cli: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _, source, _ = world("bert", "classification")
    whole = run.with_name("whole")
    monkeypatch.setattr(collect_activations, "SHARD_BYTES", 20_000)  # several shards, as in the other process
    for command, (stage, where, options) in STAGES.items():
        options = options + (source if command == "collect-activations" else [])
        run_cli.ok(command, whole, *options)
        ended = signalled(where, [command, str(run), *options, "--json"])
        assert ended.returncode == 75, (command, ended.stderr)
        assert '"code": "run_again"' in ended.stdout and "run the same command again" in ended.stderr
        assert not (run / stage).exists()
        partial = run / Path(stage).parent / f".{Path(stage).name}.partial"
        if where == SAVE:  # the layer that was worked on, and no other
            assert [path.name for path in partial.glob("layer_*")] == ["layer_000.safetensors"]
        if command == "collect-activations":
            assert len(list((partial / ".work" / "scratch").glob("shard_*"))) == 1
        outcome = run_cli(command, run, *options)
        assert outcome.code == 0, outcome.err
        if command == "finetune":
            assert "went on from step 1" in outcome.err
        assert contents(run / stage) == contents(whole / stage), command


def test_run_ends_between_layers_and_keeps_finished_stages(world: Any, run_cli: Runner) -> None:  # noqa: F811
    run, _, source, _ = world("bert", "classification")
    words = ["run", str(run), *source, "--expert-size", "4", "--epochs", "2", "--refine", "0", "--fraction", "0.6"]
    ended = signalled("moefication_cli.stages.convert:split_neurons", words)
    assert ended.returncode == 75, ended.stderr
    assert (run / "split" / "manifest.json").exists() and not (run / "router" / "regression").exists()
    assert run_cli.ok(*words)["stages"]["split"]["up_to_date"]


def test_a_signal_behind_the_last_item_changes_nothing() -> None:
    asked: list[int] = []
    track = stopping(lambda items, description, total=None: iter(items), lambda: bool(asked))
    done = []
    for item in track([1, 2], "x"):
        done.append(item)
        if item == 2:
            asked.append(1)
    assert done == [1, 2]
    with pytest.raises(RunAgainError):
        next(track([3], "x"))


def test_without_a_handler_nothing_is_asked() -> None:
    from moefication_cli.cli.early_end import early_end_asked, take_early_ends

    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert not early_end_asked()
        take_early_ends()
        assert not early_end_asked()
        signal.raise_signal(signal.SIGUSR1)
        assert early_end_asked()
    finally:
        signal.signal(signal.SIGUSR1, before)
