"""Several processes over one stage: the same bytes as one process, and what happens when a rank is lost."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cli_runner import Outcome, Runner
from test_stages import write_data
from tiny_models import save_tiny

from moefication_cli.errors import MoEficationError
from moefication_cli.runs.ranks import open_ranks
from moefication_cli.stages import collect_activations

STAGES = ("activations", "graph", "split", "router/linear")
SHARD_BYTES = 20_000  # a few shards of the tiny model
WORKER = f"""
import os, signal, sys, time
from moefication_cli.cli import app
from moefication_cli.errors import MoEficationError
from moefication_cli.stages import collect_activations
from moefication_cli.store.writer import StageWriter

collect_activations.SHARD_BYTES = {SHARD_BYTES}
record, shard, rank = StageWriter._record, collect_activations.collect_shard, os.environ["RANK"]

def note(what):
    time.sleep(0.3)  # long enough for the other rank to take something
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{{rank}} {{what}}\\n")

def noted_record(work, index, *rest):
    note(f"{{work.paths.stage}} {{index}}")
    record(work, index, *rest)
    if os.environ.get("DIES") == f"{{rank}} {{work.paths.stage}}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("FAILS") == f"{{rank}} {{work.paths.stage}}":
        raise MoEficationError("the layer is bad", "mend it")

def noted_shard(*rest):
    note("shard")
    shard(*rest)

StageWriter._record, collect_activations.collect_shard = noted_record, noted_shard
app.main()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class World:
    """A tiny model with four FFNs, data, and ways to start ranks over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny("t5", folder / "t5")
        data = write_data(folder / "train", "text2text", 120, 0)
        self.options = ["--model", folder / "t5", "--data", data]
        self.options += ["--prompt", "w1 w2 {sentence}", "--label-words", "w3,w4"]
        self.worker, self.log = folder / "worker.py", folder / "log"
        self.worker.write_text(WORKER)

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOG": str(self.log), **more}

    def torchrun(self, *arguments: object, **environment: str) -> Outcome:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", free_port(), str(self.worker)]
        words = [*launcher, *map(str, arguments)]
        done = subprocess.run(
            words, env=self.environment(**environment), capture_output=True, text=True, timeout=200, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def side_by_side(self, *commands: list[object], **environment: str) -> list[Outcome]:
        """One rank per command, without a launcher that would stop the others when one dies."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(commands))}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(self.worker), *map(str, command)],
                env=self.environment(RANK=str(rank), **place, **environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, command in enumerate(commands)
        ]
        said = [rank.communicate(timeout=200) for rank in ranks]
        return [Outcome(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]

    def takes(self) -> set[tuple[str, ...]]:
        """(rank, stage, layer) and (rank, "shard") of everything that was done."""
        return {tuple(line.split()) for line in self.log.read_text().splitlines()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def stage_bytes(run: Path) -> dict[str, bytes]:
    return {
        f"{stage}/{path.name}": path.read_bytes() for stage in STAGES for path in (run / stage).glob("*.safetensors")
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as a rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_by_one(world: World, run: Path, run_cli: Runner, seed: int = 0) -> dict[str, bytes]:
    """The stages in this process."""
    with one_thread():
        run_cli.ok("collect-activations", run, *world.options, "--seed", seed)
        run_cli.ok("build-graph", run, "--seed", seed)
        run_cli.ok("split", run, "--method", "graph", "--expert-size", 4, "--seed", seed)
        run_cli.ok("train-router", run, "--router", "linear", "--seed", seed)
    return stage_bytes(run)


def test_two_ranks_write_the_same_bytes_as_one(
    world: World, run_cli: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, how = tmp_path / "run", ["--method", "graph", "--expert-size", 4, "--router", "linear"]
    outcome = world.torchrun("run", run, *world.options, *how, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["ok"]  # one object, although two ranks ran
    takes = world.takes()
    for what in ("shard", *STAGES):
        assert {take[0] for take in takes if take[1] == what} == {"0", "1"}, f"{what} was not shared"
    assert len([take for take in takes if take[1] == "split"]) == 4  # one writer per layer

    monkeypatch.setattr(collect_activations, "SHARD_BYTES", SHARD_BYTES)
    shared = stage_bytes(run)
    assert len(shared) == 16
    assert shared == one_by_one(world, tmp_path / "alone", run_cli)
    assert shared != one_by_one(world, tmp_path / "other", run_cli, seed=1)  # the comparison can fail
    assert run_cli.ok("run", run, *world.options, *how)["up_to_date"]

    world.log.unlink()
    outcome = world.torchrun("split", run, *how[:4], "--force", "--json")  # the other rank does not discard it again
    assert (outcome.code, outcome.json["up_to_date"]) == (0, False), outcome.err
    assert sorted(take[2] for take in world.takes()) == ["0", "1", "2", "3"]
    assert stage_bytes(run) == shared


def test_after_a_killed_rank_the_stage_fails_and_a_new_run_takes_the_rest(
    world: World, run_cli: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(collect_activations, "SHARD_BYTES", SHARD_BYTES)
    run = tmp_path / "run"
    outcome = world.torchrun("collect-activations", run, *world.options, "--json", DIES="1 activations")
    assert outcome.code != 0
    assert not outcome.json["ok"]
    assert not (run / "activations").exists()
    partial = run / ".activations.partial"
    names = [f"{path.stem}.safetensors" for path in (partial / ".work").glob("layer_*.json")]
    done = {name: (partial / name).stat().st_mtime_ns for name in names}
    assert done
    next((partial / ".work" / "scratch").glob("shard_*")).unlink()  # a lost shard is made again
    assert run_cli.ok("collect-activations", run, *world.options)["complete"]
    again = {name for name, time in done.items() if (run / "activations" / name).stat().st_mtime_ns != time}
    assert not again
    with one_thread():
        run_cli.ok("collect-activations", tmp_path / "alone", *world.options)
    assert stage_bytes(run) == stage_bytes(tmp_path / "alone")


def test_without_a_launcher_the_survivor_does_the_work_and_says_who_is_gone(world: World, tmp_path: Path) -> None:
    split = ["split", tmp_path / "run", "--model", tmp_path / "t5", "--method", "kmeans", "--num-experts"]
    survivor, killed = world.side_by_side([*split, 6, "--json"], [*split, 6], DIES="1 split")
    assert killed.code == -9
    assert (survivor.code, survivor.json["error"]["code"]) == (1, "failure")
    assert "lost another rank" in survivor.json["error"]["message"]
    assert len(list((tmp_path / "run" / ".split.partial").glob("layer_*"))) == 4

    first, second = world.side_by_side([*split, 6], [*split, 8])
    for outcome in (first, second):
        assert outcome.code == 2
        assert "ranks disagree about `split`: `num_experts` is" in outcome.err
        assert outcome.out == ""


def test_the_error_of_one_rank_is_the_error_of_all(world: World, tmp_path: Path) -> None:
    split = ["split", tmp_path / "run", "--model", tmp_path / "t5", "--method", "kmeans", "--num-experts", 6]
    outcome = world.torchrun(*split, "--json", FAILS="1 split")
    assert outcome.code != 0
    assert outcome.json["error"]["message"] == "rank 1: the layer is bad"
    assert outcome.json["error"]["hint"] == "mend it"


def test_what_is_not_shared_is_done_by_the_first_rank(
    world: World, run_cli: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setenv("RANK", "1")
    idle = run_cli("inspect", tmp_path / "t5", "--json")
    assert (idle.code, idle.out) == (0, "")
    monkeypatch.setenv("RANK", "0")
    assert len(run_cli.ok("inspect", tmp_path / "t5")["rows"]) == 4


def test_a_rank_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MoEficationError, match="rank 0 of 2 could not join"), open_ranks(timedelta(seconds=2)):
        pass
