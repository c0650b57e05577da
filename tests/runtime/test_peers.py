"""`teal` and `cmoe`, the peers in `eval`: by hand, at the budget, equal to dense where everything is on; and several data sets."""

import json
from pathlib import Path

import pytest
import torch
from cli_runner import Runner
from experts import make, tokens
from test_stages import write_data
from tiny_models import save_tiny
from torch import Tensor

from moefication_cli.conversion.plan import Budget
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.cmoe import (
    Layout,
    carve,
    choose_layout,
    cmoe_layer,
    marks,
    representative_selection,
)
from moefication_cli.evaluation.selections import PinnedFFN, SelectionRow, count_selections, flops_fractions
from moefication_cli.evaluation.teal import (
    TealFFN,
    greedy_path,
    magnitude_above,
    shares_at,
    thresholds_at,
)
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.split.kmeans import balanced_assignment
from moefication_cli.tasks.data_files import named_data


def test_teal_by_hand() -> None:
    """Gated, act = identity: x = (2, 0.4, -1). The gate reads what exceeds 0.5, (2, 0, -1); up all; down what exceeds 3."""
    ffn = FFNWeights(
        w_up_FD=torch.tensor([[1.0, 5.0, 0.0], [0.0, 1.0, 1.0]]),
        w_gate_FD=torch.tensor([[1.0, 9.0, 0.0], [1.0, 0.0, 1.0]]),
        w_down_FD=torch.tensor([[1.0, 0.0, 0.0], [0.0, 7.0, 0.0]]),
        b_down_D=torch.tensor([0.0, 0.0, 0.5]),
        activation="identity",
    )
    teal = TealFFN(ffn, [0.5, 0.0, 3.0])
    # gate = (2, 1), up = (4, -0.6), h = (8, -0.6), of which the second is dropped
    assert torch.allclose(teal(torch.tensor([[2.0, 0.4, -1.0]])), torch.tensor([[8.0, 0.0, 0.5]]))
    assert teal.kept_P.tolist() == pytest.approx([2 / 3, 1.0, 1 / 2])
    assert teal.flops_fraction == pytest.approx((2 / 3 + 1 + 1 / 2) / 3) and teal.active_fraction == 0.5
    # Padding is not counted
    padded = torch.tensor([[[2.0, 0.4, -1.0], [9.0, 9.0, 9.0]]])
    teal.count_selections()
    teal(padded, torch.tensor([[True, False]]))
    assert teal.kept_P.tolist() == pytest.approx([2 / 3, 1.0, 1 / 2])
    row = SelectionRow("teal", "baseline", 0.5, [teal])
    assert flops_fractions(row) == [pytest.approx(13 / 18)]
    count_selections(row)
    assert torch.isnan(teal.kept_P).all()


def test_a_threshold_keeps_no_more_than_its_share() -> None:
    values = torch.tensor([[0.0, -2.0, 1.0], [1.0, 0.0, 1.0]])
    assert magnitude_above(values, 1.0) == 0.0  # all but the zeros
    assert magnitude_above(values, 1 / 6) == 1.0
    assert magnitude_above(values, 0.5) == 1.0  # of three equal entries all go
    assert magnitude_above(values, 0.0) == 2.0


def planted_inputs() -> tuple[FFNWeights, Tensor]:
    """Entries of x are 1 or -1, all needed; of the 8 neurons half write a hundredth of what the others do."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randint(0, 2, (200, 8), generator=generator) * 2.0 - 1
    scale_F1 = torch.tensor([1.0] * 4 + [0.01] * 4)[:, None]
    return FFNWeights(torch.eye(8) * scale_F1, torch.eye(8), activation="identity"), x_TD


def test_the_greedy_search_cuts_first_what_costs_least() -> None:
    ffn, x_TD = planted_inputs()
    path_CP = greedy_path(ffn, x_TD + torch.randn(200, 8, generator=torch.Generator().manual_seed(1)) * 0.01, 0.05)
    # x stays whole while down still reads neurons that hardly write
    assert path_CP[:6, 0].tolist() == [1.0] * 6
    assert path_CP[:6, 1].tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], abs=0.01)
    steps = path_CP.mean(1).diff()[:15]
    assert steps.tolist() == pytest.approx([-0.05] * 15, abs=0.01)
    assert path_CP[-1].tolist() == [0, 0]
    assert shares_at(path_CP, 0.9) == pytest.approx([1.0, 0.8], abs=0.01)
    assert shares_at(path_CP, 1.0) == [1.0, 1.0]
    assert sum(shares_at(path_CP, 0.33)) / 2 == pytest.approx(0.33, abs=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("fraction", [0.2, 0.45])
def test_teal_spends_its_budget(gated: bool, activation: str, fraction: float) -> None:
    ffn = FFNWeights(**{**vars(make(d=16, gated=gated).ffn), "activation": activation})
    x_TD = tokens(600, make(d=16, gated=gated))
    teal = TealFFN(ffn, thresholds_at(ffn, greedy_path(ffn, x_TD[:200], 0.05), fraction, x_TD))
    y_TD = teal(x_TD)
    assert teal.flops_fraction == pytest.approx(fraction, rel=0.02)
    assert (y_TD - ffn.forward(x_TD)).abs().max() > 0.01  # negative control of the next test


@pytest.mark.parametrize("gated", [False, True])
def test_teal_at_the_whole_budget_is_dense(gated: bool) -> None:
    weights = make(d=16, gated=gated)
    x_TD = tokens(50, weights)
    teal = TealFFN(weights.ffn, thresholds_at(weights.ffn, greedy_path(weights.ffn, x_TD, 0.1), 1.0, x_TD))
    assert torch.allclose(teal(x_TD), weights.ffn.forward(x_TD), atol=1e-5)
    assert 0.5 < teal.flops_fraction <= 1.0  # ReLU's zeros cost nothing


def test_balanced_assignment_is_the_cheapest() -> None:
    """Row 0 is nearest to column 0 as well as rows 1 and 2, but giving way costs it least."""
    cost_FE = torch.tensor([[0, 1], [0, 5], [0, 5], [9, 8]])
    assert balanced_assignment(cost_FE).tolist() == [1, 0, 0, 1]
    with pytest.raises(ConfigError, match="do not divide"):
        balanced_assignment(torch.zeros(5, 2, dtype=torch.int64))


def test_cmoe_carves_what_fires_together() -> None:
    """Neuron 6 is marked by every token, 0-2-4 and 1-3-5 in turns; 2 and 3 are marked whenever their group is."""
    even, odd = [[6, 2, 0], [6, 2, 4], [6, 2, 0], [6, 2, 4]], [[6, 3, 1], [6, 3, 5], [6, 3, 1]]
    partition, representative_E = carve(torch.tensor(even + odd), 7, Layout(1, 2, 3, 1))
    assert partition.expert_F.tolist() == [0, 1, 0, 1, 0, 1, -1]
    assert representative_E.tolist() == [2, 3]


def test_cmoe_marks_and_routes_by_normalised_neurons() -> None:
    """A neuron with long weight rows is not marked for that, and does not win the routing for it."""
    ffn = FFNWeights(torch.tensor([[9.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.eye(3)[:, :2], activation="identity")
    select = representative_selection(ffn, torch.tensor([0, 1]), 1)
    x_TD = torch.tensor([[1.0, 2.0], [-3.0, 2.0]])
    assert select(x_TD, None).tolist() == [[1], [0]]
    wide = FFNWeights(torch.cat([torch.eye(12) * torch.arange(1, 13)[:, None].flip(0)]), torch.eye(12))
    marked = marks(wide, torch.arange(1.0, 13.0)[None])
    assert sorted(marked[0].tolist()) == list(range(2, 12))  # the ten largest of 1..12


@pytest.mark.parametrize("num_neurons", [48, 172, 1536, 3072, 11008])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("router_cost", [0.0, 0.5, 2 / 3])
def test_a_layout_fits_its_budget(num_neurons: int, fraction: float, router_cost: float) -> None:
    wanted = fraction * num_neurons
    found = choose_layout(num_neurons, wanted, router_cost)
    assert found.num_shared + found.num_experts * found.size == num_neurons and found.num_shared >= 0
    assert 1 <= found.top_k < found.num_experts
    cost = found.num_shared + found.top_k * found.size + router_cost * found.num_experts
    if num_neurons < 1000 and fraction < 0.25 and router_cost:
        assert cost > wanted  # nothing fits: the cheapest there is
    elif num_neurons > 48:
        assert 0.98 * wanted - 1 <= cost <= wanted + 1e-6
    if num_neurons > 1000 and fraction >= 0.25:
        assert num_neurons / found.size == pytest.approx(16, abs=1.5)
        assert found.num_shared / found.size == pytest.approx(found.top_k, abs=1.5)  # as many shared as routed


def planted_experts() -> tuple[FFNWeights, Tensor]:
    """Eight groups of eight ReLU neurons, each group firing on a direction of its own; a token has one direction."""
    generator = torch.Generator().manual_seed(0)
    group_F = torch.arange(64) % 8
    w_up_FD = torch.eye(8)[group_F] + 0.05 * torch.randn(64, 8, generator=generator)
    x_TD = torch.eye(8)[torch.randint(0, 8, (400,), generator=generator)]
    return FFNWeights(w_up_FD, torch.randn(64, 8, generator=generator)), x_TD


def test_cmoe_finds_planted_experts_and_costs_what_it_says() -> None:
    ffn, x_TD = planted_experts()
    layer, layout = cmoe_layer(ffn, x_TD, Budget(0.5), "torch")
    layer.layer.count_selections()
    error = (layer(x_TD) - ffn.forward(x_TD)).square().sum()
    share = (layout.num_shared + layout.top_k * layout.size) / 64
    assert layer.active_fraction == pytest.approx(share)
    assert layer.flops_fraction == pytest.approx(share + layout.num_experts * 0.5 / 64)
    assert 0.9 * 0.5 < layer.flops_fraction <= 0.5
    assert layer.flops_fraction > layer.active_fraction + 0.02  # negative control: the router counts

    def chance(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(len(x_TD), layout.num_experts, generator=generator).topk(layout.top_k).indices

    layer.layer.select = chance
    assert error < 0.5 * (layer(x_TD) - ffn.forward(x_TD)).square().sum()


@pytest.mark.parametrize("gated", [False, True])
def test_cmoe_with_everything_on_is_dense(gated: bool) -> None:
    weights = make(d=16, gated=gated)
    x_TD = tokens(300, weights)
    whole, half = (cmoe_layer(weights.ffn, x_TD, Budget(f), "torch")[0] for f in (1.0, 0.5))
    for layer in (whole, half):
        assert isinstance(layer, PinnedFFN)
        layer.layer.count_selections()
    assert torch.allclose(whole(x_TD), weights.ffn.forward(x_TD), atol=1e-5)
    assert whole.flops_fraction == 1.0
    assert not torch.allclose(half(x_TD), weights.ffn.forward(x_TD), atol=1e-2)  # negative control


def test_names_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_data("valid=a.txt,other=glue/sst2") == {"valid": "a.txt", "other": "glue/sst2"}
    assert named_data("a.txt") == {"": "a.txt"} and named_data("a,b.txt") == {"": "a,b.txt"}
    for bad, said in (("valid=a.txt,b.txt", "'b.txt' is not"), ("a=1,a=2", "two data sets"), ("a=", "'a' is not")):
        with pytest.raises(ConfigError, match=said):
            named_data(bad)
    monkeypatch.chdir(tmp_path)
    Path("x=1.txt").touch()
    assert named_data("x=1.txt") == {"": "x=1.txt"}


@pytest.mark.parametrize(("name", "task"), [("llama", "lm"), ("bert", "classification")])
def test_every_selection_on_two_data_sets(name: str, task: str, tmp_path: Path, run_cli: Runner) -> None:
    run, lines = tmp_path / "run", ["--documents", "line", "--max-length", "16"] if task == "lm" else []
    save_tiny(name, tmp_path / "model")
    train, valid, other = (write_data(tmp_path / part, task, 90, seed) for seed, part in enumerate("abc"))
    run_cli.ok("collect-activations", run, "--model", tmp_path / "model", "--data", train, *lines, "--no-sensitivity")
    run_cli.ok("split", run, "--method", "random", "--expert-size", 4)
    run_cli.ok("train-router", run, "--router", "similarity")
    evaluate = ["eval", run, *lines[:2], "--selection", "all", "--fractions", "0.5,1.0", "--fraction-of", "neurons"]
    both = run_cli.ok(*evaluate, "--data", f"valid={valid},other={other}")
    names = {"groundtruth", "random", "static", "neuron", "paper", "teal", "cmoe", "similarity"}
    rows = {(row["data"], row["selection"], row["fraction"]): row for row in both["rows"]}
    assert set(rows) == {(d, s, f) for d in ("valid", "other") for s in names for f in (0.5, 1.0)}
    assert set(both["datasets"]) == {"valid", "other"} and both["dense"] == both["datasets"]["valid"]["dense"]
    assert {row.get("data") for row in both["table"] if row["selection"] == "dense"} == {"valid", "other"}
    for (_, selection, fraction), row in rows.items():
        if fraction == 1.0:
            assert abs(row["kl"]) < 1e-4, selection
        elif selection in ("teal", "cmoe"):
            assert row["kl"] > 1e-3 and row["kind"] == "baseline"
        if (
            selection == "teal"
        ):  # thresholds are of activations that no layer before has changed; ReLU has zeros at no cost
            low = 0.94 if name == "llama" or fraction < 1 else 0.5
            assert low * fraction < row["ffn_flops_fraction"] < 1.06 * fraction
    assert "kl_minus_teal" in rows["valid", "similarity", 0.5] and (run / "baseline/teal/manifest.json").exists()

    # One data set with a name is one of several; a plain path is what it was
    alone = run_cli.ok(*evaluate, "--data", other, "--name", "alone")
    assert "datasets" not in alone and not any("data" in row for row in alone["rows"])
    again = {(row["selection"], row["fraction"]): row for row in alone["rows"]}
    for (data, selection, fraction), row in rows.items():
        if data == "other" and selection != "random":  # whose draws go on from one data set to the next
            same = ("value", "kl", "active_fraction", "ffn_flops_fraction")
            assert [again[selection, fraction][key] for key in same] == pytest.approx([row[key] for key in same])
    metrics = json.loads((run / "eval/default/metrics.json").read_text())
    assert metrics["rows"] == both["rows"]
    # The data is compared by content, under its name
    assert run_cli.ok(*evaluate, "--data", f"valid={valid},other={other}")["up_to_date"]
    assert not run_cli.ok(*evaluate, "--data", f"valid={other},other={valid}")["up_to_date"]
    assert run_cli(*evaluate, "--data", f"valid={valid},{other}").code == 2
    assert run_cli(*evaluate, "--data", f"valid={valid},other=missing.txt").code == 2
