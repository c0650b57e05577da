"""A folder outside of any run directory that one command writes whole, with a record of how it was made.

Beside FOLDER, hidden: `.FOLDER.partial` (work in progress, kept when a process is killed: `key`, `scratch/`, `folder/`),
`.FOLDER.old` (the folder that is replaced, for the moment of the swap) and `.FOLDER.lock`. The record is a `Manifest` without
layers. What a folder holds is never replaced unasked, because it may have been changed since: other options are refused.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefication_cli.errors import ConfigError, CorruptArtifactError
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.manifest import Manifest, differences, environment, work_key
from moefication_cli.store.options import StageOptions


@dataclass
class Output:
    """What `begin_output` gives: `manifest` where the folder is up to date, else folders to work in and `finish`."""

    path: Path
    kind: str
    options: StageOptions
    digest: Callable[[Path], str] = files.sha256
    renew: bool = False
    manifest: Manifest | None = None
    _begun: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        """Where the files go; every one of them becomes part of the result."""
        return self._partial / "folder"

    @property
    def scratch(self) -> Path:
        """For intermediate files, kept when interrupted work goes on, deleted by `finish`."""
        return self._partial / "scratch"

    def finish(self, metrics: Mapping[str, Any]) -> Manifest:
        """Write the record and put the folder in place of what was there."""
        manifest = Manifest.make(
            stage=self.kind,
            config=self.options.described(),
            inputs=dict(self.options.inputs),
            layers=(),
            files=files.described_folder(self.folder),
            metrics=jsonio.plain(metrics),
            seconds=time.perf_counter() - self._begun,
            environment=environment(self.options.device),
        )
        jsonio.write(self.folder / self._record, manifest.to_json())
        for path in self.folder.rglob("*"):
            files.fsync(path)
        with files.writing(self.path):
            if self.path.exists():
                files.remove(self._old)
                files.replace(self.path, self._old)
            files.replace(self.folder, self.path)
        files.remove(self._old)
        files.remove(self._partial)
        self.manifest = manifest
        return manifest

    # -- what is there -----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Set `manifest` if the folder is what the options ask for.

        Raises ConfigError where it was altered or was not made by this command, and `force` is not set, or where it is
        another one, and neither `force` nor `renew` is.
        """
        record = self.path / self._record
        if not record.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ConfigError(
                    f"{self.path} is there and was not made by {self.kind} (it has no {self._record})",
                    "name another folder",
                )
            return
        if self.options.force:
            return
        manifest = Manifest.from_json(jsonio.read_object(record), self.kind, record)
        again = f"name another folder, or write it anew: {self.kind} --force"
        if reason := differences(manifest, self._compared(), self.options.inputs):
            if self.renew:
                return
            raise ConfigError(f"{self.path} was made with other options: {reason}", again)
        for name, entry in manifest.files.items():
            path = self.path / name
            if not files.is_as_described(path, entry, self.digest):
                raise ConfigError(f"{path} was changed or removed since {self.kind} wrote it", again)
        self.manifest = manifest

    def prepare(self) -> None:
        """Finish an interrupted swap; delete begun work of other options, and with `force` any."""
        if self._old.exists() and not self.path.exists():
            files.replace(self._old, self.path)
        self.look()
        if self.manifest is not None:
            return
        key = work_key(self.kind, self._compared(), self.options.inputs, ())
        if self.options.force or self._begun_with() != key:
            files.remove(self._partial)
            files.make_dirs(self._partial)
            jsonio.write(self._partial / "key", {"key": key})
        files.remove(self.folder)
        files.make_dirs(self.folder)
        files.make_dirs(self.scratch)

    def abandon(self) -> None:
        """Leave no trace of work that has nothing to go on from."""
        if self._partial.exists() and not any(self.scratch.rglob("*")):
            files.remove(self._partial)

    def _begun_with(self) -> str | None:
        try:
            return str(jsonio.read_object(self._partial / "key").get("key"))
        except (OSError, CorruptArtifactError):
            return None

    def _compared(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in self.options.described().items() if entry["compared"]}

    @property
    def _record(self) -> str:
        return f"{self.kind}.json"

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def _old(self) -> Path:
        return self.path.with_name(f".{self.path.name}.old")


@contextmanager
def begin_output(
    path: Path,
    kind: str,
    options: StageOptions,
    timeout: float = 0.0,
    digest: Callable[[Path], str] = files.sha256,
    renew: bool = False,
) -> Iterator[Output]:
    """Work on the folder `path`, which the command `kind` writes; one process at a time, another waits `timeout` seconds.

    `digest` is asked whether what is there is still as it was written; that of a `HashCache` reads unchanged files once.
    With `renew` what was made of other inputs or with other options is replaced.

    Raises what `Output.look` raises, LockedError, MoEficationError (not writable), CorruptArtifactError (an altered record).
    """
    output = Output(path.absolute(), kind, options, digest, renew)
    output.look()
    if output.manifest is not None:  # without a lock: an up-to-date folder may be read-only
        yield output
        return
    files.make_dirs(output.path.parent)
    with locks.held(output.path.with_name(f".{output.path.name}.lock"), str(path), timeout=timeout):
        output.prepare()
        try:
            yield output
        except BaseException:
            output.abandon()
            raise
