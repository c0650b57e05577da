"""The partial folder of a stage: what unfinished work has left, and under which key it may be kept.

`.NAME.partial/` holds finished layer files and whatever else the stage writes; `.work/` in it holds `key.json` (what
this work is), one record per finished layer, and `scratch/`. Takes no locks; `writer.py` says when it may be used.
On network file systems names are looked up by listing the folder: a negative lookup may be cached for seconds.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import files, jsonio
from moefication_cli.store.hashes import HashCache
from moefication_cli.store.manifest import Manifest, layer_name

GROWING = ".growing"  # suffix of files in scratch that others there give a meaning to


@dataclass
class Partial:
    """The partial folder of work `key` over `num_layers` layers."""

    folder: Path
    key: str
    num_layers: int
    hashes: HashCache
    _seen: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Our own files; deleted by the commit."""
        return self.folder / ".work"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def is_ours(self) -> bool:
        """Whether the folder is there and holds work under our key."""
        try:
            return jsonio.read_object(self.work / "key.json").get("key") == self.key
        except (OSError, CorruptArtifactError):
            return False

    def restart(self, old: Manifest | None, final: Path, description: Mapping[str, Any]) -> None:
        """Sweep the folder and begin anew.

        The intact layers of a finished stage `old` in `final` are linked in if it has our key: so a damaged or forced
        layer is redone alone.
        """
        files.remove(self.folder)
        files.make_dirs(self.work)
        if old is not None and old.key == self.key:
            for index in range(self.num_layers):
                self._keep(old, final, index)
        jsonio.write(self.work / "key.json", {"key": self.key, **description})

    def _keep(self, old: Manifest, final: Path, index: int) -> None:
        name = layer_name(index)
        with contextlib.suppress(OSError, LookupError, TypeError):
            if (final / name).is_symlink() or self.hashes.sha256(final / name) != old.files[name]["sha256"]:
                return
            metrics = dict(old.metrics["layers"][index])
            try:
                os.link(final / name, self.folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(final / name, self.folder / name)
            self.record(index, old.files[name], metrics)

    def clear(self) -> None:
        """Delete everything but our own files."""
        for path in self.folder.iterdir():
            if path != self.work:
                files.remove(path)

    def record(self, index: int, entry: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Say that a layer is finished: its file's {sha256, bytes} and its metrics."""
        record = {"key": self.key, "file": dict(entry), "metrics": jsonio.plain(metrics)}
        jsonio.write(self._record(index), record)
        self._seen[index] = record

    def discard(self, index: int) -> None:
        """Forget that a layer is finished, and its file."""
        files.remove(self._record(index))
        files.remove(self.folder / layer_name(index))
        self._seen.pop(index, None)

    def done(self) -> set[int]:
        """Indices of the finished layers."""
        present = set(os.listdir(self.work))  # noqa: PTH208 - names only
        return {i for i in range(self.num_layers) if self._record(i).name in present and self._read(i) is not None}

    def worth_keeping(self) -> bool:
        """Whether a later run of the same work could go on from here: finished layers, or files in `scratch`.

        What still grows there does not count: other files say how far it has come.
        """
        scratch = self.work / "scratch"
        return bool(self.done()) or any(path.is_file() and path.suffix != GROWING for path in scratch.rglob("*"))

    def _record(self, index: int) -> Path:
        return self.work / f"layer_{index:03d}.json"

    def _read(self, index: int) -> dict[str, Any] | None:
        if index not in self._seen:
            with contextlib.suppress(OSError, LookupError, TypeError, CorruptArtifactError):
                record = jsonio.read_object(self._record(index))
                size = (self.folder / layer_name(index)).stat().st_size
                if record["key"] == self.key and record["file"]["bytes"] == size and "seconds" in record["metrics"]:
                    self._seen[index] = record
        return self._seen.get(index)

    def list_files(self) -> list[str]:
        """Relative names of the files for the manifest: all but our own; everything is fsynced on the way."""
        names = []
        for root, folders, found in os.walk(self.folder):
            folder = Path(root)
            if folder == self.folder:
                folders[:] = [f for f in folders if f != self.work.name]
                found = [f for f in found if f != self.manifest.name]
            with files.writing(folder):
                for path in [folder, *(folder / name for name in found)]:
                    files.fsync(path)
            names += [(folder / name).relative_to(self.folder).as_posix() for name in found]
        return sorted(names)

    def collect(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """(files, metrics per layer) for the manifest. `CorruptArtifactError` if a layer is not as it was saved."""
        for left in self.folder.glob(".*.tmp"):  # by a writer that was killed
            files.remove(left)
        listed = {name: files.described(self.folder / name, self.hashes.sha256) for name in self.list_files()}
        per_layer = []
        self._seen.clear()  # another process may have redone a layer since we looked
        for index in range(self.num_layers):
            record, name = self._read(index), layer_name(index)
            if record is None or listed.get(name) != record["file"]:
                self.discard(index)
                raise CorruptArtifactError(
                    f"{self.folder / name} was altered after it was written", "run the same command again"
                )
            per_layer.append(record["metrics"])
        return listed, per_layer

    def complete(self, manifest: Manifest) -> None:
        """Put the manifest in, in one step: from here on the folder is a whole stage."""
        written = self.work / self.manifest.name
        jsonio.write(written, manifest.to_json())
        with files.writing(self.manifest):
            files.replace(written, self.manifest)
