"""SIGKILL in the middle of every stage: nothing half-done is visible, and the same command goes on from there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from test_stages import world  # noqa: F401  a fixture

from moefication_cli.stages import collect_activations

# Runs a command and dies right after the first call of what the first word names: module:attribute.
KILLER = """
import importlib, os, signal, sys
from moefication_cli.cli.app import main
module, attribute = sys.argv.pop(1).split(":")
owner = importlib.import_module(module)
*path, name = attribute.split(".")
for part in path:
    owner = getattr(owner, part)
whole = getattr(owner, name)
def last_breath(*args, **kwargs):
    result = whole(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, last_breath)
if module.endswith("collect_activations"):
    owner.SHARD_BYTES = 20_000
main()
"""
SAVE = "moefication_cli.store.writer:StageWriter.save"
STAGES = {
    "collect-activations": ("activations", "moefication_cli.stages.collect_activations:collect_shard"),
    "build-graph": ("graph", SAVE),
    "split": ("split", SAVE),
    "train-router": ("router/mlp", SAVE),
    "apply": ("model", "moefication_cli.models.folder.checkpoint:Checkpoint.write_permuted"),
    "eval": ("eval/default", "moefication_cli.stages.evaluate:plot_quality"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but manifests and what holds times."""
    apart = ("manifest.json", "metrics.json")
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in apart}


def test_every_stage_survives_sigkill(
    world: Any,  # noqa: F811
    run_cli: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _, source, evaluate = world("bert", "classification")
    monkeypatch.setattr(collect_activations, "SHARD_BYTES", 20_000)  # several shards
    shards: list[int] = []
    make_shard = collect_activations.collect_shard
    monkeypatch.setattr(collect_activations, "collect_shard", lambda *a: (shards.append(a[3].number), make_shard(*a)))  # type: ignore[func-returns-value]
    neurons = ["--fraction-of", "neurons"]
    options = {
        "collect-activations": source,
        "split": ["--expert-size", "4"],
        "train-router": ["--router", "mlp", "--epochs", "2"],
        "apply": [*neurons, "--fraction", "0.5"],
        "eval": [*evaluate, *neurons],
    }
    whole = run.with_name("whole")
    for command, words in ((name, options.get(name, [])) for name in STAGES):
        run_cli.ok(command, whole, *words)
    all_shards, shards[:] = len(shards), []
    assert all_shards > 2

    for command, (stage, where) in STAGES.items():
        words = [command, str(run), *options.get(command, [])]
        killed = subprocess.run(
            [sys.executable, "-c", KILLER, where, *words],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not (run / stage).exists(), command
        partial = run / Path(stage).parent / f".{Path(stage).name}.partial"
        first = partial / "layer_000.safetensors"
        made = first.stat().st_mtime_ns if where == SAVE else None
        assert run_cli.ok(*words)["up_to_date"] is False
        assert not partial.exists()
        if made is not None:  # the layer that was finished was not made again
            assert (run / stage / first.name).stat().st_mtime_ns == made
        assert contents(run / stage).keys() == contents(whole / stage).keys()
        if command != "eval":  # a picture of times differs
            assert contents(run / stage) == contents(whole / stage), command
    assert len(shards) == all_shards - 1  # the one that was finished was kept
    assert run_cli.ok("eval", run, *options["eval"])["up_to_date"]
    shutil.rmtree(run)
