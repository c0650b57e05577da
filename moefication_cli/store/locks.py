"""Locks between processes, on one machine or several that share a file system.

`filelock.FileLock` (flock) and not an existence file: the kernel lets go when the holder dies, however it dies, also
on NFS (Linux turns flock into byte-range locks on the server) and Lustre (mounted with `flock`). An existence file
left by a dead machine would block everybody until a person removes it. Where the file system has no flock at all,
filelock itself falls back to an existence file that holds process and host, and a warning says so once per process; where
locks are there but out of order (NFS without its lock service) nothing is done.
Lock files hold the holder's process and host for messages and stay in place: unlinking one would split its waiters.
"""

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from moefication_cli.errors import LockedError, MoEficationError
from moefication_cli.store.files import make_dirs, writing

_OUT_OF_ORDER = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_HINT = "mount it with locks (NFS: `lockd` running, no `nolock`), or choose a run directory on another disk"


def lock_trouble(code: int, folder: Path) -> str:
    """Why locks in a folder cannot be trusted, as a sentence, from the error that `flock` gave."""
    why = os.strerror(code)
    if code in _OUT_OF_ORDER:
        return (
            f"{folder}: the locks of this file system do not work ({why}): two commands could spoil each other's work"
        )
    return (
        f"{folder}: this file system has no locks ({why}): existence files take "
        "their place, which a machine that dies leaves behind; delete them then (moefication names the file)"
    )


def try_acquire(path: Path, timeout: float = 0.0) -> FileLock | None:
    """Take the lock at `path` within `timeout` seconds, or None if somebody else keeps it.

    Raises `MoEficationError` if the lock file cannot be created, or the file system's locks are out of order.
    """
    make_dirs(path.parent)
    # thread_local=False: a layer may be claimed in one thread and released in another.
    lock = FileLock(path, thread_local=False)
    with writing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in place of filelock's own words on existence files: `lock_trouble`
        try:
            lock.acquire(timeout=timeout, poll_interval=0.05)
        except Timeout:  # an OSError, so caught within
            return None
        except OSError as error:
            if error.errno in _OUT_OF_ORDER:
                raise MoEficationError(lock_trouble(error.errno, path.parent), _HINT) from None
            raise
    if isinstance(lock, SoftFileLock):  # an existence file already holds process and host
        warnings.warn(lock_trouble(errno.ENOSYS, path.parent), RuntimeWarning, stacklevel=2)
    else:
        with writing(path):
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    return lock


def holder(path: Path) -> str:
    """Who wrote the lock file last, in words for a message."""
    try:
        pid, host = path.read_text().split()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def locked_error(path: Path, what: str) -> LockedError:
    """The error for `what` ("layer 3 of `split`") being locked at `path`."""
    return LockedError(
        f"{what} is being worked on by {holder(path)} ({path})",
        "wait for it to end, or end it, then run the same command again",
    )


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock. Call it under the stage lock: the probe takes the lock for a moment."""
    lock = try_acquire(path)
    if lock is None:
        return True
    lock.release()
    return False


def is_held_now(path: Path) -> bool:
    """Whether a live process holds the lock. Writes nothing and needs no permission to, unlike `is_held`.

    The look takes a shared lock for a moment, at which another process finds it busy and tries again.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not there, or a file system without locks
        return False
    return False


@contextmanager
def held(path: Path, what: str, timeout: float) -> Iterator[None]:
    """Hold the lock at `path`; `LockedError` naming the holder after `timeout` seconds."""
    lock = try_acquire(path, timeout)
    if lock is None:
        raise locked_error(path, what)
    try:
        yield
    finally:
        lock.release()
