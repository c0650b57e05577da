"""A stage in a run directory: what is written reads back, is fresh or stale, resumes, and is named to the user."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from run_directories import LAYERS, begin, done, one_file, split, tensors_of

from moefication_cli.errors import (
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    StaleArtifactError,
)
from moefication_cli.store import files
from moefication_cli.store.options import StageOptions
from moefication_cli.store.rundir import RunDir


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
    with run.begin("model", StageOptions(config={"a": 1})) as work:
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
    copied = shutil.copytree(run.root, run.root.with_name("copied"))
    assert RunDir(copied).command("split") == f"moefication split {copied} --num-experts 4"  # not the original's name


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
    with run.begin("router/unfinished", StageOptions(config={})):
        pass
    assert run.names("router") == ["a.b-c", "mlp"]


# -- run.json --------------------------------------------------------------------------------------------------------


def test_run_json_remembers_and_is_strict(run: RunDir) -> None:
    assert run.info.model is None
    run.remember(model="m", fingerprint="f", fields={"text": "sentence"})
    info = run.remember(task="lm", model=None)
    assert info == run.info and info.model == "m" and info.task == "lm"
    assert info.fields == {"text": "sentence"}
    with pytest.raises(TypeError, match="nonsense"):
        run.remember(nonsense=1)
    good = asdict(info)
    for bad in [
        {**good, "x": 1},
        {**good, "model": 3},
        {**good, "fields": []},
        {k: v for k, v in good.items() if k != "task"},
        {},
    ]:
        (run.root / "run.json").write_text(json.dumps(bad))
        with pytest.raises(CorruptArtifactError, match=r"run\.json"):
            _ = run.info
    (run.root / "run.json").write_text(
        json.dumps({**good, "trust_remote_code": True})
    )  # as versions before 0.3 wrote it
    assert run.info == info
    (run.root / "run.json").write_text(json.dumps({**good, "schema": "moefication/run@2"}))
    with pytest.raises(CorruptArtifactError, match="newer version") as caught:
        _ = run.info
    assert "upgrade" in caught.value.hint


def test_reading_manifests_imports_no_torch(run: RunDir) -> None:
    split(run)
    code = (
        "import sys; from moefication_cli.store.rundir import RunDir; r = RunDir(sys.argv[1]); r.require('split');"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True)
