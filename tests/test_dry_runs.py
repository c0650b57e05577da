"""--dry-run estimates and changes nothing, in every command; `run` looks at its evaluation data before it starts."""

from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner

OPTIONS = ("--methods", "activation", "--expert-sizes", "4,5,8", "--fractions", "0.4")


def listing(folder: Path) -> dict[str, int]:
    """Every file below `folder` with the time it was last written, but for the cache of hashes."""
    found = (path for path in folder.rglob("*") if ".cache" not in path.parts)
    return {str(path): path.lstat().st_mtime_ns for path in found}


def test_a_new_run_is_estimated_stage_by_stage(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--model", bert, "--data", data, "--expert-size", 4)
    found = run_cli.ok("run", run, *options, "--eval-data", data, "--dry-run")
    assert [row["stage"] for row in found["rows"]] == ["activations", "split", "router", "model", "eval", "total"]
    assert all(row["seconds"] > 0 and row["memory_gib"] > 0 for row in found["rows"])
    total = found["rows"].pop()
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in found["rows"]))
    assert not run.exists()
    less = run_cli.ok("run", run, *options, "--refine", 0, "--dry-run")["rows"]
    assert [row["stage"] for row in less] == ["activations", "split", "router", "model", "total"]
    assert less[3]["seconds"] < found["rows"][3]["seconds"]  # refinement is in the estimate
    more = run_cli.ok("run", run, *options, "--refine", 0, "--finetune", 100, "--dry-run")["rows"]
    assert [row["stage"] for row in more] == ["activations", "split", "router", "finetuned", "model", "total"]
    assert more[-1]["seconds"] == pytest.approx(less[-1]["seconds"] + more[3]["seconds"]) and more[3]["seconds"] > 0
    assert run_cli("run", run, *options, "--expert-size", 5, "--dry-run").code == 2  # does not divide the FFNs
    assert run_cli("run", run, "--model", bert, "--dry-run").code == 2  # no data


def test_every_stage_and_tune_change_nothing(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    data = run.with_name("train.txt")
    before = listing(run)
    commands: list[tuple[object, ...]] = [
        ("collect-activations", "--data", data),
        ("build-graph",),
        ("split", "--expert-size", 8),
        ("train-router", "--router", "linear"),
        ("apply", "--router", "regression", "--refine", 20),
        ("eval", "--data", data, "--name", "dry"),
        ("tune", *OPTIONS),
        ("run", "--data", data),
    ]
    for command, *options in commands:
        found = run_cli.ok(command, run, *options, "--dry-run")
        assert found["dry_run"] and found["rows"][-1]["seconds"] > 0, command
    assert listing(run) == before


def test_demo_says_what_it_would_take(run_cli: Runner, tmp_path: Path) -> None:
    found = run_cli.ok("demo", tmp_path / "demo", "--dry-run")
    assert found["rows"][-1]["stage"] == "total"
    assert not (tmp_path / "demo").exists()


def test_run_checks_its_evaluation_data_first(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    odd = tmp_path / "odd.tsv"
    odd.write_text("sentence\tlabel\ngood\t7\n")
    unlabelled = tmp_path / "unlabelled.tsv"
    unlabelled.write_text("sentence\tauthor\ngood\tme\n")
    for wrong, word in ((tmp_path / "absent.tsv", "not found"), (odd, "7"), (unlabelled, "label")):
        outcome = run_cli("run", run, "--model", bert, "--data", data, "--eval-data", wrong, "--json")
        assert outcome.code == 2
        assert word in outcome.json["error"]["message"]
        assert not run.exists()  # nothing was collected, nothing remembered
