"""Encoders without a classifier through the commands, as a user runs them: masked language models and embedders."""

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


def as_sentence_transformer(folder: Path, pooling: str) -> None:
    """Beside an encoder, the files that sentence-transformers writes."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    flags = {
        name: name == pooling
        for name in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **flags}))


@pytest.mark.parametrize("pooling", [None, "pooling_mode_cls_token", "pooling_mode_max_tokens"])
def test_an_embedder_through_all_stages(
    pooling: str | None, text: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, run, rng = tmp_path / "bert", tmp_path / "run", random.Random(1)
    save_tiny("bert-bare", folder)
    if pooling is not None:
        as_sentence_transformer(folder, pooling)
    assert run_cli.ok("inspect", folder)["task"] == "embedding"
    tsv = tmp_path / "pairs.tsv"
    lines = [
        f"w{rng.randrange(40)} w{rng.randrange(9)}\tw{rng.randrange(40)} w4\t{rng.random() * 5:.2f}" for _ in range(40)
    ]
    tsv.write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    stages = ["--expert-size", 4, "--epochs", 1, "--refine", 8, "--fraction", 0.5, "--batch-size", 4]
    given = ["--model", folder, "--data", text, "--eval-data", f"pairs={tsv},text={text}", "--eval-limit", 30]
    outcome = run_cli("run", run, *given, *stages, "--embed-code", "--json")
    assert outcome.code == 0, outcome.err
    said = {None: "no modules.json", "pooling_mode_cls_token": "cls pooling, as 1_Pooling says"}
    assert said.get(pooling, "says pooling_mode_max_tokens, which is not computed here") in outcome.err
    metrics = json.loads(Path(outcome.json["metrics_path"]).read_text())
    assert [part["dense"]["metric"] for part in metrics["datasets"].values()] == ["spearman", "cosine"]
    assert metrics["datasets"]["text"]["dense"]["value"] == 1
    of_pairs, of_text = (row for row in metrics["rows"] if row["applied"])
    assert (
        0 < of_text["kl"] < 0.5
        and of_text["value"] == pytest.approx(1 - of_text["kl"])
        and of_text["agreement"] is None
    )
    assert of_pairs["kl"] > 0 and of_pairs["value"] != metrics["datasets"]["pairs"]["dense"]["value"]

    for command in (
        ["report", run],
        ["status", run],
        ["runs", tmp_path],
        ["finetune", run, "--steps", 4, "--loss", "kl,hidden"],
    ):
        run_cli.ok(*command)
    assert "1 - cosine to dense" in (run / "report" / "report.html").read_text()
    card = (run / "eval" / "default" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "(1 - cosine)" in card and "AutoModel.from_pretrained" in card
    refused = run_cli("finetune", run, "--name", "task", "--steps", 2, "--loss", "task", "--json")
    assert refused.code == 2 and "embeddings have no labels" in refused.json["error"]["message"]

    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixture = load(run / "model", device="cpu")
        found = mixture(ids).last_hidden_state
        trusted = transformers.AutoModel.from_pretrained(run / "model", trust_remote_code=True)(ids).last_hidden_state
        plain, dense = (
            transformers.AutoModel.from_pretrained(f)(ids).last_hidden_state for f in (run / "model", folder)
        )
    assert len(installed_layers(mixture)) == 2 and torch.equal(found, trusted)
    assert torch.allclose(plain, dense, atol=1e-5) and not torch.allclose(found, dense, atol=1e-3)
    copied = {path.name for path in (run / "model").iterdir()}
    assert ({"modules.json", "sentence_bert_config.json", "1_Pooling"} <= copied) == (pooling is not None)
    if pooling is not None:  # how tokens are pooled is an input: another way makes what was measured stale
        states = {stage["stage"]: stage["state"] for stage in run_cli.ok("status", run)["stages"]}
        assert states["activations"] == "current"
        config = folder / "1_Pooling" / "config.json"
        config.write_text(config.read_text().replace("true", "false"))
        states = {stage["stage"]: stage["state"] for stage in run_cli.ok("status", run)["stages"]}
        assert states["activations"] == "stale"


def test_a_sentence_transformer_saved_as_a_masked_language_model_is_an_embedder(
    text: Path, tmp_path: Path, run_cli: Runner
) -> None:
    folder, run = tmp_path / "bert", tmp_path / "run"
    save_tiny("bert-mlm", folder)
    as_sentence_transformer(folder, "pooling_mode_mean_tokens")
    assert run_cli.ok("inspect", folder)["task"] == "embedding"
    run_cli.ok("run", run, "--model", folder, "--data", text, "--expert-size", 4, "--epochs", 1, "--fraction", 0.5)
    assert type(load(run / "model", device="cpu")).__name__ == "BertModel"


def test_what_an_embedder_cannot_do_is_refused(text: Path, tmp_path: Path, run_cli: Runner) -> None:
    folder = tmp_path / "bert"
    save_tiny("bert-bare", folder)
    for command, message in [
        (
            ["run", tmp_path / "run", "--model", folder, "--data", text, "--task", "mlm"],
            "BertModel is converted with --task embedding",
        ),
        (["relufy", tmp_path / "out", "--model", folder, "--data", text], "relufy trains with one"),
    ]:
        refused = run_cli(*command, "--json")
        assert refused.code == 2 and message in refused.json["error"]["message"] and refused.json["error"]["hint"]
    bad = tmp_path / "bad.tsv"
    bad.write_text("sentence1\tsentence2\tscore\nw1 w2\tw3\tgood\n")
    refused = run_cli("run", tmp_path / "run", "--model", folder, "--data", text, "--eval-data", bad, "--json")
    assert refused.code == 2 and "row 1 has score 'good'" in refused.json["error"]["message"]
    assert not (tmp_path / "run" / "activations").exists()
