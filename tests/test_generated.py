"""--data generated:N: a language model writes its own calibration text, once, and goes on where it was killed."""

import json
from pathlib import Path

import pytest
import torch
from cli_runner import Runner
from tiny_models import save_tiny

from moefication_cli.models import sampling
from moefication_cli.models.loading import load_model
from moefication_cli.runs import generated


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "llama")
    return tmp_path / "llama"


def lines(run: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (run / "generated/text.jsonl").read_text().splitlines()]


def test_a_whole_run_without_data(llama: Path, tmp_path: Path, run_cli: Runner) -> None:
    run = tmp_path / "run"
    words = ["--model", llama, "--data", "generated:2_000", "--max-length", 16, "--expert-size", 4, "--refine", 4]
    made = run_cli("run", run, *words, "--fraction", 0.5, "--json")
    assert made.code == 0 and "writes its own calibration text, about 2000 tokens" in made.err
    written = json.loads((run / "generated/generated.json").read_text())
    assert written["config"]["tokens"]["value"] == 2000 and written["config"]["seed"]["value"] == 0
    assert 1900 < sum(len(text.split()) for text in lines(run)) < 3100  # one word is one token here
    collect = ["collect-activations", run, "--data", "generated:2000", "--max-length", 16]
    assert run_cli.ok(*collect)["up_to_date"]
    before = lines(run)
    assert not run_cli.ok(*collect, "--seed", 3)["up_to_date"] and lines(run) != before
    run_cli.ok(*collect)
    assert lines(run) == before  # the same seed writes the same text
    with (run / "generated/text.jsonl").open("a") as file:
        file.write('{"text": "w1"}\n')
    assert "was changed" in run_cli("collect-activations", run, "--data", "generated:2000", "--max-length", 16).err


def test_it_samples_from_the_models_own_distribution(llama: Path) -> None:
    loaded = load_model(llama, quiet=True)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(12)  # far from uniform
    first = loaded.tokenizer.bos_token_id
    if first is None:
        first = sampling.start_token(loaded.tokenizer, loaded.config)
    expected = loaded.model(torch.tensor([[first]])).logits[0, 0].softmax(0)
    texts, written = sampling.sample_texts(loaded, 2000, 2, seed=5)
    assert written <= 2000 and sampling.sample_texts(loaded, 2000, 2, seed=5)[0] == texts
    assert sampling.sample_texts(loaded, 2000, 2, seed=6)[0] != texts
    ids = torch.tensor([loaded.tokenizer.convert_tokens_to_ids(text.strip()) for text in texts if text.strip()])
    found = torch.bincount(ids, minlength=len(expected)) / 2000
    top = expected.topk(5).indices
    real = [index for index in top.tolist() if index not in loaded.tokenizer.all_special_ids]
    assert real and torch.allclose(found[real], expected[real], atol=0.05)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_generation_goes_on(
    replaces: bool, llama: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", llama, "--data", "generated:3000", "--max-length", 16]
    run_cli.ok("collect-activations", tmp_path / "undisturbed", *words)
    if replaces:  # shorter text of an earlier command
        run_cli.ok("collect-activations", tmp_path / "run", *words[:3], "generated:500", *words[4:])
        earlier = lines(tmp_path / "run")
    own, calls = sampling.sample_texts, []

    def counted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(generated, "sample_texts", counted)
    stopped = run_cli("collect-activations", tmp_path / "run", *words)
    assert stopped.code == 130
    if replaces:
        assert lines(tmp_path / "run") == earlier
    else:
        assert not (tmp_path / "run/generated").exists()
    before = len(calls)
    run_cli.ok("collect-activations", tmp_path / "run", *words)
    assert lines(tmp_path / "run") == lines(tmp_path / "undisturbed")
    batches = -(-len(lines(tmp_path / "run")) // 64)
    assert len(calls) - before == batches - 2  # two were there


def test_what_cannot_be_generated(llama: Path, bert: Path, tmp_path: Path, run_cli: Runner) -> None:
    run = tmp_path / "run"
    for words, said in (
        (["collect-activations", run, "--model", llama, "--data", "generated:many"], "no number of tokens"),
        (["collect-activations", run, "--model", llama, "--data", "generated:0"], "no number of tokens"),
        (["collect-activations", run, "--model", bert, "--data", "generated:100"], "only a causal language model"),
        (["relufy", tmp_path / "out", "--model", bert, "--data", "generated:100"], "for calibration only"),
    ):
        found = run_cli(*words)
        assert found.code == 2 and said in found.err and "Traceback" not in found.err, found.err
        assert not run.exists()
    run_cli.ok("collect-activations", run, "--model", llama, "--data", "generated:100", "--dry-run")
    assert not run.exists()
