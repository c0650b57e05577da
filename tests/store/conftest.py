"""What every test of the store uses."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moefication_cli.store.rundir import RunDir


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of what was fsynced. Not really done: these tests kill processes, they cannot cut the power."""
    inodes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: inodes.append(os.fstat(fd).st_ino))
    return inodes


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run dir é", lock_timeout=0.3)


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    for child in multiprocessing.active_children():
        child.kill()
