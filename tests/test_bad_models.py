"""Model folders and run directories that are not as they should be: one sentence each, nothing waits for ever."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from tiny_models import save_tiny

ODD_CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": "32"},
    {"hidden_size": 0},
    {"num_hidden_layers": None},
    {"num_hidden_layers": -1},
    {"ffn_dim": "x"},
    {"max_position_embeddings": "z"},
    {"model_type": 5},
    {"architectures": "OPTForCausalLM"},
    {"architectures": [3]},
    {"architectures": {}},
]


@pytest.mark.parametrize("odd", ODD_CONFIGS, ids=str)
def test_values_of_config_json(odd: dict[str, Any], tmp_path: Path, run_cli: Runner) -> None:
    save_tiny("opt", tmp_path / "opt")
    run_cli.ok("inspect", tmp_path / "opt")
    path = tmp_path / "opt" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    found = run_cli("inspect", tmp_path / "opt")
    assert found.code == 2 and "Traceback" not in found.err


@pytest.mark.parametrize("names", [{"a": 3}, {"a": None}, {"a": ["x"]}, [], 3])
def test_weight_index(names: Any, tmp_path: Path, run_cli: Runner) -> None:
    save_tiny("opt", tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").unlink()
    (tmp_path / "opt" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = run_cli("inspect", tmp_path / "opt")
    assert found.code == 2 and "not a valid weight index" in found.err


def test_the_home_of_nobody(run_cli: Runner, calibrated_run: tuple[Path, Path], tmp_path: Path) -> None:
    found = run_cli("inspect", "~nobody-of-this-name/x")
    assert found.code == 2 and "no such user" in found.err
    found = run_cli(
        "collect-activations", tmp_path / "r", "--model", calibrated_run[1], "--data", "~nobody-of-this-name/x.txt"
    )
    assert found.code == 2 and "Traceback" not in found.err


def test_pipes_and_devices_are_no_files(calibrated_run: tuple[Path, Path], tmp_path: Path, run_cli: Runner) -> None:
    run, model = calibrated_run
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        found = run_cli("split", run, "--from-partition", odd, "--num-experts", 12)
        assert found.code == 2 and "is not a file" in found.err
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    found = run_cli("split", run, "--model", model)
    assert found.code == 4 and "is not a file" in found.err


def test_apply_needs_the_activations_its_router_was_trained_on(
    calibrated_run: tuple[Path, Path], run_cli: Runner
) -> None:
    run, _ = calibrated_run
    made = run_cli.ok("apply", run, "--fraction", 0.5)
    (run / "activations").rename(run / "elsewhere")
    found = run_cli("apply", run, "--fraction", 0.4)
    assert found.code == 3 and "collect-activations" in found.err
    (run / "elsewhere").rename(run / "activations")
    assert run_cli.ok("apply", run, "--fraction", 0.5)["digest"] == made["digest"]
