"""Fine-tuning a converted model: what is trained and what is not, at its budget, resumed, written, loaded and measured."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from plan_inputs import plan_inputs
from safetensors.torch import load_file
from test_interruption import KILLER
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moefication_cli import convert, load
from moefication_cli.config import ApplyConfig, FinetuneConfig
from moefication_cli.conversion.search import WholeModel
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.routing.rules import TopK
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import flat_predictions
from moefication_cli.runs.inputs import read_partition
from moefication_cli.stages.finetune import finetune
from moefication_cli.store.rundir import RunDir

SHORT = ["--tokens", 256, "--steps", 6]


def write_words(path: Path, rows: int, seed: int) -> Path:
    rng = random.Random(seed)
    path.write_text("".join(" ".join(f"w{rng.randrange(40)}" for _ in range(12)) + "\n" for _ in range(rows)))
    return path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny OPT, its data and RUN/model at half the FLOPs: one FFN with a router, one without."""
    base = tmp_path_factory.mktemp("finetune")
    model = tiny_model("opt")
    with torch.no_grad():  # neurons that fire rarely: routing pays
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.fill_(-1.0)
            elif name.endswith("fc1.weight"):
                parameter.mul_(2)
    model.save_pretrained(base / "opt")
    tiny_tokenizer(base / "opt")
    data = write_words(base / "train.txt", 300, 3)
    convert(
        base / "opt", data=data, documents="line", max_length=16, expert_size=4, epochs=6, width=2, refine=0,
        fraction=0.5, out=base / "run",
    )  # fmt: skip
    rules = [layer.router is not None for layer in read_moe_folder(base / "run" / "model").layers]
    assert rules == [True, False]
    return base


@pytest.fixture
def run(made_once: Path, tmp_path: Path) -> Path:
    """That run directory, to change."""
    return Path(shutil.copytree(made_once / "run", tmp_path / "run"))


def written(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model's folder by their names in the files."""
    return load_file(folder / "model.safetensors")


def in_split_order(run: Path, model: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, in the order of neurons that RUN/model has."""
    split, found = RunDir(run).require("split"), dict(weights)
    for site in Checkpoint(model).sites:
        for name, (axis, order) in site.parameter_orders(read_partition(split, site.index).order_F()).items():
            found[name] = weights[name].index_select(axis, order)
    return found


def is_ffn(name: str) -> bool:
    return ".fc1." in name or ".fc2." in name


def is_linear(name: str) -> bool:
    return name.endswith("weight") and (is_ffn(name) or "_proj" in name)


TRAINED = {"router": lambda n: False, "ffn": is_ffn, "lora": is_linear, "all": lambda n: True}


@pytest.mark.parametrize("train", list(TRAINED))
def test_what_is_named_is_trained_and_nothing_else(train: str, run: Path, made_once: Path, run_cli: Runner) -> None:
    before = read_moe_folder(run / "model")
    rate = 0.01 if train == "router" else 0.003
    found = run_cli.ok("finetune", run, *SHORT, "--train", train, "--learning-rate", rate)
    assert found["kept"], found
    run_cli.ok("apply", run, "--finetuned", "default")
    original = in_split_order(run, made_once / "opt", written(made_once / "opt"))
    now = written(run / "model")
    changed = {name for name in original if not torch.equal(original[name], now[name])}
    assert changed == {name for name in original if TRAINED[train](name)}
    after = read_moe_folder(run / "model")
    assert after.settings["finetuned"]["train"] == train
    assert after.settings["finetuned"]["weights_changed"] is (train != "router")
    routers = [(a.router, b.router) for a, b in zip(before.layers, after.layers, strict=True)]
    assert all(not torch.equal(a.w_in_RD, b.w_in_RD) for a, b in routers if a is not None)  # type: ignore[union-attr]
    assert all(a.rule == b.rule or a.router is not None for a, b in zip(before.layers, after.layers, strict=True))


def test_kl_falls_at_the_budget_and_what_is_loaded_was_measured(
    run: Path, made_once: Path, tmp_path: Path, run_cli: Runner
) -> None:
    test = ["--data", write_words(tmp_path / "test.txt", 40, 9), "--documents", "line", "--max-length", 16]
    shown = [*test, "--fractions", "0.5", "--selection", "regression"]
    plain = next(row for row in run_cli.ok("eval", run, *shown)["rows"] if row["applied"])
    config = FinetuneConfig(steps=40, tokens=256, train="ffn")
    metrics = finetune(RunDir(run), config).payload["metrics"]
    assert metrics["kl_after"] < 0.9 * metrics["kl_before"]
    assert metrics["ffn_flops_fraction"] <= 0.5
    run_cli.ok("apply", run, "--finetuned", "default")
    weights = load_file(run / "finetuned" / "default" / "weights.safetensors")

    # Plain loading is the fine-tuned dense model bit for bit
    dense = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    expected = in_split_order(run, made_once / "opt", written(made_once / "opt") | weights)
    assert all(torch.equal(dense[name], tensor) for name, tensor in expected.items())

    # `load` is the mixture whose KL was measured on held-out data, and switching it to all experts is not
    whole, model = whole_model(run, config), load(run / "model", backend="reference")
    everything = load(run / "model", fraction=1.0)
    assert kl_on(whole, model) == pytest.approx(metrics["kl_after"], rel=1e-3)
    assert kl_on(whole, everything) != pytest.approx(metrics["kl_after"], rel=0.05)

    # and `eval` measures it beside the original
    rows = run_cli.ok("eval", run, *shown)["rows"]
    (tuned,) = [row for row in rows if row["applied"]]
    assert tuned["finetuned"] == "default"
    assert tuned["kl"] < 0.9 * plain["kl"]
    assert tuned["ffn_flops_fraction"] <= 0.55
    (full,) = [row for row in rows if row["selection"] == "dense-finetuned"]
    assert full["ffn_flops_fraction"] == 1 and full["kl"] > 1e-4

    # and once more where int8 weights are all that is stored of them
    run_cli.ok("apply", run, "--finetuned", "default", "--weights", "int8")
    rows = run_cli.ok("eval", run, *shown)["rows"]
    (rounded,) = [row for row in rows if row["applied"]]
    assert rounded["selection"] == "regression-int8" and rounded["finetuned"] == "default"
    assert rounded["kl"] == pytest.approx(tuned["kl"], rel=0.1) and rounded["kl"] != tuned["kl"]
    (other,) = [row for row in rows if row["selection"] == "dense-finetuned"]
    assert other["kl"] == pytest.approx(full["kl"], rel=0.1) and other["kl"] != full["kl"]


def whole_model(run: Path, config: FinetuneConfig) -> WholeModel:
    """The original model with the held-out data that `finetune` judged by."""
    return WholeModel(plan_inputs(run, Control()), config.steps, config.tokens)


@torch.inference_mode()
def kl_on(whole: WholeModel, model: Any) -> float:
    found = []
    for batch in whole.heldout.batches:
        dense, other = (flat_predictions(m(**batch.inputs).logits, batch) for m in (whole.loaded.model, model))
        dense, other = dense.log_softmax(-1), other.log_softmax(-1)
        found.append(float((dense.exp() * (dense - other)).sum(-1).mean()))
    return sum(found) / len(found)


DIES = {  # right after the first checkpoint is complete, and with the first one half-written
    "complete": ("moefication_cli.training.trainer:_Watch.on_save", 2),
    "half-written": ("transformers.trainer:Trainer.save_model", None),
}


@pytest.mark.parametrize("moment", list(DIES))
def test_a_killed_training_goes_on_to_the_same_result(
    moment: str, run: Path, made_once: Path, tmp_path: Path, run_cli: Runner
) -> None:
    words = ["--steps", 5, "--tokens", 128, "--save-steps", 2, "--train", "all", "--accumulate", 2]
    undisturbed = Path(shutil.copytree(made_once / "run", tmp_path / "undisturbed"))
    where, resumed_from = DIES[moment]
    command = ["finetune", str(run), *map(str, words)]
    killed = subprocess.run([sys.executable, "-c", KILLER, where, *command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (run / "finetuned" / "default").exists()
    assert list((run / "finetuned" / ".default.partial").rglob("checkpoint-2"))
    outcome = run_cli(*command)
    assert outcome.code == 0, outcome.err
    assert ("went on from step 2" in outcome.err) is (resumed_from == 2)
    run_cli.ok("finetune", undisturbed, *words)
    for name in ("weights.safetensors", "moefication/routers.safetensors"):
        same = (run / "finetuned" / "default" / name, undisturbed / "finetuned" / "default" / name)
        assert [path.exists() for path in same] == [True, True]
        assert same[0].read_bytes() == same[1].read_bytes()
    assert not (run / "finetuned" / ".default.partial").exists()


def test_a_stage_like_the_others(run: Path, run_cli: Runner) -> None:
    estimate = run_cli.ok("finetune", run, *SHORT, "--dry-run")
    assert estimate["dry_run"] and not (run / "finetuned").exists()
    run_cli.ok("finetune", run, *SHORT)
    run_cli.ok("apply", run, "--finetuned", "default")
    # Writing the fine-tuned model over the one it came from makes nothing stale
    assert run_cli.ok("finetune", run, *SHORT)["up_to_date"]
    assert run_cli.ok("apply", run, "--finetuned", "default")["up_to_date"]
    # More steps are another fine-tuning, and RUN/model is then of an old one
    assert run_cli.ok("finetune", run, "--tokens", 256, "--steps", 7)["up_to_date"] is False
    assert "finetuned/default" in str(RunDir(run).why_stale("model"))
    # What was asked for must be what was fine-tuned
    other = run_cli("apply", run, "--finetuned", "default", "--fraction", 0.3, "--json")
    assert other.code == 2 and "0.5" in other.json["error"]["message"]
    # Without it, the conversion alone comes back
    run_cli.ok("apply", run, "--fraction", 0.5)
    assert "finetuned" not in read_moe_folder(run / "model").settings
    assert not list(RunDir(run).path("model").glob("*finetuned*"))
    # Another split: what was trained on the old one is stale
    run_cli.ok("split", run, "--expert-size", 8)
    stale = run_cli("apply", run, "--finetuned", "default", "--json")
    assert stale.code == 3 and "split" in stale.json["error"]["message"]


def test_run_converts_and_finetunes(made_once: Path, tmp_path: Path, run_cli: Runner) -> None:
    words = ["run", tmp_path / "run", "--model", made_once / "opt", "--data", made_once / "train.txt", "--documents",
             "line", "--max-length", 16, "--expert-size", 4, "--epochs", 2, "--refine", 4, "--fraction", 0.5,
             "--finetune", 3, "--train", "router"]  # fmt: skip
    made = run_cli.ok(*words)
    assert made["stages"]["finetune"]["kept"] == ("finetuned" in read_moe_folder(tmp_path / "run" / "model").settings)
    assert made["path"] == str(tmp_path / "run" / "model")
    assert run_cli.ok(*words)["up_to_date"]


@pytest.mark.parametrize("train", ["router", "ffn"])
def test_a_fixed_k_keeps_its_budget(train: str, run: Path, run_cli: Runner) -> None:
    run_cli.ok("apply", run, "--top-k", 2)
    before = read_moe_folder(run / "model")
    metrics = run_cli.ok("finetune", run, "--tokens", 256, "--steps", 30, "--train", train)["metrics"]
    assert metrics["kept"] and metrics["kl_after"] < metrics["kl_before"], metrics
    assert metrics["ffn_flops_fraction"] == metrics["ffn_flops_fraction_before"]
    run_cli.ok("apply", run, "--finetuned", "default")
    after = read_moe_folder(run / "model")
    assert [layer.rule for layer in after.layers] == [layer.rule for layer in before.layers] == [TopK(2)] * 2
    assert all(not torch.equal(a.router.w_in_RD, b.router.w_in_RD)  # type: ignore[union-attr]
               for a, b in zip(before.layers, after.layers, strict=True))  # fmt: skip
    whole = whole_model(run, FinetuneConfig(steps=30, tokens=256))
    assert kl_on(whole, load(run / "model", backend="reference")) == pytest.approx(metrics["kl_after"], rel=1e-3)


def test_losses_that_stop_being_finite(run: Path, run_cli: Runner) -> None:
    burst = run_cli("finetune", run, *SHORT, "--learning-rate", 1e12, "--save-steps", 1, "--json")
    assert burst.code == 1, burst.out
    assert "not finite" in burst.json["error"]["message"] and "--learning-rate" in burst.json["error"]["hint"]
    assert not (run / "finetuned" / "default").exists()
    marked = list((run / "finetuned" / ".default.partial").rglob("checkpoint-*/complete"))
    assert marked  # the last good checkpoint stays
    assert all(t.isfinite().all() for path in marked for t in load_file(path.parent / "model.safetensors").values())


def test_training_that_does_not_help_is_not_kept(run: Path, run_cli: Runner) -> None:
    found = run_cli("finetune", run, *SHORT, "--learning-rate", 2)
    assert found.code == 0 and "nothing of it is kept" in found.out
    assert not (run / "finetuned" / "default" / "weights.safetensors").exists()
    refused = run_cli("apply", run, "--finetuned", "default", "--json")
    assert refused.code == 2 and "did not help" in refused.json["error"]["message"]


def test_bad_input(run: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def code_and_message(*words: object) -> tuple[int, str]:
        outcome = run_cli(*words, "--json")
        error = outcome.json["error"]
        return outcome.code, f"{error['message']} / {error.get('hint', '')}"

    assert code_and_message("finetune", run, "--train", "heads")[0] == 2
    assert code_and_message("finetune", run, "--loss", "mse")[0] == 2
    assert code_and_message("finetune", run, "--name", "../x")[0] == 2
    code, said = code_and_message("apply", run, "--finetuned", "other")
    assert code == 3 and "moefication finetune" in said and "--name other" in said
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)  # as if it were not installed
        code, said = code_and_message("finetune", run, "--train", "lora")
        assert code == 2 and "pip install 'moefication[lora]'" in said
    shutil.rmtree(run / "model")
    code, said = code_and_message("finetune", run)
    assert code == 3 and "moefication apply" in said
    assert code_and_message("finetune", tmp_path / "nothing")[0] == 3
    # A share of a token's scores has no gradient here
    run_cli.ok("apply", run, "--fraction", 0.5, "--rule", "cumulative")
    code, said = code_and_message("finetune", run)
    assert code == 2 and "cumulative" in said and "threshold, top_k" in said
    run_cli.ok("apply", run, "--fraction", 1.0, "--rule", "top_k")  # every expert
    code, said = code_and_message("finetune", run)
    assert code == 2 and "nothing to recover" in said
    assert not (run / "finetuned").exists() or not any((run / "finetuned").iterdir())


def test_too_little_data(made_once: Path, tmp_path: Path, run_cli: Runner) -> None:
    data = write_words(tmp_path / "short.txt", 5, 0)  # one sequence: enough for routers, none to judge by
    convert(
        made_once / "opt", data=data, documents="line", max_length=64, expert_size=4, epochs=1, refine=0,
        out=tmp_path / "run",
    )  # fmt: skip
    refused = run_cli("finetune", tmp_path / "run", "--json")
    assert refused.code == 2 and "too small" in refused.json["error"]["message"]


def test_torchrun_variables_are_not_waited_for(run: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of torchrun trains alone: accelerate must not look for the other ranks."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert finetune(RunDir(run), FinetuneConfig(steps=1, tokens=128), conversion=ApplyConfig(fraction=0.5)).rows
    assert os.environ["WORLD_SIZE"] == "2"
