"""Encoders without a classifier through the commands, as a user runs them: masked language models."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from cli_runner import Runner
from tiny_models import save_tiny, tiny_tokenizer

from moefication_cli.models.loading import load
from moefication_cli.models.surgery import installed_layers


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path, rng = tmp_path / "train.txt", random.Random(3)
    path.write_text("".join(" ".join(f"w{rng.randrange(40)}" for _ in range(12)) + "\n" for _ in range(300)))
    return path


def test_a_masked_language_model_through_all_stages(
    text: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, run = tmp_path / "bert", tmp_path / "run"
    save_tiny("bert-mlm", folder)
    assert run_cli.ok("inspect", folder)["task"] == "mlm"
    fields = ["--documents", "line", "--max-length", 24, "--batch-size", 4]
    stages = ["--expert-size", 4, "--epochs", 1, "--refine", 8, "--fraction", 0.5]
    given = ["--model", folder, "--data", text, "--eval-data", text, "--eval-limit", 20]
    made = run_cli.ok("run", run, *given, *fields, *stages, "--embed-code")
    assert json.loads((run / "run.json").read_text())["task"] == "mlm"
    metrics = json.loads(Path(made["metrics_path"]).read_text())
    assert metrics["dense"]["metric"] == "loss"
    router = next(row for row in metrics["rows"] if row["applied"])
    assert 0 < router["kl"] and router["value"] != metrics["dense"]["value"] and 0 < router["agreement"] < 1
    again = run_cli.ok("eval", run, "--name", "again", "--data", text, "--limit", 20, *fields[:-1], 3)
    assert again["dense"]["value"] == pytest.approx(metrics["dense"]["value"], abs=1e-4)  # the same masks
    other = next(row for row in again["rows"] if row["applied"])
    assert other["value"] == pytest.approx(router["value"], abs=1e-4)

    for command in (
        ["finetune", run, "--steps", 4],
        ["report", run],
        ["status", run],
        ["bench", folder, "--mode", "prefill", "--seq", 8],
    ):
        run_cli.ok(*command)
    swept = run_cli.ok("tune", run, "--expert-sizes", 4, "--routers", "linear", "--fractions", 0.5)
    assert swept["all"][0]["kl"] > 0
    card = (run / "eval" / "default" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "| loss |" in card and "AutoModelForMaskedLM.from_pretrained" in card
    assert "lower is better" in (run / "report" / "report.html").read_text()

    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    auto = transformers.AutoModelForMaskedLM
    with torch.no_grad():
        mixture = load(run / "model", device="cpu")
        found = mixture(ids).logits
        trusted = auto.from_pretrained(run / "model", trust_remote_code=True)(ids).logits
        plain = auto.from_pretrained(run / "model")(ids).logits
        dense = auto.from_pretrained(folder)(ids).logits
    assert len(installed_layers(mixture)) == 2 and torch.equal(found, trusted)
    assert torch.allclose(plain, dense, atol=1e-5) and not torch.allclose(found, dense, atol=1e-3)


def test_a_masked_language_model_is_made_sparse(text: Path, tmp_path: Path, run_cli: Runner) -> None:
    folder, out = tmp_path / "bert", tmp_path / "out"
    save_tiny("bert-mlm", folder)
    fields = ["--documents", "line", "--max-length", 24, "--batch-size", 4, "--steps", 4, "--teacher", "original"]
    found = run_cli.ok("relufy", out, "--model", folder, "--data", text, *fields)["metrics"]
    assert found["metric"] == "loss" and found["steps"] == 4
    assert json.loads((out / "config.json").read_text())["hidden_act"] == "relu"


def test_what_is_no_masked_language_model_is_refused(text: Path, tmp_path: Path, run_cli: Runner) -> None:
    save_tiny("opt", tmp_path / "opt")
    save_tiny("bert-mlm", tmp_path / "bert")
    for model, task, message in [
        ("opt", "mlm", "--task mlm does not fit .*: OPTForCausalLM is converted with --task lm"),
        ("bert", "lm", "--task lm does not fit .*: BertForMaskedLM is converted with --task mlm"),
    ]:
        refused = run_cli(
            "run", tmp_path / "run", "--model", tmp_path / model, "--data", text, "--task", task, "--json"
        )
        assert refused.code == 2
        error = refused.json["error"]
        assert re.search(message, error["message"]) and error["hint"]
    for path in (tmp_path / "bert").glob("*token*"):
        path.unlink()
    tiny_tokenizer(tmp_path / "bert")  # a decoder's
    refused = run_cli("run", tmp_path / "run", "--model", tmp_path / "bert", "--data", text, "--json")
    assert refused.code == 2 and "has no mask token" in refused.json["error"]["message"]
    assert not (tmp_path / "run" / "activations").exists()
