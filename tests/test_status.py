"""status, verify, clean and runs: what a person sees of a run, on a tiny converted OPT."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from filelock import FileLock

STATES = {"activations": "current", "split": "current", "router/regression": "current", "model": "current"}


@pytest.fixture
def made(calibrated_run: Any, run_cli: Runner) -> Path:
    """A run with a converted and measured model."""
    run, _ = calibrated_run
    run_cli.ok("apply", run, "--fraction", 0.5)
    data = run.with_name("train.txt")
    run_cli.ok("eval", run, "--data", data, "--limit", 20, "--selection", "groundtruth,regression")
    return Path(run)


def states(run_cli: Runner, run: Path) -> dict[str, str]:
    return {stage["stage"]: stage["state"] for stage in run_cli.ok("status", run)["stages"]}


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def test_states_and_exit_codes(made: Path, run_cli: Runner) -> None:
    assert states(run_cli, made) == STATES | {"eval/default": "current"}
    assert run_cli("status", made, "--exit-code").code == 0
    run_cli.ok("split", made, "--expert-size", 8)
    found = run_cli.ok("status", made)
    by_stage = {stage["stage"]: stage for stage in found["stages"]}
    assert found["state"] == "stale"
    assert by_stage["router/regression"]["reason"] == "`split` changed"
    assert by_stage["model"]["state"] == by_stage["eval/default"]["state"] == "stale"
    assert "moefication train-router" in by_stage["router/regression"]["command"]
    assert run_cli("status", made, "--exit-code").code == 3
    assert run_cli("status", made).code == 0
    shutil.rmtree(made / "model")
    assert states(run_cli, made)["model"] == "missing"


def test_changed_data_and_model_are_seen(made: Path, run_cli: Runner) -> None:
    data = made.with_name("train.txt")
    before = data.read_text()
    data.write_text(before + "w1 w2\n")
    found = states(run_cli, made)
    assert found["activations"] == found["router/regression"] == found["model"] == "stale"
    data.write_text(before)
    assert states(run_cli, made)["activations"] == "current"
    config = made.with_name("opt") / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert set(states(run_cli, made).values()) == {"stale"}
    shutil.rmtree(made.with_name("opt"))
    assert "base_model" in run_cli.ok("status", made)["stages"][0]["reason"]


def test_damage_interruption_and_work_in_progress(made: Path, run_cli: Runner) -> None:
    flip(made / "split" / "layer_001.safetensors", 0.99)
    assert states(run_cli, made)["split"] == "corrupt"
    assert run_cli("status", made, "--exit-code").code == 4
    run_cli.ok("split", made, "--expert-size", 4)
    assert states(run_cli, made)["split"] == "current"
    # What a killed `build-graph` leaves after its first layer
    run_cli.ok("build-graph", made, "--layers", 0)
    graph = next(stage for stage in run_cli.ok("status", made)["stages"] if stage["stage"] == "graph")
    assert (graph["state"], graph["layers_done"], graph["layers"]) == ("interrupted", 1, 2)
    with FileLock(made / ".locks" / "graph" / "layer_001.lock"):
        outcome = run_cli("status", made, "--exit-code")
        assert outcome.code == 5
        assert "running" in outcome.out and "layer 001" in outcome.out
    assert run_cli("status", made, "--exit-code").code == 3


def test_status_needs_no_torch_and_writes_nothing(made: Path) -> None:
    def listing() -> dict[str, int]:
        found = (path for path in made.rglob("*") if ".cache" not in path.parts and path.name != "hashes.lock")
        return {str(path): path.lstat().st_mtime_ns for path in found if path.is_file()}

    before = listing()
    code = (
        "import sys; from moefication_cli.cli.app import exit_code; from moefication_cli.cli.console import Console\n"
    )
    code += "print(exit_code(Console(), sys.argv[1:]), 'torch' in sys.modules or 'datasets' in sys.modules)"
    for command in ("status", "runs"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, str(made)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "0 False"
    assert listing() == before


def test_no_run_is_exit_3(tmp_path: Path, run_cli: Runner) -> None:
    for command in ("status", "clean", "verify"):
        outcome = run_cli(command, tmp_path, "--json")
        assert outcome.code == 3, outcome.err
    assert run_cli("runs", tmp_path / "absent").code == 2
    assert run_cli("status", tmp_path, "--watch", "--json").code == 2
    assert run_cli.ok("runs", tmp_path)["rows"] == []


def test_runs_lists_what_was_converted(made: Path, run_cli: Runner) -> None:
    (made.parent / "broken").mkdir()
    (made.parent / "broken" / "run.json").write_text("{")
    rows = {Path(row["run"]).name: row for row in run_cli.ok("runs", made.parent)["rows"]}
    assert set(rows) == {"run", "broken"}
    row = rows["run"]
    metrics = json.loads((made / "eval" / "default" / "metrics.json").read_text())
    applied = next(entry for entry in metrics["rows"] if entry["applied"])
    assert (row["method"], row["router"], row["fraction"], row["state"]) == ("activation", "regression", 0.5, "current")
    assert (row["kl"], row["relative"]) == (applied["kl"], applied["relative"])
    assert "corrupt" in rows["broken"]["state"]


def test_one_flipped_bit_in_any_file_is_found(made: Path, run_cli: Runner) -> None:
    assert run_cli.ok("verify", made)["damaged"] == 0
    assert run_cli.ok("verify", made / "model")["damaged"] == 0
    files = [p for p in sorted(made.rglob("*")) if p.is_file() and not {".cache", ".locks"} & set(p.parts)]
    assert len(files) > 15
    for path in files:
        whole = path.read_bytes()
        flip(path)
        outcome = run_cli("verify", made, "--json")
        assert outcome.code == 4, path
        row = outcome.json["rows"][0]
        assert path.name in row["damage"] or path.parent.name in row["damage"], (path, row)
        assert row["command"]
        if path.is_relative_to(made / "model") and path.name != "manifest.json":
            assert run_cli("verify", made / "model").code == 4, path
        path.write_bytes(whole)
    assert run_cli("verify", made).code == 0


def test_a_changed_digit_that_gives_the_same_number_is_found(made: Path, run_cli: Runner) -> None:
    """1.0000000000000001 is 1.0: the seal of the parsed value fits, the file is not the one that was written."""
    for path in (made / "split" / "manifest.json", made / "model" / "moefication" / "moefication.json"):
        whole = path.read_text()
        number = re.search(r": (\d+\.\d*[1-9])(?=[,\n])", whole)
        assert number, path
        longer = f"{number[1]}{'0' * 20}1"
        assert float(longer) == float(number[1])
        path.write_text(whole[: number.start(1)] + longer + whole[number.end(1) :])
        target = made if path.name == "manifest.json" else made / "model"
        assert run_cli("verify", target, "--json").code == 4, path
        path.write_text(whole)
        assert run_cli("verify", target).code == 0


def test_verify_names_everything_that_is_damaged(made: Path, run_cli: Runner) -> None:
    flip(made / "split" / "layer_000.safetensors")
    flip(made / "split" / "layer_001.safetensors")
    (made / "activations" / "layer_000.safetensors").unlink()
    (made.with_name("opt") / "config.json").write_text("{}")
    rows = run_cli("verify", made, "--json").json["rows"]
    assert [row["stage"] for row in rows] == ["run.json", "activations", "split", "split"]
    assert rows[2]["command"].startswith("moefication split") and rows[2]["command"].endswith("--force")


def test_clean_deletes_what_was_named(made: Path, run_cli: Runner) -> None:
    assert "nothing to delete" in run_cli("clean", made, "--json").json["error"]["message"]
    refused = run_cli("clean", made, "router/regresion", "--json")
    assert refused.code == 2 and "did you mean router/regression?" in refused.json["error"]["hint"]
    found = run_cli.ok("clean", made, "model", "--dry-run")
    assert found["rows"][0]["files"] > 3 and (made / "model").exists()
    run_cli.ok("clean", made, "model")
    assert not (made / "model").exists() and (made / "split").exists()
    run_cli.ok("build-graph", made, "--layers", 0)
    assert (made / ".graph.partial").exists()
    with FileLock(made / ".locks" / "graph" / "layer_001.lock"):
        assert run_cli("clean", made, "--partial").code == 5
        assert run_cli("clean", made, "graph").code == 5
    assert (made / ".graph.partial").exists()
    run_cli.ok("clean", made, "--partial")
    assert not (made / ".graph.partial").exists()


def test_clean_stays_in_the_run(made: Path, run_cli: Runner) -> None:
    run_cli.ok("tune", made, "--methods", "random", "--expert-sizes", 8, "--fractions", 0.5, "--max-tokens", 1000)
    assert (made / "trials" / "random-8" / "activations").is_symlink()
    run_cli.ok("clean", made, "--trials")
    assert not (made / "trials" / "random-8").exists()
    assert (made / "activations" / "manifest.json").exists()  # the trials only had a link to it
    (made / "graph").mkdir()
    (made / "graph" / "notes.txt").write_text("mine")
    refused = run_cli("clean", made, "graph", "--json")
    assert refused.code == 1 and "was not made by this program" in refused.json["error"]["message"]
    assert (made / "graph" / "notes.txt").exists()


def test_config_of_a_run_repeats_it(made: Path, run_cli: Runner, tmp_path: Path) -> None:
    shown = run_cli("config", made)
    assert shown.code == 0
    file = tmp_path / "run.toml"
    file.write_text(shown.out)
    found = run_cli.ok("config", made)
    assert found["config"]["split"]["expert_size"] == 4 and found["sources"]["split"]["expert_size"] == "command line"
    assert found["sources"]["split"]["method"] == "default"
    again = tmp_path / "again"
    for command in ("collect-activations", "split", "train-router", "apply"):
        run_cli.ok(command, again, "--config", file)
    for stage in ("activations", "split", "router/regression", "model"):
        manifests = [json.loads((run / stage / "manifest.json").read_text()) for run in (made, again)]
        assert manifests[0]["digest"] == manifests[1]["digest"], stage
    assert run_cli.ok("config", "split")["config"]["split"]["method"] == "activation"
    refused = run_cli("config", "splitt", "--json")
    assert refused.code == 2 and "did you mean split?" in refused.json["error"]["hint"]
