"""relufy --schedule: phases begin where they should, experts go on from those before, and a killed training loses nothing."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cli_runner import Runner
from safetensors.torch import load_file
from test_relufy import TASKS, killed_at, message
from tiny_models import save_tiny, tiny_inputs, tiny_model

from moefication_cli.config import RelufyConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.relu import relu_config
from moefication_cli.models.sites import FFNSite, find_sites
from moefication_cli.models.surgery import is_installed, live_weights
from moefication_cli.routing.routers.similarity import similarity_router
from moefication_cli.split.kmeans import balanced_kmeans, normalised_rows
from moefication_cli.training.alternate import Alternation, Phase, layer_costs, phases

HALF = {"schedule": "3:2", "sparse_fraction": 0.5, "expert_size": 4}
OPTIONS = ["--sparse-fraction", 0.5, "--expert-size", 4]


@pytest.fixture
def gelu(tmp_path: Path) -> Path:
    """A tiny RoBERTa classifier, which has GELU."""
    save_tiny("roberta", tmp_path / "gelu")
    return tmp_path / "gelu"


def relu_model(name: str) -> tuple[Any, list[FFNSite]]:
    dense = tiny_model(name)
    model = type(dense)(relu_config(dense.config)).eval()
    model.load_state_dict(dense.state_dict())
    return model, find_sites(model)


def begin_step(alternation: Alternation, step: int) -> None:
    alternation.on_step_begin(None, SimpleNamespace(global_step=step), None)


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "kinds"),
    [
        ("3:2", 10, "SSSDDSSSDD"),
        ("3:2", 9, "SSSDDSSDD"),  # a sparse phase is cut short, the last dense one never
        ("3:2", 11, "SSSDDSSSDDD"),
        ("3:2", 3, "SDD"),
        ("1:1", 4, "SDSD"),
        ("300:1", 4, "SSSD"),
    ],
)
def test_phases_take_turns_and_the_last_is_dense(schedule: str, steps: int, kinds: str) -> None:
    found = phases(schedule, steps)
    assert "".join("DS"[phase.sparse] * phase.steps for phase in found) == kinds
    assert [phase.first for phase in found] == [sum(p.steps for p in found[:n]) for n in range(len(found))]


@pytest.mark.parametrize(
    "wrong", ["", "3", "3:", "0:3", "3:0", "-1:2", "a:b", "1:2:3", "1.5:2", "3 : 2", "9999999999:1"]
)
def test_what_is_no_schedule(wrong: str) -> None:
    with pytest.raises(ConfigError, match="two numbers of steps"):
        phases(wrong, 100)


def test_wrong_schedules_are_refused(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    out = tmp_path / "out"
    base = ["relufy", out, "--model", gelu, "--data", data, "--steps", 6, "--batch-size", 8]
    for words, said in (
        (["--schedule", "half"], "300:300"),
        (["--schedule", "3:6", *OPTIONS], "takes 6 steps and its last 6 are dense"),
        (["--sparse-fraction", 0.5], "--schedule"),
        (["--expert-size", 4], "--schedule"),
        (["--schedule", "2:2", "--sparse-fraction", 1.5], "0.95"),
        (["--schedule", "2:2", "--expert-size", 5], "do not divide"),
        (["--schedule", "2:2", "--expert-size", 4, "--sparse-fraction", 0.01], "router and 0 of"),
        (["--schedule", "2:2", "--expert-size", 24, "--sparse-fraction", 0.3], "one takes 0.521"),
    ):
        code, found = message(run_cli(*base, *words, "--json"))
        assert code == 2 and said in found, (words, found)
        assert not out.exists()


# -- the phases --------------------------------------------------------------------------------------------------------


def test_layers_are_swapped_where_phases_begin() -> None:
    model, sites = relu_model("bert")
    dense = model(**tiny_inputs("bert")).logits
    alternation = Alternation(model, sites, phases("3:2", 10), RelufyConfig(**HALF), 0)
    installed, same = "", ""
    for step in range(10):
        begin_step(alternation, step)
        installed += "DS"[all(is_installed(model, site) for site in sites)]
        same += "SD"[torch.allclose(model(**tiny_inputs("bert")).logits, dense, atol=1e-6)]
    assert installed == same == "SSSDDSSSDD"
    # a training that goes on within a phase takes the experts that are in the checkpoint
    other, _ = relu_model("bert")
    resumed = Alternation(other, sites, phases("3:2", 10), RelufyConfig(**HALF), 1)
    resumed.partitions.load_state_dict(alternation.partitions.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for site in sites:  # weights from which other experts would be made
            moved = torch.randn_like(model.get_parameter(f"{site.up}.weight"))
            for each in (model, other):
                each.get_parameter(f"{site.up}.weight").copy_(moved)
    begin_step(resumed, 6)
    begin_step(alternation, 6)
    assert all(is_installed(other, site) for site in sites)
    assert torch.equal(other(**tiny_inputs("bert")).logits, model(**tiny_inputs("bert")).logits)


@pytest.mark.parametrize("name", ["bert", "llama", "phi3", "gpt2"])
def test_a_sparse_phase_computes_and_changes_selected_experts_alone(name: str) -> None:
    model, sites = relu_model(name)
    alternation = Alternation(model, sites, [Phase(True, 0, 1)], RelufyConfig(**HALF), 0)
    seen: dict[int, torch.Tensor] = {}
    for site in sites:
        model.get_submodule(site.up).register_forward_pre_hook(
            lambda module, args, n=site.index: seen.__setitem__(n, args[0].detach())
        )
    begin_step(alternation, 0)
    inputs = {key: value[:1, :1] for key, value in tiny_inputs(name, padded=False).items()}  # one token
    out = model(**inputs)
    (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().sum().backward()
    costs = layer_costs(sites, RelufyConfig(**HALF))
    for site, (cost, top_k) in zip(sites, costs, strict=True):
        assert 0.5 - cost.expert_size / site.num_neurons <= cost.flops(top_k) / cost.dense_flops <= 0.5
        expert_F = alternation.partitions.of(site)
        assert torch.bincount(expert_F).tolist() == [4] * cost.num_experts
        layer = model.get_submodule(site.up).__dict__["_moefication"].layer
        order_F = expert_F.argsort(stable=True)
        ffn = live_weights(model, site)
        router = similarity_router(replace(layer.weights, ffn=ffn.permute(order_F)))
        chosen = router.scores(seen[site.index].reshape(1, -1)).topk(top_k).indices.flatten()
        gradient = site.weights_of(lambda piece: piece.of(model.get_parameter(piece.parameter).grad))
        touched_F = gradient.w_up_FD.ne(0).any(1) | gradient.w_down_FD.ne(0).any(1)
        assert touched_F.any() and set(expert_F[touched_F].tolist()) <= set(chosen.tolist())


def test_later_experts_go_on_from_earlier_ones() -> None:
    model, sites = relu_model("bert")
    alternation = Alternation(model, sites, phases("1:1", 4), RelufyConfig(**HALF), 0)
    begin_step(alternation, 0)
    before = [alternation.partitions.of(site).clone() for site in sites]
    torch.manual_seed(1)
    with torch.no_grad():
        for site in sites:
            weight = model.get_parameter(f"{site.up}.weight")
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    begin_step(alternation, 1)
    begin_step(alternation, 2)
    for site, was_F in zip(sites, before, strict=True):
        rows_FD = normalised_rows(live_weights(model, site).w_up_FD.detach())
        scratch_F = balanced_kmeans(rows_FD, int(was_F.max()) + 1, seed=5).expert_F
        assert together(was_F, alternation.partitions.of(site)) > together(was_F, scratch_F)
    (first, second) = [phase for phase in alternation.report() if phase["phase"] == "sparse"]
    moved = sum(int((alternation.partitions.of(s) != was).sum()) for s, was in zip(sites, before, strict=True))
    assert first["moved"] is None and 0 < second["moved"] < 0.5
    assert second["moved"] == moved / sum(site.num_neurons for site in sites)


def together(first_F: torch.Tensor, second_F: torch.Tensor) -> int:
    """Pairs of neurons that share an expert in both."""
    pairs = [expert_F[:, None] == expert_F for expert_F in (first_F, second_F)]
    return int((pairs[0] & pairs[1]).sum())


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_report_and_the_plain_folder(gelu: Path, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    out = tmp_path / "out"
    words = ["--model", gelu, "--data", data, "--batch-size", 8, "--schedule", "2:1", *OPTIONS]
    made = run_cli.ok("relufy", out, *words, "--steps", 7, "--learning-rate", 0.01, "--sparsity", "hoyer")["metrics"]
    assert [(p["phase"], p["first_step"], p["steps"]) for p in made["phases"]] == [
        ("sparse", 1, 2), ("dense", 3, 1), ("sparse", 4, 2), ("dense", 6, 2)
    ]  # fmt: skip
    share = made["phases"][0]["ffn_flops_fraction"]
    assert 0.3 < share <= 0.5 and made["phases"][1]["ffn_flops_fraction"] == 1
    assert made["training_ffn_flops_fraction"] == pytest.approx((4 * share + 3) / 7)
    assert len(made["activity"]) == 2
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert plain.config.hidden_act == "relu"
    before, after = load_file(gelu / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    # neurons stay where they were: a step of almost no length leaves every weight in its place
    run_cli.ok("relufy", tmp_path / "still", *words, "--steps", 4, "--learning-rate", 1e-12)
    still = load_file(tmp_path / "still/model.safetensors")
    assert all(torch.allclose(before[name], still[name], atol=1e-6) for name in before)


@pytest.mark.parametrize("save_steps", [4, 3, 2])  # within the second sparse phase, where it begins, in the first's end
def test_a_killed_training_goes_on_in_its_phase(
    save_steps: int, gelu: Path, data: Path, tmp_path: Path, run_cli: Runner
) -> None:
    words = ["--model", gelu, "--data", data, "--steps", 8, "--batch-size", 12, "--schedule", "2:1", *OPTIONS,
             "--learning-rate", 0.01, "--accumulate", 2]  # fmt: skip
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    killed_at("moefication_cli.training.trainer:_Watch.on_save", ["relufy", out, *words, "--save-steps", save_steps])
    held = list((tmp_path / ".out.partial/scratch").rglob("checkpoint-*/model.safetensors"))
    assert len(held) == 1 and load_file(held[0])["partitions.expert_0_F"].min() == 0
    outcome = run_cli("relufy", out, *words)
    assert outcome.code == 0 and f"went on from step {save_steps}" in outcome.err
    made = run_cli.ok("relufy", undisturbed, *words)
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    again = run_cli.ok("relufy", out, *words)
    assert again["up_to_date"] and again["metrics"]["phases"] == made["metrics"]["phases"]


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task(name: str, data: Path, tmp_path: Path, run_cli: Runner) -> None:
    save_tiny(name, tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("".join(" ".join(f"w{(i * j) % 40}" for j in range(1, 13)) + "\n" for i in range(120)))
    source = text if "--documents" in TASKS[name] else data
    words = ["--model", tmp_path / name, "--data", source, *TASKS[name], "--steps", 4, "--batch-size", 8]
    made = run_cli.ok("relufy", tmp_path / "out", *words, "--autocast", "bfloat16", "--schedule", "1:1", *OPTIONS)
    assert [phase["phase"] for phase in made["metrics"]["phases"]] == ["sparse", "dense"] * 2
    assert all(row["active_after"] < 0.95 for row in made["rows"])
