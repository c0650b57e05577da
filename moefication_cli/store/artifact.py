"""A finished stage: where its files are, reading it, and checking that they are what the manifest says.

Names of stages: `activations`, `graph`, `split`, `model`, `report`, and `router/NAME`, `refined/NAME`,
`finetuned/NAME`, `eval/NAME`, `baseline/NAME`.
Everything hidden belongs to this package: `RUN/.locks/STAGE/`, and beside a stage folder `.NAME.partial` (work in
progress) and `.NAME.old` (the replaced stage, for the moment of the commit). Writing is `writer.py`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moefication_cli.errors import ConfigError, CorruptArtifactError, StaleArtifactError
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.hashes import HashCache
from moefication_cli.store.layerfile import LayerFile, open_layer
from moefication_cli.store.manifest import Manifest, corrupt, layer_name

if TYPE_CHECKING:
    from torch import Tensor

Check = Literal["size", "cached", "full"]

COMMANDS = {
    "activations": "collect-activations",
    "graph": "build-graph",
    "split": "split",
    "router": "train-router",
    "refined": "apply",
    "finetuned": "finetune",
    "model": "apply",
    "eval": "eval",
    "harness": "eval",
    "baseline": "eval",
    "tune": "tune",
    "report": "report",
}
NAMED = {"router", "eval", "harness", "baseline", "refined", "finetuned"}


def check_stage(stage: str) -> None:
    """`ConfigError` unless `stage` is the name of a stage; a NAME is letters, digits, `.`, `_`, `-`, at most 100."""
    kind, _, name = stage.partition("/")
    if kind not in COMMANDS or (kind in NAMED) != ("/" in stage):
        raise ConfigError(f"there is no stage {stage!r}", f"stages are {', '.join(COMMANDS)}")
    if kind in NAMED and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"{name!r} cannot be the name of a {kind} folder", "use letters, digits, '.', '_' and '-', no path"
        )


@dataclass(frozen=True)
class StagePaths:
    """The places of one stage in a run directory."""

    run: Path
    stage: str

    @property
    def final(self) -> Path:
        return self.run / self.stage

    @property
    def partial(self) -> Path:
        return self.final.with_name(f".{self.final.name}.partial")

    @property
    def old(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")

    @property
    def locks(self) -> Path:
        return self.run / ".locks" / self.stage

    @property
    def manifest(self) -> Path:
        return self.final / "manifest.json"

    @contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        """The stage's lock: for claims and commits, seconds at most, never while a layer is worked on."""
        with locks.held(self.locks / "stage.lock", f"the folder of `{self.stage}`", timeout):
            yield

    def live_claim(self) -> Path | None:
        """The lock by which a live process works on the stage or one of its layers, None without one; writes nothing."""
        claims = (path for path in sorted(self.locks.glob("*.lock")) if path.stem != "stage")
        return next((path for path in claims if locks.is_held_now(path)), None)

    def read_manifest(self) -> Manifest | None:
        """The manifest, None if the stage was not made; `CorruptArtifactError` if it is not as it should be."""
        try:
            value = jsonio.read_object(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CorruptArtifactError(f"{self.manifest} cannot be read: {error.strerror}") from error
        return Manifest.from_json(value, self.stage, self.manifest)

    def read_manifest_or_none(self) -> Manifest | None:
        """The manifest, None also if it is corrupt."""
        try:
            return self.read_manifest()
        except CorruptArtifactError:
            return None

    def unfinished_commit(self) -> bool:
        """Whether a commit was interrupted (or is under way): `recover` settles it."""
        if not self.final.exists():
            return self.old.exists() or (self.partial / "manifest.json").exists()
        return self.old.is_symlink() or self.old.exists() or (self.final / ".work").exists()

    def recover(self) -> None:
        """Finish or undo an interrupted commit, at whatever point it stopped. Needs the stage lock.

        A complete partial folder is only put in the place of a stage that is not there: one killed before the first
        rename leaves the old stage, and the next run under the same key commits.
        """
        with files.writing(self.final):
            if not self.final.exists():
                if (self.partial / "manifest.json").exists():
                    files.replace(self.partial, self.final)
                elif self.old.exists():
                    files.replace(self.old, self.final)
        if self.final.exists():
            files.remove(self.old)
            files.remove(self.final / ".work")

    def swap(self) -> None:
        """Put the complete partial folder in the stage's place. Needs the stage lock.

        Readers that have files of the old stage open keep them. Between the two renames there is no stage; a process
        killed there leaves that to `recover`.
        """
        with files.writing(self.final):
            if self.final.exists():
                files.remove(self.old)
                files.replace(self.final, self.old)
            files.replace(self.partial, self.final)
        files.remove(self.old)
        files.remove(self.final / ".work")


def stages_of(root: Path, kind: str) -> list[str]:
    """Stages of a kind that are there or were begun, by name."""
    folder = root / kind if kind in NAMED else root
    if not folder.is_dir():
        return []
    entries = {path.name for path in folder.iterdir()}
    begun = {name[1 : -len(".partial")] for name in entries if name.startswith(".") and name.endswith(".partial")}
    made = {name for name in entries if name[0] != "." and (folder / name).is_dir()}
    names = sorted(made | begun)
    return [f"{kind}/{name}" for name in names] if kind in NAMED else [kind] if kind in names else []


def stages_in(root: Path) -> list[str]:
    """Stages that are there or were begun, in the order of the pipeline."""
    return [stage for kind in COMMANDS for stage in stages_of(root, kind)]


def leftovers_in(root: Path) -> list[Path]:
    """Folders that interrupted work has left: what a later run would go on from, and replaced stages."""
    found = []
    for stage in stages_in(root):
        paths = StagePaths(root, stage)
        found += [path for path in (paths.partial, paths.old) if path.exists()]
    return found


@dataclass(frozen=True)
class Artifact:
    """A finished stage as it was when `RunDir.read_stage` read it."""

    manifest: Manifest
    path: Path
    _identities: Mapping[str, tuple[int, int, int, int]]

    @property
    def digest(self) -> str:
        """What goes into the `inputs` of a stage that reads this one."""
        return self.manifest.digest

    @property
    def config(self) -> dict[str, Any]:
        """Configuration values by name."""
        return self.manifest.values

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage measured; `metrics["layers"][i]` for layer i."""
        return self.manifest.metrics

    @property
    def layers(self) -> list[str]:
        """FFN module paths in execution order."""
        return list(self.manifest.layers)

    def file(self, name: str) -> Path:
        """The path of a file of the manifest. `CorruptArtifactError` if it has none of that name."""
        if name not in self.manifest.files:
            raise corrupt(self.path / "manifest.json", f"lists no file {name!r}")
        return self.path / name

    @contextmanager
    def open_layer(self, layer: int | str) -> Iterator[LayerFile]:
        """Open a layer by index or FFN module path for lazy reading.

        Raises `CorruptArtifactError`, or `StaleArtifactError` if the stage was replaced since it was read: what is
        computed would otherwise be a mixture of two stages recorded under the digest of one.
        """
        index = self.manifest.layers.index(layer) if isinstance(layer, str) else layer
        name = layer_name(index)
        path = self.file(name)
        self._check_same(name)
        with open_layer(path) as opened:
            self._check_same(name)
            if opened.metadata["layer"] != self.manifest.layers[index]:
                expected = self.manifest.layers[index]
                raise corrupt(path, f"is of layer {opened.metadata['layer']!r}, expected {expected!r}")
            yield opened

    def read_layer(
        self, layer: int | str, names: list[str] | None = None
    ) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """(tensors, metadata) of a layer; errors as `open_layer`."""
        with self.open_layer(layer) as opened:
            return {n: opened.tensor(n) for n in (opened.names if names is None else names)}, opened.metadata

    def _check_same(self, name: str) -> None:
        try:
            now = files.identity(self.path / name)
        except OSError:
            now = (-1, -1, -1, -1)
        was = self._identities[name]
        same = (now[0], now[1], now[3]) == (was[0], was[1], was[3])  # not ctime: a hard link changes it
        if not same:
            raise StaleArtifactError(
                f"`{self.manifest.stage}` was replaced while it was being read ({self.path / name})",
                "run the same command again",
            )


def verified(paths: StagePaths, manifest: Manifest, hashes: HashCache, check: Check = "cached") -> Artifact:
    """The stage, after comparing every file's size and sha256 with the manifest.

    `check`: "size" alone, "cached" (hash what changed since it was last hashed) or "full" (hash everything).
    Raises `CorruptArtifactError` naming the file, expected and actual.
    """
    identities = {name: _verified_file(paths, name, entry, hashes, check) for name, entry in manifest.files.items()}
    hashes.save()
    return Artifact(manifest, paths.final, identities)


def damaged_files(paths: StagePaths, manifest: Manifest, hashes: HashCache) -> list[CorruptArtifactError]:
    """One error per file of the stage that is not as the manifest says; every byte is read."""
    found = []
    for name, entry in manifest.files.items():
        try:
            _verified_file(paths, name, entry, hashes, "full")
        except CorruptArtifactError as error:
            found.append(error)
    return found


def _verified_file(
    paths: StagePaths, name: str, entry: Mapping[str, Any], hashes: HashCache, check: Check
) -> tuple[int, int, int, int]:
    """The identity of a file that is as the manifest's `entry` says."""
    path = paths.final / name
    hint = f"run `moefication {COMMANDS[paths.stage.split('/')[0]]} {paths.run}` again with --force"
    try:
        if not path.resolve(strict=True).is_relative_to(paths.final.resolve()):
            raise corrupt(paths.manifest, f"names a file outside its folder: {name!r}")
        identity = files.identity(path)
        if identity[0] != entry["bytes"]:
            raise CorruptArtifactError(f"{path} has {identity[0]} bytes, the manifest says {entry['bytes']}", hint)
        actual = entry["sha256"] if check == "size" else hashes.sha256(path, fresh=check == "full")
        if actual != entry["sha256"]:
            actual = hashes.sha256(path, fresh=True)  # the cache must not accuse a file that is whole
    except OSError as error:
        raise CorruptArtifactError(f"{path} is in the manifest but cannot be read: {error.strerror}", hint) from error
    if actual != entry["sha256"]:
        raise CorruptArtifactError(
            f"{path} was altered: sha256 {actual[:16]}..., the manifest says {entry['sha256'][:16]}...", hint
        )
    return identity
