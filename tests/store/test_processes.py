"""Processes that are killed, and several at once: never half a stage."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_directories import FORK, LAYERS, begin, done, fork, one_file, split, tensors_of

from moefication_cli.errors import (
    LockedError,
    MissingArtifactError,
    MoEficationError,
)
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.artifact import StagePaths
from moefication_cli.store.manifest import Manifest
from moefication_cli.store.options import StageOptions
from moefication_cli.store.rundir import RunDir


def kill_at(call: int) -> None:
    """Die with SIGKILL at the n-th durable file operation."""
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("replace", "remove", "atomic_write", "make_dirs"):
        setattr(files, name, counting(getattr(files, name)))
    jsonio.atomic_write = files.atomic_write


@pytest.mark.parametrize("had_stage", [False, True])
def test_kill_at_every_file_operation(tmp_path: Path, had_stage: bool) -> None:
    two = {"layers": LAYERS[:2]}
    expected = done(split(RunDir(tmp_path / "reference"), 8, **two)).files
    old = None
    for call in range(1, 200):
        run = RunDir(tmp_path / str(call), lock_timeout=0.3)
        old = done(split(run, **two)).digest if had_stage else None

        def victim(call: int = call, root: Path = run.root) -> None:
            kill_at(call)
            split(RunDir(root, lock_timeout=0.3), 8, **two)

        process = fork(victim)
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        try:
            found = run.read_stage("split")  # whole, whichever it is
            assert found.digest == old or found.manifest.files == expected
        except MissingArtifactError:
            assert not had_stage
        assert done(split(run, 8, **two)).files == expected
        assert run.require("split").manifest.files == expected
        assert sorted(p.name for p in run.root.iterdir()) == [".cache", ".locks", "split"]
        assert not list(run.root.rglob("*.tmp")) and not list(run.root.rglob(".work"))
    else:
        raise AssertionError("the victim never finished")
    assert call > 20, "too few places to be killed at: nothing was tested"


def test_commit_killed_before_or_between_its_renames_is_settled_by_the_next_reader(run: RunDir) -> None:
    first = done(split(run))
    folder = run.path("split")
    folder.rename(run.root / ".split.partial")  # complete, not yet renamed
    assert run.read_stage("split").digest == first.digest
    folder.rename(run.root / ".split.old")  # the old one moved away, the new one lost
    assert run.read_stage("split").digest == first.digest
    assert not list(run.root.glob(".split.*"))


def test_partial_folder_that_is_worked_on_again_is_not_taken_for_complete(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = done(split(run))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StagePaths, "swap", lambda self: signal.raise_signal(signal.SIGINT))
        split(run, 8)
    assert (run.root / ".split.partial" / "manifest.json").exists()
    assert run.read_stage("split").digest == old.digest
    with begin(run, 8, force=True, only=[0]):
        files.remove(run.path("split"))
        assert run.manifest("split") is None
    assert done(split(run, 8)).digest != old.digest


def test_kill_in_the_middle_of_the_work_frees_locks_and_resumes(run: RunDir) -> None:
    first = done(split(run))
    ready = FORK.Event()

    def victim() -> None:
        with begin(RunDir(run.root), 8) as work:
            for i in work.pending():
                if i == 2:
                    (work.partial.work / "layer_002.safetensors.tmp").write_bytes(b"half")
                    ready.set()
                    time.sleep(60)
                work.save(i, tensors_of(i, 8))

    process = fork(victim)
    assert ready.wait(20)
    with pytest.raises(LockedError, match=f"process {process.pid} on") as caught:
        split(run, 8)
    assert caught.value.exit_code == 5 and "layer 2 (encoder.layer.2)" in caught.value.message
    with pytest.raises(LockedError, match="`split`"):
        split(run, 16)  # other options: must not sweep a live process's work
    assert run.read_stage("split").digest == first.digest
    process.kill()
    process.join()
    redone: list[int] = []
    resumed = done(split(run, 8, after=redone.append))
    assert redone == [2], "0, 1 by the victim, 3 while it slept"
    other = RunDir(run.root.with_name("other"))
    assert done(split(other, 8)).files == resumed.files


def in_parallel(targets: list[Callable[[], Manifest | None]]) -> list[Any]:
    """Results of the targets, each in its own process, started together; an error's class name if it raised one."""
    barrier = FORK.Barrier(len(targets))
    queue = FORK.SimpleQueue()

    def task(index: int) -> None:
        barrier.wait(20)
        try:
            manifest = targets[index]()
            queue.put((index, manifest and manifest.digest))
        except MoEficationError as error:
            queue.put((index, type(error).__name__))

    processes = [fork(lambda i=i: task(i)) for i in range(len(targets))]  # type: ignore[misc]
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    return [results[i] for i in range(len(targets))]


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("force", [False, True])
def test_concurrent_array_tasks(run: RunDir, attempt: int, force: bool) -> None:
    expected = done(split(RunDir(run.root.with_name("reference")))).digest
    tasks: list[Callable[[], Manifest | None]] = [
        lambda i=i: split(RunDir(run.root), only=[i], force=force)  # type: ignore[misc]
        for i in range(4)
    ]
    results = in_parallel(tasks)
    assert set(results) <= {expected, None} and expected in results
    assert run.require("split").digest == expected


@pytest.mark.parametrize("attempt", range(3))
def test_concurrent_processes_share_the_layers(run: RunDir, attempt: int) -> None:
    expected = done(split(RunDir(run.root.with_name("reference")))).digest
    log = run.root.with_name("log")
    log.touch()

    def note(i: int) -> None:
        with log.open("a") as file:
            file.write(f"{i}\n")
        time.sleep(0.02)

    results = in_parallel([lambda: split(RunDir(run.root), after=note)] * 3)
    assert expected in results and set(results) <= {expected, None}
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3"], "no layer is done twice"
    assert run.require("split").digest == expected


def test_concurrent_writers_of_a_folder_stage(run: RunDir) -> None:
    results = in_parallel([lambda: one_file(RunDir(run.root, lock_timeout=20))] * 3)
    assert results == [run.require("model").digest] * 3


def test_concurrent_remember_loses_nothing(run: RunDir) -> None:
    def remember(name: str) -> None:
        RunDir(run.root).remember(**{name: name})

    in_parallel([lambda n=n: remember(n) for n in ("model", "task", "prompt", "revision")])  # type: ignore[misc]
    info = run.info
    assert (info.model, info.task, info.prompt, info.revision) == ("model", "task", "prompt", "revision")


def test_readers_never_see_half_a_stage(run: RunDir) -> None:
    digests = {done(split(run, e)).digest for e in (4, 8)}
    stop = FORK.Event()

    def rewrite() -> None:
        for i in range(12):
            split(RunDir(run.root), (4, 8)[i % 2])
        stop.set()

    writer = fork(rewrite)
    seen = 0
    while not stop.is_set():
        assert RunDir(run.root).read_stage("split").digest in digests
        seen += 1
    writer.join()
    assert seen > 3


def test_folder_stage_is_locked_while_it_is_made(run: RunDir) -> None:
    with (
        run.begin("eval/default", StageOptions(config={})) as work,
        pytest.raises(LockedError, match=rf"`eval/default` is being worked on by process {os.getpid()} on"),
        RunDir(run.root, lock_timeout=0.1).begin("eval/default", StageOptions(config={})),
    ):
        pass
    with run.begin("eval/default", StageOptions(config={})):
        assert work


def test_hold_excludes_others_and_keeps_the_commit_waiting(run: RunDir) -> None:
    other = RunDir(run.root, lock_timeout=0.1)
    with begin(run) as work, work.lock("shard_0"):
        with begin(other) as second:
            with pytest.raises(LockedError, match="shard_0"), second.lock("shard_0"):
                pass
            with second.lock("shard_1"):
                pass
        assert split(other) is None, "somebody still works on it"
    assert split(other)


def test_stage_begun_anew_by_somebody_else_is_noticed(run: RunDir) -> None:
    with begin(run) as work:
        split(run, 8)  # no claim held, so this may sweep
        with pytest.raises(LockedError, match="other options"):
            list(work.pending())


def test_lock_of_a_thread_blocks_another_process(tmp_path: Path) -> None:
    lock = locks.try_acquire(tmp_path / "x.lock")
    assert lock is not None
    assert locks.is_held(tmp_path / "x.lock")
    releaser = threading.Thread(target=lock.release)
    releaser.start()
    releaser.join()
    assert not locks.is_held(tmp_path / "x.lock")
