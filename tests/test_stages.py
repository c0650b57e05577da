"""The whole pipeline on tiny models, every stage alone, and what goes stale when something changes."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_runner import Runner
from tiny_models import save_tiny, tiny_inputs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moefication_cli import load
from moefication_cli.config import RouterConfig
from moefication_cli.store.layerfile import read_layer

WORDS = [f"w{i}" for i in range(40)]
HALF = ["--router", "similarity", "--expert-size", 4, "--fraction-of", "neurons", "--fraction", 0.5]


def write_data(path: Path, task: str, rows: int, seed: int) -> Path:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(rows)]
    if task == "lm":
        path = path.with_suffix(".txt")
        path.write_text("\n".join(texts) + "\n")
    else:
        path = path.with_suffix(".tsv")
        lines = [f"{text}\t{rng.randint(0, 1)}" for text in texts]
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return path


@pytest.fixture
def world(tmp_path: Path, run_cli: Runner):
    """`world(name, task)` -> (run directory, model folder, calibration options, evaluation options)."""

    def make(name: str, task: str) -> tuple[Path, Path, list[str], list[str]]:
        model = tmp_path / name
        save_tiny(name, model)
        train, test = (
            write_data(tmp_path / part, task, rows, seed) for part, rows, seed in (("train", 120, 0), ("dev", 24, 1))
        )
        collect = ["--model", str(model), "--data", str(train)]
        extra = ["--documents", "line", "--max-length", "16"] if task == "lm" else []
        if task == "text2text":
            collect += ["--prompt", "w1 w2 {sentence}", "--label-words", "w3,w4"]
        return tmp_path / "run", model, collect + extra, ["--data", str(test), *extra[:2]]

    return make


CASES = [("bert", "classification"), ("t5", "text2text"), ("llama", "lm"), ("gpt2", "lm")]
# Adds to the FFN's output in place; counts its positions under another name; its decoder reads the encoder's input
ODD = [("falcon", "lm"), ("mpt", "lm"), ("bart-classifier", "classification")]
FUSED = [("phi3", "lm"), ("glm4", "lm"), ("modernbert", "classification")]  # gate and up in one projection


@pytest.mark.parametrize(("name", "task"), [*CASES, *FUSED, *ODD])
def test_pipeline(name: str, task: str, world: Any, run_cli: Runner) -> None:
    run, model, collect, evaluate = world(name, task)
    run_cli.ok("collect-activations", run, *collect)
    assert run_cli.ok("build-graph", run)["complete"]
    assert {row["num_experts"] for row in run_cli.ok("split", run, "--expert-size", 4)["rows"]} == {
        16 if name == "mpt" else 12
    }
    run_cli.ok("train-router", run, "--router", "mlp", "--epochs", 2)
    run_cli.ok("apply", run, "--fraction", 0.5, "--fraction-of", "neurons")
    found = run_cli.ok(
        "eval", run, *evaluate, "--fractions", "0.25,0.5", "--fraction-of", "neurons", "--selection", "neuron,mlp"
    )
    rows = found["rows"]
    assert {row["selection"] for row in rows} == {"groundtruth", "random", "static", "neuron", "mlp"}
    assert [row["fraction"] for row in rows if row["applied"]] == [0.5]
    neuron, chance = (
        [r["kl"] for r in rows if r["selection"] == s and r["fraction"] == 0.5][0] for s in ("neuron", "random")
    )
    assert 0 <= neuron < chance
    for row in rows:
        assert row["active_fraction"] == pytest.approx(row["fraction"], abs=0.05)
    metrics = json.loads((run / "eval" / "default" / "metrics.json").read_text())
    assert set(metrics["dense"]) >= {"metric", "value", "seconds", "tokens_per_second"}
    assert (run / "eval" / "default" / "quality.png").stat().st_size > 5000
    assert run_cli.ok(
        "eval", run, *evaluate, "--fractions", "0.25,0.5", "--fraction-of", "neurons", "--selection", "neuron,mlp"
    )["up_to_date"]


@pytest.mark.parametrize(("name", "task"), [("bert", "classification"), *FUSED])
def test_converted_folder_is_dense_for_transformers_and_exact_with_all_experts(
    name: str, task: str, world: Any, run_cli: Runner
) -> None:
    run, model, collect, _ = world(name, task)
    run_cli.ok("run", run, *collect, *HALF)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    kind = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
    with torch.inference_mode():
        original = kind.from_pretrained(model)(ids).logits
        plain = kind.from_pretrained(run / "model")(ids).logits
        everything = load(run / "model", fraction=1.0)(ids).logits
        half = load(run / "model")(ids).logits
    assert torch.allclose(original, plain, atol=1e-4)
    assert torch.allclose(original, everything, atol=1e-4)
    assert (original - half).abs().max() > 0.05  # negative control: experts that are off are missed


def test_generate_with_the_converted_model(world: Any, run_cli: Runner) -> None:
    run, model, collect, _ = world("llama", "lm")
    run_cli.ok(
        "run", run, *collect, "--router", "linear", "--expert-size", 4, "--fraction-of", "neurons", "--fraction", 0.5,
        "--refine", 3,
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dense = AutoModelForCausalLM.from_pretrained(model).generate(ids, **options)
    everything = load(run / "model", fraction=1.0).generate(ids, **options)
    moe = load(run / "model").generate(ids, **options)
    assert torch.equal(dense, everything)
    assert moe.shape == dense.shape


@pytest.mark.parametrize(("name", "task", "auto"), [("bert", "classification", "AutoModelForSequenceClassification"),
                                                    ("t5", "text2text", "AutoModelForSeq2SeqLM"),
                                                    ("llama", "lm", "AutoModelForCausalLM")])  # fmt: skip
def test_embedded_code_gives_the_moe_to_those_who_trust_it(
    name: str, task: str, auto: str, world: Any, run_cli: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run, _, collect, _ = world(name, task)
    run_cli.ok("run", run, *collect, *HALF, "--embed-code")
    kind, inputs = getattr(transformers, auto), tiny_inputs(name, padded=False)
    with torch.inference_mode():
        trusted = kind.from_pretrained(run / "model", trust_remote_code=True, dtype=torch.float32)(**inputs).logits
        plain = kind.from_pretrained(run / "model", dtype=torch.float32)(**inputs).logits
        ours = load(run / "model")(**inputs).logits
        dense = load(run / "model", fraction=1.0, trust_remote_code=True)(**inputs).logits
    assert torch.allclose(trusted, ours, atol=1e-5)
    assert torch.allclose(plain, dense, atol=1e-4)
    assert (trusted - plain).abs().max() > 0.05  # negative control
    monkeypatch.setitem(sys.modules, "moefication_cli.models.embedded", None)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "others"))
    for module in [m for m in sys.modules if "modeling_moefication" in m]:
        monkeypatch.delitem(sys.modules, module)
    with torch.inference_mode():  # where the package is missing, the code in the folder computes the mixture
        alone = kind.from_pretrained(run / "model", trust_remote_code=True, dtype=torch.float32)(**inputs).logits
    assert torch.allclose(alone, ours, atol=1e-5)


def test_stages_run_alone_and_only_what_depends_becomes_stale(world: Any, run_cli: Runner) -> None:
    run, model, collect, evaluate = world("bert", "classification")
    # A split by weights needs the model alone.
    alone = run.with_name("alone")
    run_cli.ok("split", alone, "--model", model, "--method", "kmeans", "--num-experts", 6)
    assert (alone / "split" / "manifest.json").exists()

    run_cli.ok("collect-activations", run, *collect)
    run_cli.ok("split", run, "--method", "kmeans", "--num-experts", 6)
    run_cli.ok("train-router", run, "--router", "linear")
    assert run_cli.ok("split", run, "--method", "kmeans", "--num-experts", 6)["up_to_date"]
    run_cli.ok("split", run, "--method", "kmeans", "--num-experts", 8)
    stale = run_cli("apply", run, "--json")
    assert stale.code == 3
    assert stale.json["error"]["code"] == "stale_input"
    assert "split" in stale.json["error"]["message"]
    assert run_cli.ok("collect-activations", run, *collect)["up_to_date"]
    run_cli.ok("train-router", run, "--router", "linear")
    run_cli.ok("apply", run, "--fraction", 0.5)


def test_a_deleted_stage_is_made_again_with_the_same_bytes(world: Any, run_cli: Runner) -> None:
    import shutil

    run, model, collect, _ = world("bert", "classification")
    run_cli.ok("collect-activations", run, *collect)
    first: dict[str, bytes] = {}
    for attempt in range(2):
        run_cli.ok("build-graph", run)
        run_cli.ok("split", run, "--method", "graph", "--num-experts", 6)
        for path in sorted(run.glob("*/layer_*.safetensors")):
            if path.parent.name in ("graph", "split"):
                data = path.read_bytes()
                assert first.setdefault(str(path), data) == data
        if attempt == 0:
            shutil.rmtree(run / "graph")
            shutil.rmtree(run / "split")


def test_run_makes_what_the_separate_commands_make(world: Any, run_cli: Runner) -> None:
    """Options of one name and several meanings stay apart: the batches of `run` are not those routers are trained with."""
    run, model, collect, evaluate = world("bert", "classification")
    common = [*collect, "--batch-size", 8, "--max-tokens", 600]
    neurons = ["--fraction-of", "neurons"]
    whole = run_cli.ok(
        "run", run, *common, "--eval-data", evaluate[1], "--router", "mlp", "--epochs", 2, "--expert-size", 4,
        *neurons, "--fraction", 0.5, "--fractions", "0.25,0.5", "--selection", "mlp",
    )  # fmt: skip
    assert {row["fraction"] for row in whole["rows"]} == {0.25, 0.5}
    trained = json.loads((run / "router" / "mlp" / "manifest.json").read_text())["config"]
    assert (trained["batch_size"]["value"], trained["max_tokens"]["value"]) == (RouterConfig().batch_size, None)
    assert trained["batch_size"]["source"] == trained["max_tokens"]["source"] == "default"
    assert (trained["epochs"]["value"], trained["epochs"]["source"]) == (2, "command line")
    again = {
        "collect-activations": common,
        "split": ["--expert-size", 4],
        "train-router": ["--router", "mlp", "--epochs", 2],
        "apply": ["--router", "mlp", *neurons, "--fraction", 0.5],
        "eval": [*evaluate, "--batch-size", 8, *neurons, "--fractions", "0.25,0.5", "--selection", "mlp"],
    }
    for command, options in again.items():
        assert run_cli.ok(command, run, *options)["up_to_date"], command


def test_layers_of_an_array_job_complete_each_other(world: Any, run_cli: Runner) -> None:
    run, model, _, _ = world("bert", "classification")
    options = ["--model", model, "--method", "kmeans", "--num-experts", 6]
    first = run_cli.ok("split", run, *options, "--layers", "1")
    assert first["complete"] is False
    assert first["missing"] == ["encoder.layer.0"]
    assert not (run / "split").exists()
    assert run_cli.ok("split", run, *options, "--layers", "0")["complete"] is True
    whole = run.with_name("whole")
    run_cli.ok("split", whole, *options)
    for index in range(2):
        name = f"split/layer_{index:03d}.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_padding_is_never_collected(world: Any, run_cli: Runner) -> None:
    run, model, collect, _ = world("bert", "classification")
    run_cli.ok("collect-activations", run, *collect, "--batch-size", 16)
    one = run.with_name("one")
    run_cli.ok("collect-activations", one, *collect, "--batch-size", 1)  # a batch of one has no padding
    padded, _ = read_layer(run / "activations" / "layer_001.safetensors")
    single, _ = read_layer(one / "activations" / "layer_001.safetensors")
    assert padded["inputs_TD"].shape == single["inputs_TD"].shape
    for name in ("rate_F", "mean_F", "contribution_F"):
        assert torch.allclose(padded[name], single[name], atol=1e-4), name


def test_max_tokens_samples_the_whole_data(world: Any, run_cli: Runner, tmp_path: Path) -> None:
    run, model, collect, _ = world("llama", "lm")
    rows = [f"w{1 if i < 500 else 2} " * 8 for i in range(1000)]
    data = tmp_path / "ordered.txt"
    data.write_text("\n".join(rows) + "\n")
    run_cli.ok(
        "collect-activations",
        run,
        "--model",
        model,
        "--data",
        data,
        "--documents",
        "line",
        "--max-length",
        16,
        "--max-tokens",
        800,
    )
    tensors, _ = read_layer(run / "activations" / "layer_000.safetensors")
    assert len(tensors["inputs_TD"]) <= 800
    # Tokens of the second half of the file are there: the first layer's inputs form (at least) two groups per position.
    first_rows = tensors["inputs_TD"][tensors["sequence_T"] < 20].float()
    assert len(first_rows.round(decimals=2).unique(dim=0)) > 16


def test_planted_experts_are_found_by_router(world: Any, run_cli: Runner) -> None:
    run, model, collect, _ = world("bert", "classification")
    run_cli.ok("collect-activations", run, *collect)
    run_cli.ok("split", run, "--method", "kmeans", "--num-experts", 6)
    found = run_cli.ok("train-router", run, "--router", "mlp", "--epochs", 10)
    for layer in found["metrics"]["layers"]:
        for row in layer["captured"]:
            assert row["random"] < row["router"] <= row["oracle"] + 1e-6


def test_data_and_tokenizer_are_inputs(world: Any, run_cli: Runner) -> None:
    run, model, collect, evaluate = world("bert", "classification")
    train, dev = Path(collect[-1]), Path(evaluate[1])
    collected = run_cli.ok("collect-activations", run, *collect)["metrics"]
    assert run_cli.ok("collect-activations", run, *collect)["up_to_date"]
    same = train.with_name("other.tsv")
    same.write_bytes(train.read_bytes())
    assert run_cli.ok("collect-activations", run, *collect[:-1], same)["up_to_date"]  # the content counts, not the name
    run_cli.ok("split", run, "--expert-size", 4)
    run_cli.ok("train-router", run, "--router", "similarity")
    first = run_cli.ok("eval", run, *evaluate, "--fraction-of", "neurons")
    assert run_cli.ok("eval", run, *evaluate, "--fraction-of", "neurons")["up_to_date"]
    dev.write_text("".join(dev.read_text().splitlines(keepends=True)[:-4]))
    second = run_cli.ok("eval", run, *evaluate, "--fraction-of", "neurons")
    assert not second["up_to_date"] and second["examples"] == first["examples"] - 4
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:60]))
    again = run_cli("collect-activations", run, *collect, "--json")
    assert not again.json["up_to_date"] and again.json["metrics"] != collected
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("64", "63"))
    assert not run_cli.ok("collect-activations", run, *collect)["up_to_date"]


def test_a_collection_killed_before_the_data_changed_is_not_continued(
    world: Any, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefication_cli.stages import collect_activations as stage

    run, _, collect, _ = world("bert", "classification")
    monkeypatch.setattr(stage, "SHARD_BYTES", 20_000)
    whole, made = stage.collect_shard, []

    def two(*arguments: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(whole(*arguments))

    monkeypatch.setattr(stage, "collect_shard", two)
    assert run_cli("collect-activations", run, *collect).code == 130
    monkeypatch.setattr(stage, "collect_shard", whole)
    train = Path(collect[-1])
    train.write_text(train.read_text().replace("w1 ", "w2 "))
    run_cli.ok("collect-activations", run, *collect)
    run_cli.ok("collect-activations", run.with_name("fresh"), *collect)
    mixed, fresh = (folder / "activations" / "layer_000.safetensors" for folder in (run, run.with_name("fresh")))
    assert mixed.read_bytes() == fresh.read_bytes()


def test_refinement_refuses_data_that_changed(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    data = run.with_name("train.txt")
    data.write_text(data.read_text().replace("w3 ", "w4 "))
    refused = run_cli("apply", run, "--fraction", 0.6, "--refine", 2, "--json")
    assert refused.code == 3 and "calibration data" in refused.json["error"]["message"]
    assert "collect-activations" in refused.json["error"]["hint"]
