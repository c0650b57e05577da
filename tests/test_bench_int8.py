"""bench --weights int8: every mode, both sides in int8, and what it does not go with."""

from pathlib import Path

import pytest
import torch
from cli_runner import Runner
from test_bench import QUICK
from tiny_models import save_tiny, tiny_inputs, tiny_model

from moefication_cli.benchmark.int8 import dynamic_twin, fastest


@pytest.mark.parametrize(("name", "modes"), [("opt", 4), ("t5", 4), ("phi3", 4), ("bert-bare", 3), ("gpt2", 4)])
def test_all_modes(name: str, modes: int, run_cli: Runner, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / name)
    found = run_cli.ok("bench", tmp_path / name, *QUICK, "--expert-size", 8, "--weights", "int8", "--device", "cpu")
    assert len(found["rows"]) == modes
    for row in found["rows"]:
        assert row["weights"] == "int8" and row["dtype"] == "float32" and row["backend"] == "numba"
        assert row["dense_seconds"] > 0 and row["moe_seconds"] > 0
    plain = run_cli.ok("bench", tmp_path / name, *QUICK, "--expert-size", 8, "--mode", "ffn", "--device", "cpu")
    assert plain["rows"][0]["weights"] is None
    held = {entry["of"]: entry["dense_bytes"] for entry in found["memory"]}
    assert held.keys() == {"ffn", "model"}


def test_the_dense_side_is_the_faster_of_two() -> None:
    assert fastest([[3.0, 9.0, 3.0], [4.0, 4.0, 1.0], [5.0]]) == [3.0, 9.0, 3.0]
    model = tiny_model("opt")
    twin = dynamic_twin(model)
    with torch.no_grad():
        y, near = (m(**tiny_inputs("opt", padded=False)).logits for m in (model, twin))
    assert 1e-4 < float((y - near).norm() / y.norm()) < 0.1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--dtype", "bfloat16"], 2, "float32 activations"),
        (["--weights", "int4"], 2, "int4"),
        (["--experts", "anything"], 2, "either"),
    ],
)
def test_mistakes(words: list[str], code: int, said: str, run_cli: Runner) -> None:
    outcome = run_cli("bench", "--shape", "t5-base", "--weights", "int8", "--device", "cpu", *words, "--json")
    assert outcome.code == code and "Traceback" not in outcome.err
    assert said in str(outcome.json["error"]["message"])
