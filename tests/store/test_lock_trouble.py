"""File systems without locks, or with locks that are out of order: said, and never passed over."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from moefication_cli.errors import MoEficationError
from moefication_cli.store import locks


def test_what_is_said_of_each_error() -> None:
    assert "do not work (No locks available)" in locks.lock_trouble(errno.ENOLCK, Path("/net/run"))
    assert "existence files" in locks.lock_trouble(errno.ENOSYS, Path("/net/run"))


def flock_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks_out_of_order_are_an_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock_fails(monkeypatch, code)
    with pytest.raises(MoEficationError, match="do not work") as caught:
        locks.try_acquire(tmp_path / "x.lock")
    assert "nolock" in caught.value.hint


def test_existence_files_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock_fails(monkeypatch, errno.ENOSYS)
    with pytest.warns(RuntimeWarning, match="existence files"):
        lock = locks.try_acquire(tmp_path / "x.lock")
    assert lock is not None
    assert locks.try_acquire(tmp_path / "x.lock") is None
    lock.release()
