"""What is damaged is refused by name; a place that cannot be written to costs nothing that is there."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_directories import FORK, begin, done, one_file, split

from moefication_cli.errors import (
    CorruptArtifactError,
    MissingArtifactError,
    MoEficationError,
)
from moefication_cli.store import files, jsonio
from moefication_cli.store.manifest import Manifest
from moefication_cli.store.rundir import RunDir


def damage_flip(folder: Path) -> None:
    path = folder / "layer_001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "layer_001.safetensors", 100)


def damage_delete(folder: Path) -> None:
    (folder / "layer_001.safetensors").unlink()


def damage_swap(folder: Path) -> None:
    (folder / "layer_001.safetensors").write_bytes((folder / "layer_002.safetensors").read_bytes())


def damage_symlink(folder: Path) -> None:
    path = folder / "layer_001.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete, damage_swap, damage_symlink])
def test_damaged_stage_is_corrupt_and_names_the_file(run: RunDir, damage: Callable[[Path], None]) -> None:
    first = done(split(run))
    assert run.read_stage("split").digest == first.digest
    damage(run.path("split"))
    with pytest.raises(CorruptArtifactError, match="layer_001") as caught:
        run.read_stage("split")
    assert caught.value.exit_code == 4 and caught.value.hint
    assert done(split(run)).files == first.files, "running the stage again mends it"
    assert run.read_stage("split", check="full")


def test_edit_that_keeps_size_and_time_is_seen(run: RunDir) -> None:
    split(run)
    path = run.path("split") / "layer_001.safetensors"
    before = path.stat()
    damage_flip(run.path("split"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptArtifactError, match="altered"):
        run.read_stage("split")
    assert run.read_stage("split", check="size")


def edit_manifest(run: RunDir, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run.path("split") / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


BAD_NAMES = ["../run.json", "/etc/passwd", "a/../../b", "a\0b", "", ".", "a//b", "C:\\x", "a\\b"]
EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "stage": lambda m: m.update(stage="graph"),
    "unknown key": lambda m: m.update(extra=1),
    "missing key": lambda m: m.pop("seconds"),
    "wrong type": lambda m: m.update(seconds="1"),
    "bool for float": lambda m: m.update(seconds=True),
    "altered config": lambda m: m["config"]["num_experts"].update(value=5),
    "config entry": lambda m: m["config"].update(num_experts=5),
    "file entry": lambda m: m["files"]["layer_001.safetensors"].pop("bytes"),
    "hash": lambda m: m["files"]["layer_001.safetensors"].update(sha256="0"),
    "no layer file": lambda m: m["files"].pop("layer_001.safetensors"),
    "inputs": lambda m: m["inputs"].update(graph=3),
    "schema": lambda m: m.update(schema="moefication/graph@1"),
    "schema type": lambda m: m.update(schema=1),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_manifest_is_corrupt(run: RunDir, edit: Callable[[dict[str, Any]], object], sealed: bool) -> None:
    first = done(split(run))
    edit_manifest(run, lambda m: None if sealed else m.pop("seal"))  # as written before 0.3: each field is checked
    assert run.read_stage("split").digest == first.digest
    edit_manifest(run, edit)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json"):
        run.read_stage("split")
    assert done(split(run)).digest == first.digest


@pytest.mark.parametrize("name", BAD_NAMES)
def test_manifest_with_a_fitting_digest_cannot_name_files_outside(run: RunDir, name: str) -> None:
    split(run)

    def edit(value: dict[str, Any]) -> None:
        value["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        made = Manifest.make(**{k: v for k, v in value.items() if k not in {"schema", "digest", "seal"}})
        value |= {"digest": made.digest, "seal": made.seal}

    edit_manifest(run, edit)
    with pytest.raises(CorruptArtifactError, match="names a file outside its folder"):
        run.read_stage("split")


@pytest.mark.parametrize("edit", [
    lambda m: m["metrics"]["layers"][1].update(index=8), lambda m: m["inputs"].update(base_model="e" * 64),
])  # fmt: skip
def test_what_later_stages_decide_by_is_sealed(run: RunDir, edit: Callable[[dict[str, Any]], object]) -> None:
    split(run)
    edit_manifest(run, edit)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json was altered"):
        run.read_stage("split")
    edit_manifest(run, lambda m: m.pop("seal"))
    assert run.read_stage("split")


def test_newer_manifest_asks_for_an_upgrade(run: RunDir) -> None:
    split(run)
    edit_manifest(run, lambda m: m.update(schema="moefication/split@2", something="new"))
    with pytest.raises(CorruptArtifactError, match="newer version") as caught:
        run.read_stage("split")
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', '{"schema": 1, "schema": 2}', "\0", "null"])
def test_manifest_that_is_not_strict_json(run: RunDir, text: str) -> None:
    split(run)
    (run.path("split") / "manifest.json").write_text(text)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json"):
        run.read_stage("split")
    assert done(split(run))


def test_damaged_hash_cache_costs_time_only(run: RunDir) -> None:
    first = done(split(run))
    for text in ["{", '{"split/layer_000.safetensors": 1}', "[]"]:
        (run.root / ".cache" / "hashes.json").write_text(text)
        assert RunDir(run.root).read_stage("split").digest == first.digest


def edit_hashes(run: RunDir, edit: Callable[[dict[str, Any]], object], sealed: bool) -> None:
    path = run.root / ".cache" / "hashes.json"
    value = json.loads(path.read_text())
    edit(value["files"])
    path.write_text(json.dumps(value | ({"digest": jsonio.digest(value["files"])} if sealed else {})))


def test_a_wrong_cached_hash_accuses_nobody_and_an_edited_cache_excuses_nobody(run: RunDir) -> None:
    first = done(split(run))
    name = "split/layer_001.safetensors"
    edit_hashes(run, lambda known: known[name].__setitem__(4, "0" * 64), sealed=True)
    assert RunDir(run.root).read_stage("split").digest == first.digest

    damage_flip(run.path("split"))
    entry = [*files.identity(run.root / name), first.files["layer_001.safetensors"]["sha256"]]
    edit_hashes(run, lambda known: known.update({name: entry}), sealed=False)
    with pytest.raises(CorruptArtifactError, match="altered"):
        RunDir(run.root).read_stage("split")
    (run.root / ".cache" / "hashes.json").unlink()
    RunDir(run.root).read_stage("split", check="size")


def test_commit_leaves_the_hashes_known(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    split(run)
    read: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or "0" * 64)
    other = RunDir(run.root)
    other.read_stage("split")
    assert read == []
    with pytest.raises(CorruptArtifactError):
        other.read_stage("split", check="full")
    assert read


def test_folder_of_somebody_else_is_not_replaced(run: RunDir) -> None:
    precious = run.root / "model" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(MoEficationError, match="not made by this program"):
        one_file(run)
    assert precious.read_text() == "x"


def test_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = RunDir(tmp_path / "file" / "run")
    with pytest.raises(MoEficationError, match="cannot write"):
        split(run)
    with pytest.raises(MoEficationError, match="cannot write"):
        run.remember(model="m")
    with pytest.raises(MissingArtifactError):
        run.read_stage("split")


def test_read_only_run_directory_can_be_read_and_says_that_it_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        Path(parent).chmod(0o755)
        run = RunDir(Path(parent) / "run", lock_timeout=0.3)
        first = done(split(run))
        files.remove(run.root / ".cache")
        folders = [run.root, *(p for p in run.root.rglob("*") if p.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        reader, writer = FORK.Pipe(duplex=False)

        def unprivileged() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anywhere
            with begin(RunDir(run.root)) as work:
                up_to_date = work.finish() == first
            try:
                split(RunDir(run.root), 8)
                message = ""
            except MoEficationError as error:
                message = f"{error.message} | {error.hint}"
            writer.send((RunDir(run.root).read_stage("split").digest, up_to_date, message))

        process = FORK.Process(target=unprivileged)
        process.start()
        process.join(30)
        assert process.exitcode == 0
        digest, up_to_date, message = reader.recv()
        for folder in folders:
            folder.chmod(0o755)
        assert digest == first.digest and up_to_date
        assert "cannot write" in message and "Permission denied" in message and "choose a run directory" in message
