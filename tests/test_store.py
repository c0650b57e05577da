"""The store: what is written reads back, what is damaged is refused, a killed process never leaves half a stage."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefication_cli.errors import (
    ConfigError,
    CorruptArtifactError,
    LockedError,
    MissingArtifactError,
    MoEficationError,
    NonFiniteError,
    StaleArtifactError,
)
from moefication_cli.store import files, jsonio, locks
from moefication_cli.store.artifact import StagePaths
from moefication_cli.store.layerfile import expect, open_layer, read_layer, read_metadata, write_layer
from moefication_cli.store.manifest import Manifest
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.writer import StageWriter

LAYERS = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "encoder.layer.3"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of what was fsynced. Not really done: these tests kill processes, they cannot cut the power."""
    inodes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: inodes.append(os.fstat(fd).st_ino))
    return inodes


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run dir é", lock_timeout=0.3)


def tensors_of(index: int, experts: int) -> dict[str, torch.Tensor]:
    return {"expert_F": torch.arange(64, dtype=torch.int32) % experts + index}


def begin(run: RunDir, experts: int = 4, **options: Any) -> contextlib.AbstractContextManager[StageWriter]:
    options = {"inputs": {"base_model": "f" * 64}, "layers": LAYERS, **options}
    config = {"num_experts": experts, "batch_size": options.pop("batch_size", 8)}
    return run.begin("split", config=config, compared={"num_experts"}, **options)


def split(
    run: RunDir, experts: int = 4, after: Callable[[int], None] = lambda i: None, **options: Any
) -> Manifest | None:
    with begin(run, experts, **options) as work:
        for i in work.pending():
            work.save(i, tensors_of(i, experts), metrics={"index": i})
            after(i)
        return work.finish({"method": "test"})


def done(manifest: Manifest | None) -> Manifest:
    assert manifest is not None
    return manifest


def one_file(run: RunDir, stage: str = "model", content: str = "x", **options: Any) -> Manifest:
    with run.begin(stage, config={"a": 1}, **options) as work:
        if not work.up_to_date:
            (work.folder / "sub").mkdir()
            (work.folder / "sub" / "file.txt").write_text(content)
        return done(work.finish({"b": 2}))


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        "[1]",
        '{"a": "\udcff"}',
        "[" * 99999,
    ],
)
def test_json_that_is_not_strict_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptArtifactError, match=r"x\.json"):
        jsonio.read_object(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(), json_values))
@settings(max_examples=50, deadline=None)
def test_canonical_json_round_trips_and_ignores_insertion_order(value: dict[str, Any]) -> None:
    data = jsonio.canonical(value)
    assert jsonio.parse(data, "here") == value
    assert jsonio.canonical(dict(reversed(value.items()))) == data


def test_nan_cannot_be_written(run: RunDir) -> None:
    with pytest.raises(NonFiniteError):
        jsonio.canonical({"loss": float("nan")})
    with begin(run) as work, pytest.raises(NonFiniteError):
        for i in work.pending():
            work.save(i, tensors_of(i, 4), metrics={"inertia": float("inf")})
    assert run.manifest("split") is None


# -- layer files -----------------------------------------------------------------------------------------------------


def test_layer_file_round_trip_rows_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    base = torch.arange(12.0).view(3, 4)
    stored = {
        "inputs_TD": base.T,
        "shared_TD": base,
        "same_TD": base,
        "slice_TD": base[1:],
        "half_T": torch.ones(3, dtype=torch.float16),
        "none_T": torch.ones(0),
    }
    write_layer(path, stored, {"layer": "l.0", "note": "é"})
    tensors, metadata = read_layer(path)
    assert metadata == {"layer": "l.0", "note": "é"} == read_metadata(path)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[n], stored[n]) and tensors[n].dtype == stored[n].dtype for n in stored)
    with open_layer(path) as layer:
        assert torch.equal(layer.rows("inputs_TD", 1, 3), base.T[1:3])
        assert layer.shapes["inputs_TD"] == (4, 3)
        with pytest.raises(CorruptArtifactError, match="no tensor 'x'"):
            layer.tensor("x")
    assert list(read_layer(path, ["half_T"])[0]) == ["half_T"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_layer_bytes_do_not_depend_on_process_or_order(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from moefication_cli.store.layerfile import write_layer
tensors = {"c_F": torch.zeros(2, dtype=torch.int8), "a_F": torch.ones(3), "b_F": torch.arange(4)}
write_layer(Path(sys.argv[1]), tensors, {"z": 1, "layer": "l", "a": 2})
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    tensors = {"b_F": torch.arange(4), "a_F": torch.ones(3), "c_F": torch.zeros(2, dtype=torch.int8)}
    write_layer(tmp_path / "here", tensors, {"layer": "l", "a": 2, "z": 1})
    assert (tmp_path / "here").read_bytes() == (tmp_path / "other").read_bytes()


def test_umask_decides_the_mode(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_layer(tmp_path / "l", {"a_F": torch.ones(2)}, {"layer": "l"})
        jsonio.write(tmp_path / "j", {})
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_files_and_their_folder_are_flushed(run: RunDir, tmp_path: Path, synced: list[int]) -> None:
    def inodes(*paths: Path) -> list[int]:
        return [path.stat().st_ino for path in paths]

    write_layer(tmp_path / "l", {"a_F": torch.ones(2)}, {"layer": "l"})
    assert synced == inodes(tmp_path / "l", tmp_path)
    synced.clear()
    jsonio.write(tmp_path / "j", {})
    assert synced == inodes(tmp_path / "j", tmp_path)
    synced.clear()
    one_file(run)
    model = run.path("model")
    assert {*inodes(model, model / "sub", model / "sub" / "file.txt", run.root)} <= set(synced)


def test_damaged_layer_files_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    write_layer(path, {"a_F": torch.arange(8), "b_F": torch.arange(8)}, {"layer": "l"})
    good = path.read_bytes()
    for bad in [good[:cut] for cut in range(0, len(good), 7)] + [
        good + b"x",
        good.replace(b'"b_F"', b'"a_F"'),
        b"\x80\x04.",
    ]:
        path.write_bytes(bad)
        with pytest.raises(CorruptArtifactError, match="layer_000"):
            read_layer(path)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="layer_000"):
        read_layer(path)
    path.write_bytes(good)
    assert torch.equal(read_layer(path)[0]["b_F"], torch.arange(8))


def test_foreign_safetensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptArtifactError, match="no layer file"):
        read_layer(tmp_path / "x.safetensors")


def test_expect_checks_names_dtypes_and_shapes() -> None:
    tensors = {"expert_F": torch.zeros(4, dtype=torch.int32), "w_ED": torch.zeros(2, 3)}
    good: dict[str, Any] = {"expert_F": (torch.int32, 1), "w_ED": ((torch.float32, torch.float16), (2, None))}
    expect(tensors, good, "f")
    expect({"w_ED": tensors["w_ED"]}, {}, "f", optional=good)
    bad: list[dict[str, Any]] = [
        {**good, "expert_F": (torch.int64, 1)},
        {**good, "expert_F": (torch.int32, 2)},
        {**good, "w_ED": (None, (3, None))},
        {**good, "more_F": (None, 1)},
        {"expert_F": (None, 1)},
    ]
    for spec in bad:
        with pytest.raises(CorruptArtifactError, match=r"^f"):
            expect(tensors, spec, "f")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    write_layer(path, {"a_F": torch.ones(2)}, {"layer": "l"})
    reader, writer = FORK.Pipe(duplex=False)

    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        with pytest.raises(MoEficationError) as caught:
            write_layer(path, {"a_F": torch.ones(20000)}, {"layer": "l"})
        writer.send(f"{caught.value.message} | {caught.value.hint}")

    fork(full_disk).join(20)
    assert reader.poll()
    message = reader.recv()
    assert str(path) in message and "80000 bytes" in message and "free some space" in message
    assert read_layer(path)[0]["a_F"].numel() == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# -- stages ----------------------------------------------------------------------------------------------------------


def test_stage_round_trip(run: RunDir) -> None:
    manifest = done(split(run))
    stage = run.read_stage("split")
    assert stage.manifest == manifest
    assert stage.layers == LAYERS and stage.config == {"num_experts": 4, "batch_size": 8}
    assert manifest.schema == "moefication/split@1"
    for i, name in enumerate(LAYERS):
        for which in (i, name):
            tensors, metadata = stage.read_layer(which)
            assert metadata["layer"] == name and torch.equal(tensors["expert_F"], tensors_of(i, 4)["expert_F"])
        assert stage.metrics["layers"][i]["index"] == i and stage.metrics["layers"][i]["layer"] == name
    assert manifest.seconds == pytest.approx(sum(m["seconds"] for m in manifest.metrics["layers"]))
    assert manifest.environment["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in stage.path.iterdir()) == [
        *(f"layer_{i:03d}.safetensors" for i in range(4)),
        "manifest.json",
    ]
    assert json.loads((stage.path / "manifest.json").read_text()) == manifest.to_json()
    assert not [p for p in run.root.iterdir() if "partial" in p.name or "old" in p.name]


def test_folder_stage_hashes_files_in_subfolders(run: RunDir) -> None:
    manifest = one_file(run)
    assert list(manifest.files) == ["sub/file.txt"] and manifest.seconds > 0
    assert run.read_stage("model").file("sub/file.txt").read_text() == "x"
    with pytest.raises(CorruptArtifactError):
        run.read_stage("model").file("other")


def test_freshness_compares_what_decides_the_output(run: RunDir) -> None:
    first = done(split(run))
    changed = [files.identity(p) for p in run.path("split").iterdir()]
    assert split(run, batch_size=99) == first, "batch size is recorded, not compared"
    assert [files.identity(p) for p in run.path("split").iterdir()] == changed
    for options, reason in [
        ({"experts": 8}, "`num_experts` 4 -> 8"),
        ({"inputs": {"base_model": "e" * 64}}, "`base_model` changed"),
        ({"inputs": {"base_model": "f" * 64, "graph": "a"}}, "`graph` is a new input"),
        ({"inputs": {}}, "`base_model` is no longer an input"),
        ({"layers": LAYERS[:3]}, "`layers` 4 -> 3"),
        ({"layers": LAYERS[::-1]}, "`layers` changed"),
        ({"force": True}, "--force"),
    ]:
        with begin(run, **options) as work:  # type: ignore[arg-type]
            assert not work.up_to_date and work.reason == reason
    assert split(run) == first


def test_digest_is_content(run: RunDir) -> None:
    first = done(split(run))
    again = done(split(run, force=True, batch_size=99, inputs={"base_model": "e" * 64}))
    assert again.digest == first.digest, "neither time, machine, recorded options nor inputs belong to the content"
    assert done(split(run, experts=8)).digest != first.digest
    files.remove(run.path("split"))
    assert done(split(run)).files == first.files


def test_old_stage_stays_until_it_is_replaced(run: RunDir) -> None:
    first = done(split(run))
    with begin(run, 8) as work:
        for i in work.pending():
            work.save(i, tensors_of(i, 8))
            assert run.read_stage("split").digest == first.digest
    assert run.read_stage("split").digest == first.digest
    assert done(split(run, 8)).digest != first.digest


def test_reader_of_a_replaced_stage_is_told(run: RunDir) -> None:
    split(run)
    stage = run.read_stage("split")
    with stage.open_layer(0) as opened:
        split(run, 8)
        assert torch.equal(opened.tensor("expert_F"), tensors_of(0, 4)["expert_F"]), "an open file keeps its content"
    with pytest.raises(StaleArtifactError, match="replaced while"):
        stage.read_layer(1)
    stage = run.read_stage("split")
    split(run, 8, layers=LAYERS[:2])
    with pytest.raises(StaleArtifactError, match="replaced while"):
        stage.read_layer(3)


def test_interrupted_stage_resumes_at_the_first_unfinished_layer(run: RunDir) -> None:
    class StopError(Exception):
        pass

    def stop_after_1(i: int) -> None:
        if i == 1:
            raise StopError

    with pytest.raises(StopError):
        split(run, after=stop_after_1)
    assert run.manifest("split") is None
    redone: list[int] = []
    resumed = done(split(run, after=redone.append))
    assert redone == [2, 3]
    files.remove(run.path("split"))
    assert done(split(run)).files == resumed.files
    # Under another key nothing is kept.
    with pytest.raises(StopError):
        split(run, 8, after=stop_after_1)
    redone.clear()
    split(run, 16, after=redone.append)
    assert redone == [0, 1, 2, 3]


def test_leftovers_of_other_work_are_swept(run: RunDir) -> None:
    with begin(run, layers=[*LAYERS, "encoder.layer.4"], only=[4]) as work:
        for i in work.pending():
            work.save(i, tensors_of(i, 4))
    assert len(done(split(run)).files) == 4
    with run.begin("model", config={"a": 1}) as work:
        (work.folder / "half written").write_text("x")
        (work.folder / ".tokenizer.tmp").write_text("x")
    assert list(one_file(run).files) == ["sub/file.txt"]


def test_scratch_survives_an_interruption_but_not_the_commit(run: RunDir) -> None:
    with begin(run) as work:
        (work.scratch / "shard").write_text("x")
    with begin(run, batch_size=1) as work:
        assert (work.scratch / "shard").exists()
        for i in work.pending():
            work.save(i, tensors_of(i, 4))
        manifest = done(work.finish())
    assert not [n for n in manifest.files if "shard" in n]
    assert not (run.path("split") / ".work").exists()


def test_force_on_some_layers_redoes_those_alone(run: RunDir) -> None:
    first = done(split(run))
    redone: list[int] = []
    again = done(split(run, force=True, only=[2], after=redone.append))
    assert redone == [2] and again.digest == first.digest
    redone.clear()
    split(run, force=True, after=redone.append)
    assert redone == [0, 1, 2, 3]


def test_damaged_layer_of_an_otherwise_fresh_stage_is_redone_alone(run: RunDir) -> None:
    first = done(split(run))
    (run.path("split") / "layer_001.safetensors").write_bytes(b"")
    redone: list[int] = []
    assert done(split(run, after=redone.append)).files == first.files
    assert redone == [1]


def test_array_tasks_complete_and_the_last_one_commits(run: RunDir) -> None:
    assert split(run, only=[0, 2]) is None
    with begin(run, only=[1]) as work:
        assert work.missing() == [LAYERS[1], LAYERS[3]]
    assert run.manifest("split") is None
    array = done(split(run, only=[1, 3]))
    assert run.read_stage("split").digest == array.digest
    files.remove(run.path("split"))
    assert done(split(run)).files == array.files
    with pytest.raises(ConfigError, match="no layer 4"):
        split(run, only=[4])


def test_altered_finished_layer_is_not_committed(run: RunDir) -> None:
    split(run, only=[0, 1, 2])
    path = run.root / ".split.partial" / "layer_001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptArtifactError, match="layer_001"):
        split(run)
    redone: list[int] = []
    assert done(split(run, after=redone.append)) and redone == [1]


# -- lineage ---------------------------------------------------------------------------------------------------------


def test_require_follows_the_inputs_all_the_way_up(run: RunDir) -> None:
    run.remember(model="m", fingerprint="f" * 64)
    one_file(run, "activations", inputs={"base_model": "f" * 64, "data": "d"})
    one_file(run, "graph", inputs={"activations": run.read_stage("activations").digest})
    split(run, inputs={"graph": run.require("graph").digest, "base_model": "f" * 64})
    assert run.why_stale("split") is None and run.require("split")

    one_file(run, "activations", force=True, inputs={"base_model": "f" * 64, "data": "e"})
    assert run.require("split"), "the same content again changes nothing"
    one_file(run, "activations", "other", force=True, inputs={"base_model": "f" * 64, "data": "d"})
    assert run.why_stale("graph") == "`activations` changed"
    assert run.why_stale("split") == "`graph` is stale: `activations` changed"
    with pytest.raises(StaleArtifactError, match="`split` is stale") as caught:
        run.require("split")
    assert "build-graph" in caught.value.hint, "the hint is to redo the first stage that is stale"
    assert caught.value.exit_code == 3
    files.remove(run.path("activations"))
    assert run.require("split"), "a deleted upstream stage has not changed"
    with pytest.raises(StaleArtifactError, match="base_model"):
        run.require("split", fingerprint="e" * 64)
    run.remember(fingerprint="e" * 64)
    with pytest.raises(StaleArtifactError, match="base_model"):
        run.require("split")


def test_why_stale_with_todays_options(run: RunDir) -> None:
    assert run.why_stale("split", config={"num_experts": 4}, inputs={}) is None
    split(run)
    same: dict[str, Any] = {"inputs": {"base_model": "f" * 64}, "compared": ["num_experts"], "layers": LAYERS}
    assert run.why_stale("split", config={"num_experts": 4, "batch_size": 1}, **same) is None
    assert run.why_stale("split", config={"num_experts": 48, "batch_size": 1}, **same) == "`num_experts` 4 -> 48"
    reason = run.why_stale("split", config={"num_experts": 4, "new": "x"}, **{**same, "compared": None})
    assert reason == "`new` (unset) -> x"


def test_missing_stage_names_the_command(run: RunDir) -> None:
    for stage, command in [
        ("split", "moefication split"),
        ("router/mlp", "moefication train-router"),
        ("model", "apply"),
    ]:
        with pytest.raises(MissingArtifactError) as caught:
            run.require(stage)
        assert command in caught.value.hint and caught.value.exit_code == 3
    assert "--router mlp" in run.command("router/mlp")


def test_command_repeats_what_made_the_stage(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/moefication", "split", str(run.root), "--num-experts", "4"])
    split(run)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert run.command("split") == f"moefication split '{run.root}' --num-experts 4"


@pytest.mark.parametrize(
    "stage", ["", "x", "router", "split/a", "router/", "router/..", "router/a/b", "router/.a", "../split"]
)
def test_stage_names_cannot_leave_the_run(run: RunDir, stage: str) -> None:
    with pytest.raises(ConfigError):
        run.path(stage)


def test_names_lists_finished_routers(run: RunDir) -> None:
    assert run.names("router") == []
    one_file(run, "router/mlp")
    one_file(run, "router/a.b-c")
    with run.begin("router/unfinished", config={}):
        pass
    assert run.names("router") == ["a.b-c", "mlp"]


# -- run.json --------------------------------------------------------------------------------------------------------


def test_run_json_remembers_and_is_strict(run: RunDir) -> None:
    assert run.info.model is None
    run.remember(model="m", fingerprint="f", fields={"text": "sentence"}, trust_remote_code=False)
    info = run.remember(task="lm", model=None)
    assert info == run.info and info.model == "m" and info.task == "lm"
    assert info.fields == {"text": "sentence"} and info.trust_remote_code is False
    with pytest.raises(TypeError, match="nonsense"):
        run.remember(nonsense=1)
    good = asdict(info)
    for bad in [
        {**good, "x": 1},
        {**good, "model": 3},
        {**good, "trust_remote_code": "no"},
        {**good, "fields": []},
        {k: v for k, v in good.items() if k != "task"},
        {},
    ]:
        (run.root / "run.json").write_text(json.dumps(bad))
        with pytest.raises(CorruptArtifactError, match=r"run\.json"):
            _ = run.info
    (run.root / "run.json").write_text(json.dumps({**good, "schema": "moefication/run@2"}))
    with pytest.raises(CorruptArtifactError, match="newer version") as caught:
        _ = run.info
    assert "upgrade" in caught.value.hint


# -- damage ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_manifest_is_corrupt(run: RunDir, edit: Callable[[dict[str, Any]], object]) -> None:
    first = done(split(run))
    edit_manifest(run, lambda m: None)
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
        value["digest"] = Manifest.make(**{k: v for k, v in value.items() if k not in {"schema", "digest"}}).digest

    edit_manifest(run, edit)
    with pytest.raises(CorruptArtifactError, match="names a file outside its folder"):
        run.read_stage("split")


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


# -- places that cannot be written -----------------------------------------------------------------------------------


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


# -- killed processes ------------------------------------------------------------------------------------------------


def fork(target: Callable[[], object]) -> Any:
    process = FORK.Process(target=target)
    process.start()
    return process


def kill_at(call: int) -> None:
    """Die with SIGKILL at the n-th durable file operation."""
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("replace", "remove", "atomic_write", "make_dirs"):
        setattr(files, name, counting(getattr(files, name)))
    jsonio.atomic_write = files.atomic_write


@pytest.mark.parametrize("had_stage", [False, True])
def test_kill_at_every_file_operation(tmp_path: Path, had_stage: bool) -> None:
    two = {"layers": LAYERS[:2]}
    expected = done(split(RunDir(tmp_path / "reference"), 8, **two)).files
    old = None
    for call in range(1, 200):
        run = RunDir(tmp_path / str(call), lock_timeout=0.3)
        old = done(split(run, **two)).digest if had_stage else None

        def victim(call: int = call, root: Path = run.root) -> None:
            kill_at(call)
            split(RunDir(root, lock_timeout=0.3), 8, **two)

        process = fork(victim)
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        try:
            found = run.read_stage("split")  # whole, whichever it is
            assert found.digest == old or found.manifest.files == expected
        except MissingArtifactError:
            assert not had_stage
        assert done(split(run, 8, **two)).files == expected
        assert run.require("split").manifest.files == expected
        assert sorted(p.name for p in run.root.iterdir()) == [".cache", ".locks", "split"]
        assert not list(run.root.rglob("*.tmp")) and not list(run.root.rglob(".work"))
    else:
        raise AssertionError("the victim never finished")
    assert call > 20, "too few places to be killed at: nothing was tested"


def test_commit_killed_before_or_between_its_renames_is_settled_by_the_next_reader(run: RunDir) -> None:
    first = done(split(run))
    folder = run.path("split")
    folder.rename(run.root / ".split.partial")  # complete, not yet renamed
    assert run.read_stage("split").digest == first.digest
    folder.rename(run.root / ".split.old")  # the old one moved away, the new one lost
    assert run.read_stage("split").digest == first.digest
    assert not list(run.root.glob(".split.*"))


def test_partial_folder_that_is_worked_on_again_is_not_taken_for_complete(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = done(split(run))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StagePaths, "swap", lambda self: signal.raise_signal(signal.SIGINT))
        split(run, 8)
    assert (run.root / ".split.partial" / "manifest.json").exists()
    assert run.read_stage("split").digest == old.digest
    with begin(run, 8, force=True, only=[0]):
        files.remove(run.path("split"))
        assert run.manifest("split") is None
    assert done(split(run, 8)).digest != old.digest


def test_kill_in_the_middle_of_the_work_frees_locks_and_resumes(run: RunDir) -> None:
    first = done(split(run))
    ready = FORK.Event()

    def victim() -> None:
        with begin(RunDir(run.root), 8) as work:
            for i in work.pending():
                if i == 2:
                    (work.partial.work / "layer_002.safetensors.tmp").write_bytes(b"half")
                    ready.set()
                    time.sleep(60)
                work.save(i, tensors_of(i, 8))

    process = fork(victim)
    assert ready.wait(20)
    with pytest.raises(LockedError, match=f"process {process.pid} on") as caught:
        split(run, 8)
    assert caught.value.exit_code == 5 and "layer 2 (encoder.layer.2)" in caught.value.message
    with pytest.raises(LockedError, match="`split`"):
        split(run, 16)  # other options: must not sweep a live process's work
    assert run.read_stage("split").digest == first.digest
    process.kill()
    process.join()
    redone: list[int] = []
    resumed = done(split(run, 8, after=redone.append))
    assert redone == [2], "0, 1 by the victim, 3 while it slept"
    other = RunDir(run.root.with_name("other"))
    assert done(split(other, 8)).files == resumed.files


# -- several processes -----------------------------------------------------------------------------------------------


def in_parallel(targets: list[Callable[[], Manifest | None]]) -> list[Any]:
    """Results of the targets, each in its own process, started together; an error's class name if it raised one."""
    barrier = FORK.Barrier(len(targets))
    queue = FORK.SimpleQueue()

    def task(index: int) -> None:
        barrier.wait(20)
        try:
            manifest = targets[index]()
            queue.put((index, manifest and manifest.digest))
        except MoEficationError as error:
            queue.put((index, type(error).__name__))

    processes = [fork(lambda i=i: task(i)) for i in range(len(targets))]  # type: ignore[misc]
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    return [results[i] for i in range(len(targets))]


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("force", [False, True])
def test_concurrent_array_tasks(run: RunDir, attempt: int, force: bool) -> None:
    expected = done(split(RunDir(run.root.with_name("reference")))).digest
    tasks: list[Callable[[], Manifest | None]] = [
        lambda i=i: split(RunDir(run.root), only=[i], force=force)  # type: ignore[misc]
        for i in range(4)
    ]
    results = in_parallel(tasks)
    assert set(results) <= {expected, None} and expected in results
    assert run.require("split").digest == expected


@pytest.mark.parametrize("attempt", range(3))
def test_concurrent_processes_share_the_layers(run: RunDir, attempt: int) -> None:
    expected = done(split(RunDir(run.root.with_name("reference")))).digest
    log = run.root.with_name("log")
    log.touch()

    def note(i: int) -> None:
        with log.open("a") as file:
            file.write(f"{i}\n")
        time.sleep(0.02)

    results = in_parallel([lambda: split(RunDir(run.root), after=note)] * 3)
    assert expected in results and set(results) <= {expected, None}
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3"], "no layer is done twice"
    assert run.require("split").digest == expected


def test_concurrent_writers_of_a_folder_stage(run: RunDir) -> None:
    results = in_parallel([lambda: one_file(RunDir(run.root, lock_timeout=20))] * 3)
    assert results == [run.require("model").digest] * 3


def test_concurrent_remember_loses_nothing(run: RunDir) -> None:
    def remember(name: str) -> None:
        RunDir(run.root).remember(**{name: name})

    in_parallel([lambda n=n: remember(n) for n in ("model", "task", "prompt", "revision")])  # type: ignore[misc]
    info = run.info
    assert (info.model, info.task, info.prompt, info.revision) == ("model", "task", "prompt", "revision")


def test_readers_never_see_half_a_stage(run: RunDir) -> None:
    digests = {done(split(run, e)).digest for e in (4, 8)}
    stop = FORK.Event()

    def rewrite() -> None:
        for i in range(12):
            split(RunDir(run.root), (4, 8)[i % 2])
        stop.set()

    writer = fork(rewrite)
    seen = 0
    while not stop.is_set():
        assert RunDir(run.root).read_stage("split").digest in digests
        seen += 1
    writer.join()
    assert seen > 3


def test_folder_stage_is_locked_while_it_is_made(run: RunDir) -> None:
    with (
        run.begin("eval/default", config={}) as work,
        pytest.raises(LockedError, match=rf"`eval/default` is being worked on by process {os.getpid()} on"),
        RunDir(run.root, lock_timeout=0.1).begin("eval/default", config={}),
    ):
        pass
    with run.begin("eval/default", config={}):
        assert work


def test_hold_excludes_others_and_keeps_the_commit_waiting(run: RunDir) -> None:
    other = RunDir(run.root, lock_timeout=0.1)
    with begin(run) as work, work.lock("shard_0"):
        with begin(other) as second:
            with pytest.raises(LockedError, match="shard_0"), second.lock("shard_0"):
                pass
            with second.lock("shard_1"):
                pass
        assert split(other) is None, "somebody still works on it"
    assert split(other)


def test_stage_begun_anew_by_somebody_else_is_noticed(run: RunDir) -> None:
    with begin(run) as work:
        split(run, 8)  # no claim held, so this may sweep
        with pytest.raises(LockedError, match="other options"):
            list(work.pending())


def test_lock_of_a_thread_blocks_another_process(tmp_path: Path) -> None:
    lock = locks.try_acquire(tmp_path / "x.lock")
    assert lock is not None
    assert locks.is_held(tmp_path / "x.lock")
    releaser = threading.Thread(target=lock.release)
    releaser.start()
    releaser.join()
    assert not locks.is_held(tmp_path / "x.lock")


def test_reading_manifests_imports_no_torch(run: RunDir) -> None:
    split(run)
    code = (
        "import sys; from moefication_cli.store.rundir import RunDir; r = RunDir(sys.argv[1]); r.require('split');"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True)


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    for child in multiprocessing.active_children():
        child.kill()
