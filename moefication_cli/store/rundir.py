"""A run directory: `run.json`, its stages, and whether they still fit together. The entry point of this package.

    run = RunDir("artifacts/bert")
    run.remember(model="bert", revision="...", fingerprint="...")
    graph = run.require("graph")
    with run.begin("split", StageOptions({...}, inputs={"graph": graph.digest}, layers=graph.layers)) as work:
        for i in work.pending():
            tensors, _ = graph.read_layer(i)
            work.save(i, {"expert_F": ...}, metrics={"cut": ...})
        manifest = work.finish({"method": "graph"})     # None while other processes have layers to do

Reading never writes (but for the hash cache, best effort). Only this package touches run directories.
"""

import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moefication_cli.errors import (
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    MoEficationError,
    StaleArtifactError,
)
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.artifact import (
    COMMANDS,
    Artifact,
    Check,
    StagePaths,
    check_stage,
    leftovers_in,
    stages_in,
    verified,
)
from moefication_cli.store.hashes import HashCache
from moefication_cli.store.manifest import BASE_MODEL, SCHEMA_VERSION, Manifest, check_fields, check_schema, differences
from moefication_cli.store.options import StageOptions
from moefication_cli.store.writer import StageWriter

LOCK_TIMEOUT = 5.0


@dataclass(frozen=True)
class RunInfo:
    """`run.json`: what later stages need to know of the first command. None: not said yet."""

    schema: str = f"moefication/run@{SCHEMA_VERSION}"
    model: str | None = None  # hub id or folder
    revision: str | None = None  # resolved commit, None for a folder
    fingerprint: str | None = None  # of weights and config
    task: str | None = None
    prompt: str | None = None
    label_words: str | None = None
    fields: Mapping[str, Any] | None = None  # text and label fields of the data
    ffn: str | None = None  # FFN described by hand, `--ffn`

    def options(self) -> dict[str, Any]:
        """Options of the first command by name, as they are known now: said then, or found."""
        names = ("model", "revision", "ffn", "task", "prompt", "label_words")
        return {name: getattr(self, name) for name in names} | dict(self.fields or {})


class RunDir:
    """One run directory; it need not exist yet. `lock_timeout`: seconds to wait for other processes."""

    def __init__(self, path: str | Path, lock_timeout: float = LOCK_TIMEOUT) -> None:
        self.root = Path(path)
        self.lock_timeout = lock_timeout
        self.hashes = HashCache(self.root)
        self._noted: dict[str, Any] = {}

    def path(self, stage: str) -> Path:
        """The folder of a stage. `ConfigError` if there is no such stage or its name is not a plain name."""
        return self._paths(stage).final

    def _paths(self, stage: str) -> StagePaths:
        check_stage(stage)
        return StagePaths(self.root, stage)

    def names(self, kind: str) -> list[str]:
        """Names of the finished stages of a kind with names: `names("router")` -> ["mlp", "similarity"]."""
        folder = self.root / kind
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if p.name[0] != "." and (p / "manifest.json").is_file())

    # -- run.json ----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> RunInfo:
        """`run.json` and what is noted, or an empty record. Raises `CorruptArtifactError`."""
        return replace(self._written(), **self._noted)

    def _written(self) -> RunInfo:
        path = self.root / "run.json"
        try:
            value = jsonio.read_object(path)
        except (FileNotFoundError, NotADirectoryError):
            return RunInfo()
        check_schema(value.get("schema"), "run", path)
        # Versions before 0.3 remembered the permission to run a model's code; it is given anew to each command
        value.pop("trust_remote_code", None)
        value.pop("seal", None)  # `verify` looks at it; people may edit the file, and stages compare what they read
        check_fields(value, RunInfo, path)
        return RunInfo(**value)

    def note(self, **known: Any) -> None:
        """Set fields of `info` now (None leaves a field as it is), and of `run.json` once a stage keeps something.

        A command that fails before it has made anything leaves `run.json` as it was.
        """
        if odd := known.keys() - ({f.name for f in fields(RunInfo)} - {"schema"}):
            raise TypeError(f"run.json has no field {sorted(odd)[0]!r}")
        self._noted |= {name: jsonio.plain(value) for name, value in known.items() if value is not None}

    def remember(self, **known: Any) -> RunInfo:
        """`note`, and write `run.json` if that changes it."""
        self.note(**known)
        written = self._written()
        if replace(written, **self._noted) == written and (self.root / "run.json").exists():
            self._noted.clear()
            return written
        files.make_dirs(self.root)
        with locks.held(self.root / ".locks" / "run.lock", "run.json", max(self.lock_timeout, 10.0)):
            info = self.info
            check_fields(asdict(info), RunInfo, self.root / "run.json")
            jsonio.write(self.root / "run.json", jsonio.sealed(asdict(info)))
            self._noted.clear()
        return info

    def branch(self, name: str, share: Sequence[str]) -> "RunDir":
        """A run directory RUN/<name> for the same model that reads the stages in `share` from this one."""
        other = RunDir(self.root / name, self.lock_timeout)
        other.remember(**{f.name: getattr(self.info, f.name) for f in fields(RunInfo) if f.name != "schema"})
        for stage in share:
            link = other.path(stage)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(self.path(stage), link.parent), target_is_directory=True)
        return other

    # -- reading -----------------------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage, None if it has not been made; its files are not looked at."""
        paths = self._paths(stage)
        manifest = paths.read_manifest()
        if manifest is None and paths.unfinished_commit():
            # A commit is between its two renames, or was killed there.
            with paths.locked(max(self.lock_timeout, 10.0)):
                paths.recover()
            manifest = paths.read_manifest()
        return manifest

    def read_stage(self, stage: str, check: Check = "cached") -> Artifact:
        """A finished stage with its files checked against the manifest (`check`: see `stage.verified`).

        Raises `MissingArtifactError` with the command to run, `CorruptArtifactError` naming the file.
        """
        paths = self._paths(stage)
        manifest = self.manifest(stage)
        while manifest is not None:
            try:
                return verified(paths, manifest, self.hashes, check)
            except CorruptArtifactError:
                now = self.manifest(stage)
                if now == manifest:
                    raise
                manifest = now  # it was replaced while we looked
        raise MissingArtifactError(
            f"{paths.final} has not been made: this needs `{stage}`", f"run `{self.command(stage)}` first"
        )

    def require(self, stage: str, fingerprint: str | None = None, check: Check = "cached") -> Artifact:
        """`read_stage`, and everything it was made from is still as it was, all the way up.

        `fingerprint`: the source model's today, by default what `run.json` says. An upstream stage that was deleted
        does not count as changed. Raises also `StaleArtifactError` with the command to run.
        """
        if reason := self.why_stale(stage, fingerprint=fingerprint):
            stale = self._oldest_stale(stage, fingerprint)
            raise StaleArtifactError(f"`{stage}` is stale: {reason}", f"run `{self.command(stale)}`")
        return self.read_stage(stage, check)

    def why_stale(
        self,
        stage: str,
        *,
        config: Mapping[str, Any] | None = None,
        compared: Collection[str] | None = None,
        inputs: Mapping[str, str] | None = None,
        layers: Sequence[str] | None = None,
        fingerprint: str | None = None,
    ) -> str | None:
        """Why a finished stage is not what would be made today, as a sentence; None if it is, or is not there.

        With `config` and `inputs` (as for `begin`) they are compared; without them only what lies upstream.
        "`num_experts` 96 -> 48", "`activations` changed", "`graph` is stale: `activations` changed"
        """
        manifest = self.manifest(stage)
        if manifest is None:
            return None
        values = manifest.values if config is None else config
        names = [n for n, e in manifest.config.items() if e["compared"]] if config is None else compared
        today = {n: v for n, v in values.items() if names is None or n in names}
        known = dict(inputs or {})
        if inputs is None:
            known = {n: self._digest_of(n, fingerprint) or recorded for n, recorded in manifest.inputs.items()}
        if reason := differences(manifest, today, known, layers):
            return reason
        for name in manifest.inputs:
            if self._is_stage(name) and (reason := self.why_stale(name, fingerprint=fingerprint)):
                return f"`{name}` is stale: {reason}"
        return None

    def _oldest_stale(self, stage: str, fingerprint: str | None) -> str:
        manifest = self.manifest(stage)
        for name in manifest.inputs if manifest else ():
            if self._is_stage(name) and self.why_stale(name, fingerprint=fingerprint):
                return self._oldest_stale(name, fingerprint)
        return stage

    def _digest_of(self, name: str, fingerprint: str | None) -> str | None:
        if name == BASE_MODEL:
            return fingerprint or self.info.fingerprint
        manifest = self.manifest(name) if self._is_stage(name) else None
        return manifest.digest if manifest else None

    @staticmethod
    def _is_stage(name: str) -> bool:
        try:
            check_stage(name)
        except ConfigError:
            return False
        return True

    def command(self, stage: str) -> str:
        """The command that makes a stage: the one that made it if it is there, else one with the least options."""
        kind, _, name = stage.partition("/")
        manifest = self._paths(stage).read_manifest_or_none()
        words = manifest.command_line if manifest else []
        if len(words) > 2 and words[1] in {COMMANDS[kind], "run"}:
            if not words[2].startswith("-"):  # the run directory, which may have been copied or moved since
                words[2] = str(self.root)
            return shlex.join(words)
        parts = ["moefication", COMMANDS[kind], str(self.root)]
        if kind == "activations":
            model = [] if (self.root / "run.json").exists() else ["--model", "MODEL"]
            parts += [*model, "--data", "DATA"]
        elif kind == "harness":
            parts += ["--lm-eval", "TASKS"]
        if kind in {"router", "eval", "harness", "finetuned"} and name != "default":
            parts += ["--router" if kind == "router" else "--name", name]
        return shlex.join(parts)

    # -- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def begin(self, stage: str, options: StageOptions) -> Iterator[StageWriter]:
        """Work on a stage; see `StageWriter` and the module docstring. Leaving the block without `finish` keeps what is saved.

        Raises `LockedError`, `MoEficationError` (not writable), `ConfigError` (an index out of range).
        """
        work = StageWriter(
            paths=self._paths(stage),
            hashes=self.hashes,
            config=options.described(),
            inputs=dict(options.inputs),
            layers=tuple(options.layers),
            targets=options.targets(stage),
            device=options.device,
            timeout=self.lock_timeout,
            on_keep=self._write_noted,
        )
        if not (options.force or options.join):
            # Without locks first: an up-to-date stage in a read-only directory is fine.
            work.manifest, work.reason = work.freshness()
        try:
            if not work.up_to_date or work.paths.unfinished_commit():
                files.make_dirs(work.paths.final.parent)
                work.prepare(options.force, options.join)
            try:
                yield work
            except BaseException:
                work.abandon()
                raise
            self._write_noted()
        finally:
            work.release()

    # -- deleting ----------------------------------------------------------------------------------------------------

    def remove(self, stage: str) -> None:
        """Delete a stage and what was begun of it. Raises LockedError while somebody works on it, and MoEficationError for
        a folder of that name which this program did not make.
        """
        paths = self._paths(stage)
        with paths.locked(self.lock_timeout):
            self._refuse_busy(paths)
            made = paths.final.is_symlink() or paths.manifest.exists() or not paths.final.exists()
            if not made:
                raise MoEficationError(
                    f"{paths.final} was not made by this program: it has no manifest.json", "delete it"
                )
            for path in (paths.final, paths.partial, paths.old):
                files.remove(path)

    def remove_leftovers(self) -> None:
        """Delete what interrupted work on any stage has left. Raises LockedError while somebody works there."""
        for path in leftovers_in(self.root):
            kind = path.parent.name if path.parent != self.root else ""
            name = path.name[1:].removesuffix(".partial").removesuffix(".old")
            paths = self._paths(f"{kind}/{name}" if kind else name)
            with paths.locked(self.lock_timeout):
                self._refuse_busy(paths)
                files.remove(path)

    def remove_all(self) -> None:
        """Delete the whole run directory. Raises LockedError while somebody works there."""
        for stage in stages_in(self.root):
            self._refuse_busy(self._paths(stage))
        files.remove(self.root)

    @staticmethod
    def _refuse_busy(paths: StagePaths) -> None:
        if (path := paths.live_claim()) is not None:
            raise locks.locked_error(path, f"`{paths.stage}`")

    def _write_noted(self) -> None:
        if self._noted:
            self.remember()
