"""Work on one stage: resume what is finished, claim layers, save them, commit.

Everything happens in the partial folder (`partial.py`); the commit renames it whole (`artifact.py`). Locks, in
`RUN/.locks/STAGE/`:

    stage.lock        for the moment of preparing, claiming and committing
    layer_%03d.lock   while that layer is worked on; `folder.lock` while a stage without layers is made

A claim is only taken under the stage lock, so whoever holds that lock and sees no claim of others may sweep or commit.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moefication_cli.errors import CorruptArtifactError, LockedError, MoEficationError
from moefication_cli.store import files, locks
from moefication_cli.store.artifact import StagePaths, verified
from moefication_cli.store.hashes import HashCache
from moefication_cli.store.layerfile import write_layer
from moefication_cli.store.manifest import Manifest, differences, environment, layer_name, work_key
from moefication_cli.store.partial import Partial

if TYPE_CHECKING:
    from torch import Tensor

_STAGE_LOCK_SECONDS = 60.0  # commits and claims are short, but many array tasks may queue on a slow file system
_POLL_SECONDS = 0.1


@dataclass
class StageWriter:
    """What `RunDir.begin` gives to a stage.

    Callers use `up_to_date`, `manifest`, `reason`, `pending`, `save`, `missing`, `lock`, `folder`, `scratch`, `finish`;
    a stage that streams its layers to disk also `unfinished`, `move_in`, `move_back`.
    """

    paths: StagePaths
    hashes: HashCache
    config: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    layers: Sequence[str]
    targets: Sequence[int]
    device: str
    timeout: float
    on_keep: Callable[[], None]  # called before anything is kept: a layer, the stage
    reason: str | None = None  # why there is something to do; None if the stage is up to date
    manifest: Manifest | None = None  # of the stage that is up to date
    partial: Partial = field(init=False)
    _claims: dict[str, tuple[FileLock, float]] = field(default_factory=dict)
    _begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        key = work_key(self.paths.stage, self.compared, self.inputs, self.layers)
        self.partial = Partial(self.paths.partial, key, len(self.layers), self.hashes)

    @property
    def up_to_date(self) -> bool:
        """Nothing to do: `manifest` is the stage's."""
        return self.manifest is not None

    @property
    def compared(self) -> dict[str, Any]:
        """The configuration values that decide freshness."""
        return {name: entry["value"] for name, entry in self.config.items() if entry["compared"]}

    @property
    def folder(self) -> Path:
        """Where a stage puts files that are not layers. Every file here is hashed into the manifest by `finish`."""
        return self.partial.folder

    @property
    def scratch(self) -> Path:
        """For a stage's own intermediate files: kept when an interrupted stage resumes, deleted by the commit."""
        path = self.partial.work / "scratch"
        files.make_dirs(path)
        return path

    # -- preparing ---------------------------------------------------------------------------------------------------

    def freshness(self) -> tuple[Manifest | None, str | None]:
        """(manifest, None) of a stage that is whole and up to date, else (None, why not). Writes nothing."""
        try:
            manifest = self.paths.read_manifest()
            if manifest is None:
                return None, f"`{self.paths.stage}` has not been made"
            if reason := differences(manifest, self.compared, self.inputs, self.layers):
                return None, reason
            verified(self.paths, manifest, self.hashes)
        except CorruptArtifactError as error:
            return None, error.message
        return manifest, None

    def prepare(self, force: bool, join: bool = False) -> None:
        """Recover, check freshness, sweep work of another key, discard what `force` redoes. Waits for live claims."""
        if not self.layers:
            self._claims["folder"] = self._wait_for("folder", f"`{self.paths.stage}`", self.timeout)
        deadline = time.monotonic() + self.timeout
        while True:
            with self._stage_lock():
                busy = self._prepare(force, join)
            if busy is None:
                return
            if time.monotonic() > deadline:
                raise locks.locked_error(busy, f"`{self.paths.stage}`")
            time.sleep(_POLL_SECONDS)

    def _prepare(self, force: bool, join: bool) -> Path | None:
        self.paths.recover()
        self.manifest, self.reason = self.freshness()
        if force or join:
            self.manifest, self.reason = None, self.reason or "--force"
        if self.manifest is not None:
            return None
        self._refuse_foreign_folder()
        ours = self.partial.is_ours()
        redo = set(self.targets) if force else set()
        if busy := self._other_claim({f"layer_{i:03d}" for i in redo} if ours else None):
            return busy
        if not ours:
            self.partial.restart(
                old=self.paths.read_manifest_or_none(),
                final=self.paths.final,
                description={"config": self.compared, "inputs": self.inputs, "layers": len(self.layers)},
            )
        for index in redo:
            self.partial.discard(index)
        if force and len(redo) == len(self.layers):
            files.remove(self.partial.work / "scratch")
        if not self.layers:
            self.partial.clear()
        files.remove(self.partial.manifest)  # of a commit that was interrupted before its first rename
        return None

    def _refuse_foreign_folder(self) -> None:
        final = self.paths.final
        if final.exists() and not self.paths.manifest.exists() and (not final.is_dir() or any(final.iterdir())):
            raise MoEficationError(
                f"{final} exists and was not made by this program (it has no manifest.json)",
                "move it away, or choose another run directory",
            )

    # -- layers ------------------------------------------------------------------------------------------------------

    def pending(self) -> Iterator[int]:
        """Claim and yield the layers to do, in order; `save` ends a claim.

        Layers that other processes hold are left to them: when nothing else is free it waits for them, takes over
        those whose holder died, and raises `LockedError` after `timeout` seconds.
        """
        deadline = None
        finished: set[int] = set()
        while not self.up_to_date:
            busy = None
            for index in self.targets:
                name = f"layer_{index:03d}"
                if index in finished or name in self._claims:
                    continue
                with self._stage_lock():
                    lock = locks.try_acquire(self.paths.locks / f"{name}.lock")
                    # Looked at with the lock in hand: its holder may have finished the layer a moment ago
                    if index in self._done():
                        finished.add(index)
                        if lock is not None:
                            lock.release()
                        continue
                if lock is None:
                    busy = index
                    continue
                self._claims[name] = (lock, time.perf_counter())
                deadline = None
                yield index
            if busy is None:
                return
            deadline = time.monotonic() + self.timeout if deadline is None else deadline
            if time.monotonic() > deadline:
                what = f"layer {busy} ({self.layers[busy]}) of `{self.paths.stage}`"
                raise locks.locked_error(self.paths.locks / f"layer_{busy:03d}.lock", what)
            time.sleep(_POLL_SECONDS)

    def save(
        self,
        index: int,
        tensors: "Mapping[str, Tensor]",
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Write a claimed layer and its record, and end the claim.

        `metadata` goes into the file (`layer` is added) and so into the digest: nothing that differs from run to run.
        `metrics` go to `manifest.metrics["layers"][index]`. `seconds` defaults to the time since the claim.
        """
        self.on_keep()
        path = self.folder / layer_name(index)
        tmp = self.partial.work / f"{path.name}.tmp"
        write_layer(path, tensors, {**(metadata or {}), "layer": self.layers[index]}, tmp)
        self._record(index, metrics, seconds)

    def move_in(self, index: int, path: Path, metrics: Mapping[str, Any] | None = None) -> None:
        """`save` of a layer file that stands whole in `scratch`: it is moved into place."""
        self.on_keep()
        target = self.folder / layer_name(index)
        with files.writing(target):
            files.replace(path, target)
        self._record(index, metrics, None)

    def move_back(self, index: int, path: Path) -> None:
        """Move back to `path` what `move_in` had moved when the process was killed before the layer was recorded."""
        target = self.folder / layer_name(index)
        if not path.exists() and target.exists():
            files.replace(target, path)

    def _record(self, index: int, metrics: Mapping[str, Any] | None, seconds: float | None) -> None:
        name, path = f"layer_{index:03d}", self.folder / layer_name(index)
        lock, begun = self._claims[name]
        seconds = time.perf_counter() - begun if seconds is None else seconds
        entry = {"sha256": self.hashes.sha256(path), "bytes": path.stat().st_size}
        self.partial.record(index, entry, {**(metrics or {}), "layer": self.layers[index], "seconds": seconds})
        del self._claims[name]
        lock.release()

    def unfinished(self) -> list[int]:
        """Indices of the layers nobody has finished yet."""
        done = set(range(len(self.layers))) if self.up_to_date else self._done()
        return [index for index in range(len(self.layers)) if index not in done]

    def missing(self) -> list[str]:
        """The layers nobody has finished yet."""
        return [self.layers[index] for index in self.unfinished()]

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock of the stage's own (a data shard); yields whether it is ours, which it always is with `wait`.

        Raises `LockedError` after `timeout` seconds of waiting.
        """
        try:
            self._claims[name] = self._wait_for(name, f"`{self.paths.stage}` ({name})", self.timeout if wait else 0.0)
        except LockedError:
            if wait:
                raise
        try:
            yield name in self._claims
        finally:
            if name in self._claims:
                self._claims.pop(name)[0].release()

    def abandon(self) -> None:
        """Leave no trace of work that failed before it had anything to keep; `RunDir.begin` does it."""
        if self.up_to_date:
            return
        with self._stage_lock():
            if self.partial.is_ours() and not self.partial.worth_keeping() and not self._other_claim(None):
                files.remove(self.partial.folder)

    def release(self) -> None:
        """End all claims and keep the hashes; `RunDir.begin` does it."""
        while self._claims:
            self._claims.popitem()[1][0].release()
        self.hashes.save()

    # -- commit ------------------------------------------------------------------------------------------------------

    def finish(self, metrics: Mapping[str, Any] | None = None, seconds: float | None = None) -> Manifest | None:
        """Commit the stage if every layer is there; None if layers are missing or others still hold some.

        The process that lands the last layer commits; one that comes after that gets the committed manifest.
        `seconds` is work beside the layers; for a stage without layers it defaults to the time since `begin`.
        """
        if self.manifest is not None:
            return self.manifest
        if seconds is None:
            seconds = 0.0 if self.layers else time.perf_counter() - self._begun
        if not self.layers:
            for name in self.partial.list_files():
                self.hashes.sha256(self.folder / name)  # gigabytes perhaps: not under the stage lock
        self.on_keep()
        with self._stage_lock():
            if len(self._done()) < len(self.layers) or self._other_claim(None):
                return None
            if not self.partial.is_ours():
                self.manifest = self.paths.read_manifest()
                return self.manifest
            listed, per_layer = self.partial.collect()
            manifest = Manifest.make(
                stage=self.paths.stage,
                config=self.config,
                inputs=self.inputs,
                layers=self.layers,
                files=listed,
                metrics={**(metrics or {}), **({"layers": per_layer} if self.layers else {})},
                seconds=seconds + sum(layer["seconds"] for layer in per_layer),
                environment=environment(self.device),
            )
            # As it will be read: a stage that this program would refuse must not be committed.
            self.manifest = Manifest.from_json(manifest.to_json(), self.paths.stage, self.partial.manifest)
            self.partial.complete(self.manifest)
            self.paths.swap()
            self.hashes.moved(self.paths.partial, self.paths.final)
        return self.manifest

    def _done(self) -> set[int]:
        """Indices of finished layers, here or in the stage that another process has committed meanwhile."""
        if self.partial.is_ours():
            return self.partial.done()
        committed = self.paths.read_manifest_or_none()
        if committed is not None and committed.key == self.partial.key:
            return set(range(len(self.layers)))
        raise LockedError(
            f"`{self.paths.stage}` was begun anew with other options by another process", "run the command again"
        )

    # -- locks -------------------------------------------------------------------------------------------------------

    def _stage_lock(self) -> contextlib.AbstractContextManager[None]:
        return self.paths.locked(max(self.timeout, _STAGE_LOCK_SECONDS))

    def _wait_for(self, name: str, what: str, timeout: float) -> tuple[FileLock, float]:
        path = self.paths.locks / f"{name}.lock"
        deadline = time.monotonic() + timeout
        while True:
            with self._stage_lock():
                lock = locks.try_acquire(path)
            if lock is not None:
                return lock, time.perf_counter()
            if time.monotonic() > deadline:
                raise locks.locked_error(path, what)
            time.sleep(_POLL_SECONDS)

    def _other_claim(self, names: Collection[str] | None) -> Path | None:
        """A lock that another live process holds, among `names` or all of this stage. Needs the stage lock."""
        for path in sorted(self.paths.locks.glob("*.lock")):
            chosen = path.stem != "stage" if names is None else path.stem in names
            if chosen and path.stem not in self._claims and locks.is_held(path):
                return path
        return None
