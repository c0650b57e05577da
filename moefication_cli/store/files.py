"""Durable file operations: atomic writes, directory fsync, deletion, sha256 with a cache.

Every write goes to a fixed temporary name beside its target, is fsynced, renamed over the target, and the directory is
fsynced: a crash leaves the old file or the new one. Does not know what a stage is, and takes no locks.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moefication_cli.errors import MoEficationError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an `OSError` raised while writing `path` into a `MoEficationError` that says where, why and what to do."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error.strerror or str(error), error.errno, num_bytes) from error


def write_error(path: Path, why: str, code: int | None = None, num_bytes: int | None = None) -> MoEficationError:
    """The error for a failed write of `path`; `num_bytes` is what was to be written."""
    size = "" if num_bytes is None else f" ({num_bytes} bytes)"
    if code in _FULL or "too large" in why or "space" in why:
        hint = "free some space (or raise the file size limit), then run the same command again"
    elif code in _DENIED:
        hint = "choose a run directory you may write to, or change its permissions"
    else:
        hint = "check the path of the run directory"
    return MoEficationError(f"cannot write {path}{size}: {why}", hint)


def make_dirs(path: Path) -> None:
    """Create `path` and its parents; `MoEficationError` if that is not possible."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def fsync(path: Path) -> None:
    """Flush a file or a directory to disk. Directories that cannot be flushed (some network mounts) are let pass."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Rename `source` over `target` and make the rename durable."""
    source.replace(target)
    fsync(target.parent)


def temporary(path: Path) -> Path:
    """The fixed temporary name for `path`: `.NAME.tmp` beside it, so that a crash leaves at most one."""
    return path.with_name(f".{path.name}.tmp")


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably, with the permissions that the umask gives."""
    tmp = temporary(path)
    with writing(path, len(data)):
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            replace(tmp, path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def remove(path: Path) -> None:
    """Delete a file, a link (never what it points to) or a whole folder; nothing happens if it is not there."""
    with writing(path):
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        elif path.exists():
            shutil.rmtree(path)


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path, digest: Callable[[Path], str] = sha256) -> dict[str, Any]:
    """What records keep of a file: {sha256, bytes}; `digest` may be that of a `HashCache`."""
    return {"sha256": digest(path), "bytes": path.stat().st_size}


def described_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """`described` of every file below a folder, by its path in it."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): described(path) for path in found}


def is_as_described(path: Path, entry: Mapping[str, Any], digest: Callable[[Path], str] = sha256) -> bool:
    """Whether the file is there and holds what `described` said of it; its bytes are read where the size is right."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and digest(path) == entry["sha256"]


def identity(path: Path) -> tuple[int, int, int, int]:
    """(size, mtime_ns, ctime_ns, inode): changes whenever the file is rewritten or replaced.

    ctime is there because a copy can preserve size and mtime; a chmod or a hard link only costs hashing it again.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
