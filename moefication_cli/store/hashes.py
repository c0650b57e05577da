"""sha256 of files with a cache in the run directory, so that unchanged gigabytes are read once.

`RUN/.cache/hashes.json`: `files` {path: [size, mtime_ns, ctime_ns, inode, sha256]} and `digest`, the sha256 of the canonical
JSON of `files`. Best effort: a cache that is missing, damaged, edited, busy or not writable only costs time. Silent decay
of the disk is seen by `sha256(path, fresh=True)` alone.
"""

from contextlib import suppress
from pathlib import Path

from moefication_cli.errors import MoEficationError
from moefication_cli.store import files, jsonio, locks

Entry = tuple[tuple[int, int, int, int], str]


class HashCache:
    """The cache of one run directory; instances share it through the file."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._file = run / ".cache" / "hashes.json"
        self._lock = run / ".locks" / "hashes.lock"
        self._entries: dict[str, Entry] | None = None
        self._added: dict[str, Entry] = {}

    def sha256(self, path: Path, fresh: bool = False) -> str:
        """Hex sha256 of a file, in the run directory or not; `fresh` reads it in any case."""
        name, now = self._name(path), files.identity(path)
        if self._entries is None:
            self._entries = self._load()
        known = self._added.get(name) or self._entries.get(name)
        if not fresh and known is not None and known[0] == now:
            return known[1]
        value = files.sha256(path)
        if files.identity(path) == now:
            self._added[name] = (now, value)
        return value

    def moved(self, source: Path, target: Path) -> None:
        """Carry what is known about files below `source` over to `target`, their folder's new name."""
        old, new = self._name(source) + "/", self._name(target) + "/"
        for name, entry in {**(self._entries or {}), **self._added}.items():
            if name.startswith(old):
                self._added[new + name.removeprefix(old)] = entry

    def save(self) -> None:
        """Merge what this process learnt into the file; silently not, if it is busy or not writable."""
        if not self._added:
            return
        with suppress(MoEficationError, OSError):
            lock = locks.try_acquire(self._lock)
            if lock is None:
                return
            try:
                entries = {**self._load(), **self._added}
                alive = {name: entry for name, entry in entries.items() if (self._run / name).exists()}
                files.make_dirs(self._file.parent)
                listed = {name: [*stat, value] for name, (stat, value) in alive.items()}
                jsonio.write(self._file, {"digest": jsonio.digest(listed), "files": listed})
                self._entries, self._added = alive, {}
            finally:
                lock.release()

    def _name(self, path: Path) -> str:
        # Relative inside the run directory, so that a moved run keeps its cache; `run / absolute` is the absolute path.
        path = path.absolute()
        run = self._run.absolute()
        return (path.relative_to(run) if path.is_relative_to(run) else path).as_posix()

    def _load(self) -> dict[str, Entry]:
        try:
            raw = jsonio.read_object(self._file)
            if raw.get("digest") != jsonio.digest(raw["files"]):
                return {}
            return {
                name: ((int(size), int(mtime), int(ctime), int(inode)), str(value))
                for name, (size, mtime, ctime, inode, value) in raw["files"].items()
            }
        except (OSError, KeyError, AttributeError, ValueError, TypeError, MoEficationError):
            return {}
