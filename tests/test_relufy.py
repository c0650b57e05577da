"""relufy: zeros where the activation was smooth, one training like any other, and every bad input."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_runner import Runner
from safetensors.torch import load_file, save_file
from test_interruption import KILLER
from tiny_models import TINY, save_tiny, tiny_inputs, tiny_model, tiny_tokenizer
from torch.nn import functional

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models.capture import capture
from moefication_cli.models.relu import SPARSE, relu_config, zero_intermediate_biases
from moefication_cli.models.sites import find_sites
from moefication_cli.stages import relufy as stage
from moefication_cli.training.sparsity import Penalty, hoyer, l1

SHORT = ["--steps", 3, "--batch-size", 8]
FIXED = {"bloom", "mpt", "esm", "lfm2"}  # the activation is written in their code


@pytest.fixture
def gelu(tmp_path: Path) -> Path:
    """A tiny RoBERTa classifier, which has GELU."""
    save_tiny("roberta", tmp_path / "gelu")
    return tmp_path / "gelu"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A hundred and twenty lines."""
    path = tmp_path / "text.txt"
    path.write_text("".join(" ".join(f"w{(i * j) % 40}" for j in range(1, 13)) + "\n" for i in range(120)))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def message(outcome: Any) -> tuple[int, str]:
    error = outcome.json["error"]
    return outcome.code, f"{error['message']} / {error.get('hint', '')}"


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TINY))
def test_zeros_are_made_and_the_shape_is_kept(name: str) -> None:
    dense = tiny_model(name)
    if name in FIXED:
        with pytest.raises(UnsupportedModelError, match=r"cannot be changed: it is (gelu|silu)"):
            relu_config(dense.config)
        return
    was = dense.config.to_dict()
    config = relu_config(dense.config)
    assert dense.config.to_dict() == was  # the original configuration is not touched
    sparse = type(dense)(config).eval()
    sparse.load_state_dict(dense.state_dict())  # same names, same shapes
    assert {site.activation for site in find_sites(sparse)} <= set(SPARSE)
    (dense_out, dense_zeros), (sparse_out, sparse_zeros) = (outputs_and_zeros(m, name) for m in (dense, sparse))
    assert dense_out.shape == sparse_out.shape
    assert all(0.1 < share < 0.95 for share in sparse_zeros)
    already = find_sites(dense)[0].activation in SPARSE
    assert already or all(share < 0.01 for share in dense_zeros)
    assert torch.equal(dense_out, sparse_out) is already


@torch.no_grad()
def outputs_and_zeros(model: Any, name: str) -> tuple[torch.Tensor, list[float]]:
    """What a model gives, and the share of each FFN's activations that is zero."""
    zeros = []
    with capture(
        model, find_sites(model), on_hidden=lambda site, h_TF: zeros.append(float((h_TF == 0).float().mean()))
    ):
        found = model(**tiny_inputs(name))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state, zeros


def test_intermediate_biases_are_zero_and_stay_so(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    model = tiny_model("llama-bias")
    names = zero_intermediate_biases(model, find_sites(model))
    assert len(names) == 4 and all(".gate_proj." in n or ".up_proj." in n for n in names)
    assert not any(model.get_parameter(name).any() for name in names)
    assert model.get_parameter("model.layers.0.mlp.down_proj.bias").any()

    made = run_cli.ok("relufy", tmp_path / "out", "--model", gelu, "--data", data, *SHORT, "--learning-rate", 0.01,
                      "--no-intermediate-bias")  # fmt: skip
    assert made["metrics"]["zero_biases"] == 2
    before, after = weights(gelu), weights(tmp_path / "out")
    biases = [name for name in after if "intermediate" in name and name.endswith("bias")]
    assert len(biases) == 2 and all(before[name].any() and not after[name].any() for name in biases)
    assert all(after[name].any() for name in after if name.endswith("output.dense.bias"))


def test_the_folder_is_an_ordinary_one_and_run_converts_it(
    gelu: Path, data: Path, tmp_path: Path, run_cli: Runner
) -> None:
    out = tmp_path / "out"
    words = ["relufy", out, "--model", gelu, "--data", data, *SHORT, "--learning-rate", 0.001]
    made = run_cli.ok(*words)
    assert made["path"] == str(out) and made["metrics"]["metric"] == "accuracy"
    assert [set(row) for row in made["rows"]] == [
        {"layer", "name", "active_before", "active_swapped", "active_after"}
    ] * 2
    assert all(row["active_before"] > 0.99 > 0.95 > row["active_after"] > 0.05 for row in made["rows"])
    assert made["metrics"]["steps"] == 3 and made["metrics"]["tokens"] > 3 * 8 * 4 - 1
    assert not list(tmp_path.glob(".out.partial"))

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert plain.config.hidden_act == "relu"
    assert {site.activation for site in find_sites(plain)} == {"relu"}
    before, after = weights(gelu), weights(out)
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("dense.weight"))
    assert oct((out / "model.safetensors").stat().st_mode) == oct((out / "config.json").stat().st_mode)

    assert run_cli.ok(*words)["up_to_date"]
    run = ["--max-tokens", 400, "--expert-size", 4, "--epochs", 1, "--refine", 0, "--fraction", 0.8]
    assert Path(run_cli.ok("run", tmp_path / "run", "--model", out, "--data", data, *run)["path"]).is_dir()


def test_a_pre_trained_model_gets_a_classifier(data: Path, tmp_path: Path, run_cli: Runner) -> None:
    """The published BERT recipe from a checkpoint as pre-training leaves it: no classifier, perhaps no pooler."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY["bert"][1]().to_dict() | {"hidden_act": "gelu"})
    pretrained = transformers.BertForMaskedLM(config)
    pretrained.save_pretrained(tmp_path / "mlm")
    tiny_tokenizer(tmp_path / "mlm")
    words = ["--model", tmp_path / "mlm", "--data", data, *SHORT, "--no-intermediate-bias", "--task", "classification"]
    made = [run_cli.ok("relufy", tmp_path / f"out{i}", *words, "--classes", "0,1")["metrics"] for i in range(2)]
    assert made[0] == made[1]  # the new head is that of the seed
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out0")
    assert type(model).__name__ == "BertForSequenceClassification" and model.config.id2label == {0: "0", 1: "1"}
    run_cli.ok("collect-activations", tmp_path / "run", "--model", tmp_path / "out0", "--data", data)
    for wrong, said in ((["--classes", "a"], "two or more"), (["--classes", "0,1", "--teacher", "original"], "teach"),
                        ([], "--classes")):  # fmt: skip
        code, text = message(run_cli("relufy", tmp_path / "no", *words, *wrong, "--json"))
        assert code == 2 and said in text
    damaged = weights(tmp_path / "mlm")
    save_file({n: t for n, t in damaged.items() if "layer.1.output" not in n}, tmp_path / "mlm/model.safetensors")
    code, text = message(run_cli("relufy", tmp_path / "no", *words, "--classes", "0,1", "--json"))
    assert code == 2 and "lacks 4 tensors" in text and "layer.1.output" in text


def test_half_precision_is_measured_as_written(data: Path, tmp_path: Path, run_cli: Runner) -> None:
    save_tiny("roberta", tmp_path / "half", dtype=torch.float16)
    made = run_cli.ok("relufy", tmp_path / "out", "--model", tmp_path / "half", "--data", data, *SHORT,
                      "--eval-data", data, "--learning-rate", 0.01)  # fmt: skip
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float16}
    again = run_cli.ok("relufy", tmp_path / "again", "--model", tmp_path / "out", "--data", data, *SHORT,
                       "--eval-data", data)["metrics"]  # fmt: skip
    assert again["before"] == made["metrics"]["after"] == again["swapped"]  # it is a ReLU model already
    shares = [
        [row[name] for row in m["activity"]]
        for m, name in ((made["metrics"], "active_after"), (again, "active_before"))
    ]
    assert shares[0] == shares[1]


# -- the training ------------------------------------------------------------------------------------------------------


def test_penalties_against_a_hand_computation() -> None:
    a_TF = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(l1(a_TF)) == pytest.approx((7 + 2 + 0) / 3)
    assert float(hoyer(a_TF)) == pytest.approx((49 / 25 + 1 + 0) / 3)
    assert float(hoyer(10 * a_TF)) == pytest.approx(float(hoyer(a_TF)))  # free of scale, and l1 is not
    assert float(l1(10 * a_TF)) == pytest.approx(10 * float(l1(a_TF)))


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "phi3", "bart"])
def test_the_penalty_is_of_the_gates_activation_at_real_tokens(name: str) -> None:
    dense = tiny_model(name)
    model = type(dense)(relu_config(dense.config)).eval().requires_grad_(True)
    model.load_state_dict(dense.state_dict())
    sites = find_sites(model)
    penalty = Penalty(model, sites, "l1")
    expected: list[float] = []

    def listen(site: Any, x_TD: torch.Tensor) -> None:
        ffn = site.weights_of(lambda piece: piece.of(model.get_parameter(piece.parameter)))
        first, bias = (ffn.w_up_FD, ffn.b_up_F) if not ffn.gated else (ffn.w_gate_FD, ffn.b_gate_F)
        expected.append(functional.linear(x_TD, first, bias).relu().sum(-1).mean().item())

    with capture(model, sites, on_input=listen):
        model(**tiny_inputs(name))
    found = penalty.take()
    assert len(expected) == len(sites)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    found.backward()
    gates = {
        piece.parameter for site in sites for piece in site.slices() if piece.part == ("gate" if site.gated else "up")
    }
    assert all(model.get_parameter(parameter).grad.any() for parameter in gates)
    model(**tiny_inputs(name, padded=False))  # padding counts for nothing: without any, the mean is another
    assert penalty.take().item() != pytest.approx(found.item(), rel=1e-4)


def test_sparsity_makes_fewer_neurons_active(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    active = {}
    for name, options in {"plain": [], "hoyer": ["--sparsity", "hoyer", "--sparsity-weight", 0.1],
                          "l1": ["--sparsity", "l1", "--sparsity-weight", 0.1]}.items():  # fmt: skip
        rows = run_cli.ok("relufy", tmp_path / name, "--model", gelu, "--data", data, "--steps", 25, "--batch-size", 16,
                          "--learning-rate", 0.02, *options)["rows"]  # fmt: skip
        active[name] = sum(row["active_after"] for row in rows)
    assert active["hoyer"] < 0.8 * active["plain"] and active["l1"] < 0.8 * active["plain"]


def test_a_teacher_is_approached_without_labels(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    other, unlabelled = shutil.copytree(gelu, tmp_path / "other"), tmp_path / "unlabelled.tsv"
    tiny_model("roberta", seed=1).save_pretrained(other)
    sentences = [line.split("\t")[0] for line in data.read_text().splitlines()[1:]]
    unlabelled.write_text("\n".join(["sentence", *sentences]) + "\n")
    words = ["--model", gelu, "--data", unlabelled, "--eval-data", data, "--teacher", other, "--task-weight", 0]
    for name, steps, rate in (("near", 30, 0.01), ("start", 1, 1e-12)):
        run_cli.ok("relufy", tmp_path / name, *words, "--steps", steps, "--learning-rate", rate, "--batch-size", 16)
    inputs = transformers.AutoTokenizer.from_pretrained(gelu)(sentences, return_tensors="pt")
    logp = []
    for folder in (other, tmp_path / "near", tmp_path / "start"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            logp.append(model(inputs["input_ids"], inputs["attention_mask"]).logits.log_softmax(-1))
    near, start = (float((logp[0].exp() * (logp[0] - found)).sum(-1).mean()) for found in logp[1:])
    assert near < 0.5 * start


TASKS = {
    "t5-gated": ["--prompt", "say: {sentence}", "--label-words", "w1,w2"],
    "bart": ["--prompt", "say: {sentence}", "--label-words", "w1,w2"],
    "llama": ["--documents", "line", "--max-length", 16],
    "gpt2": ["--documents", "line", "--max-length", 16],
}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task(name: str, data: Path, text: Path, tmp_path: Path, run_cli: Runner) -> None:
    save_tiny(name, tmp_path / name)
    source = text if "--documents" in TASKS[name] else data
    words = ["--model", tmp_path / name, "--data", source, *TASKS[name], *SHORT, "--autocast", "bfloat16"]
    made = run_cli.ok("relufy", tmp_path / "out", *words, "--sparsity", "l1", "--accumulate", 2)
    assert all(row["active_after"] < 0.95 < row["active_before"] for row in made["rows"])
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    named = {"t5-gated": "feed_forward_proj", "llama": "hidden_act"}.get(name, "activation_function")
    assert found[named] == ("gated-relu" if name == "t5-gated" else "relu")


DIES = {  # right after the first checkpoint is complete, with the first one half-written, and with the folder in place
    "complete": ("moefication_cli.training.trainer:_Watch.on_save", 2),
    "half-written": ("transformers.trainer:Trainer.save_model", None),
    "trained": ("moefication_cli.stages.relufy:save_model", 8),
}


def killed_at(where: str, words: list[Any]) -> None:
    command = [sys.executable, "-c", KILLER, where, *map(str, words)]
    # As many threads as here: with others sums are rounded otherwise
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(command, env=os.environ | threads, capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()


@pytest.mark.parametrize("moment", list(DIES))
def test_a_killed_training_goes_on_to_the_same_result(
    moment: str, gelu: Path, data: Path, tmp_path: Path, run_cli: Runner
) -> None:
    where, resumed_from = DIES[moment]
    # several epochs, with dropout
    words = ["--model", gelu, "--data", data, "--steps", 8, "--batch-size", 12, "--save-steps", 2, "--accumulate", 2]
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    killed_at(where, ["relufy", out, *words])
    assert not out.exists()
    outcome = run_cli("relufy", out, *words)
    assert outcome.code == 0, outcome.err
    assert (f"went on from step {resumed_from}" in outcome.err) is (resumed_from is not None)
    made = run_cli.ok("relufy", undisturbed, *words)
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert run_cli.ok("relufy", out, *words)["metrics"]["tokens"] == made["metrics"]["tokens"]
    assert not list(tmp_path.glob(".out.partial")) and not list(tmp_path.glob(".out.old"))


def test_begun_work_of_other_options_is_not_gone_on_with(
    gelu: Path, data: Path, tmp_path: Path, run_cli: Runner
) -> None:
    words = ["relufy", tmp_path / "out", "--model", gelu, "--data", data, "--batch-size", 12, "--save-steps", 1]
    bursts = [run_cli(*words, "--steps", 4, "--learning-rate", 1e30, "--json") for _ in range(2)]
    assert [burst.code for burst in bursts] == [1, 1]  # the second begins at the checkpoint of the first
    assert len({message(burst)[1] for burst in bursts}) == 1 and list(tmp_path.glob(".out.partial"))
    outcome = run_cli(*words, "--steps", 4)
    assert outcome.code == 0 and "went on" not in outcome.err


def test_changed_options_are_refused_unless_forced(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    out = tmp_path / "out"
    words = ["relufy", out, "--model", gelu, "--data", data, *SHORT]
    first = run_cli.ok(*words)
    code, said = message(run_cli(*words, "--learning-rate", 0.001, "--json"))
    assert code == 2 and "`learning_rate`" in said and "--force" in said
    kept = data.read_text()
    data.write_text(kept + "w1 w2\t1\n")
    code, said = message(run_cli(*words, "--json"))
    assert code == 2 and "`data` changed" in said
    data.write_text(kept)
    assert run_cli.ok(*words, "--save-steps", 7)["up_to_date"]  # which changes nothing
    second = run_cli.ok(*words, "--learning-rate", 0.001, "--force")
    assert second["digest"] != first["digest"] and not second["up_to_date"]
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    code, said = message(run_cli(*words, "--learning-rate", 0.001, "--json"))
    assert code == 2 and "config.json was changed" in said
    assert not list(tmp_path.glob(".out.partial"))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(gelu: Path, data: Path, text: Path, tmp_path: Path, run_cli: Runner) -> None:
    out = tmp_path / "out"

    def refused(*words: object) -> str:
        code, said = message(run_cli("relufy", out, *words, "--json"))
        assert code == 2, said
        return said

    base = ["--model", gelu, "--data", data]
    assert "needs a model and data" in refused("--model", gelu)
    assert "--sparsity" in refused(*base, "--sparsity-weight", 0.1)
    assert "--teacher" in refused(*base, "--task-weight", 0)
    assert "not found" in refused("--model", gelu, "--data", tmp_path / "none.tsv")
    # labels outside the set, with the row's number in the file
    lines = data.read_text().splitlines()
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("\n".join([*lines[:41], "w1 w2\t7", *lines[41:]]) + "\n")
    assert "row 41 has label '7'" in refused("--model", gelu, "--data", wrong)
    wrong.write_text("\n".join([*lines[:41], " \t1", *lines[41:]]) + "\n")
    assert "row 41 has no text" in refused("--model", gelu, "--data", wrong, "--eval-data", data)
    # too little to fill a step, and too little to hold anything out
    short = tmp_path / "short.tsv"
    short.write_text("\n".join(lines[:9]) + "\n")
    assert "8 sequences are left to train on, and one step takes 32" in refused(
        "--model", gelu, "--data", short, "--eval-data", data
    )
    assert "--eval-data" in refused("--model", gelu, "--data", short)
    # a family whose activation is written in its code; with a penalty too
    for name in sorted(FIXED):
        save_tiny(name, tmp_path / name)
        said = refused("--model", tmp_path / name, "--data", text, "--documents", "line", "--sparsity", "l1")
        assert f"the activation of {name} models cannot be changed" in said
    # a folder that is somebody else's
    code, said = message(run_cli("relufy", gelu, *base, "--json", *SHORT))
    assert code == 2 and "was not made by relufy" in said and (gelu / "config.json").exists()
    assert not list(tmp_path.glob(".out.*")) or {p.name for p in tmp_path.glob(".out.*")} == {".out.lock"}


def test_a_teacher_of_another_kind(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    other = shutil.copytree(gelu, tmp_path / "other")
    words = ["relufy", tmp_path / "out", "--model", gelu, "--data", data, *SHORT, "--teacher", other, "--json"]
    assert run_cli(*words).code == 0
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"seven"'))
    code, said = message(run_cli(*words, "--force"))
    assert code == 2 and "another vocabulary" in said
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**TINY["roberta"][1]().to_dict() | {"num_labels": 3})
    )
    model.save_pretrained(other)
    file.write_text(file.read_text().replace('"seven"', '"w7"'))
    code, said = message(run_cli(*words, "--force"))
    assert code == 2 and "other outputs" in said


def test_a_loss_that_stops_being_finite(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    out = tmp_path / "out"
    words = ["relufy", out, "--model", gelu, "--data", data, "--batch-size", 8]
    run_cli.ok(*words, "--steps", 1)
    before = (out / "model.safetensors").read_bytes()
    burst = run_cli(*words, "--steps", 6, "--learning-rate", 1e30, "--save-steps", 1, "--force", "--json")
    code, said = message(burst)
    assert code == 1 and "not finite" in said and "--learning-rate" in said
    assert (out / "model.safetensors").read_bytes() == before
    marked = list((tmp_path / ".out.partial").rglob("checkpoint-*/complete"))
    assert marked  # the last good checkpoint stays
    assert all(t.isfinite().all() for path in marked for t in load_file(path.parent / "model.safetensors").values())


def test_memory_that_does_not_suffice(
    gelu: Path, data: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["relufy", tmp_path / "out", "--model", gelu, "--data", data, *SHORT]
    fixed = 16 * sum(tensor.numel() for tensor in weights(gelu).values())
    monkeypatch.setattr(stage, "total_memory", lambda device: fixed - 1)
    code, said = message(run_cli(*words, "--json"))
    assert code == 1 and "GiB of memory" in said and "--teacher" in said and not (tmp_path / "out").exists()
    monkeypatch.setattr(stage, "total_memory", lambda device: fixed + 1)  # the model fits, the largest batch does not
    outcome = run_cli(*words)
    assert outcome.code == 0 and "less is needed with a smaller --batch-size" in outcome.err
    monkeypatch.setattr(stage, "total_memory", lambda device: 2**30)
    assert "less is needed" not in run_cli(*words, "--force").err


def test_an_estimate_writes_nothing(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    words = ["relufy", tmp_path / "out", "--model", gelu, "--data", data]
    few = run_cli.ok(*words, "--dry-run", "--steps", 10)
    many = run_cli.ok(*words, "--dry-run", "--steps", 1000, "--teacher", "original")
    assert few["dry_run"] and many["rows"][0]["seconds"] > 10 * few["rows"][0]["seconds"] > 0
    assert many["rows"][0]["memory_gib"] > few["rows"][0]["memory_gib"] > 0
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()
