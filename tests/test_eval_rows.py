"""The rows of eval: made and measured one fraction after the other."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner

from moefication_cli.evaluation.selections import SelectionRow
from moefication_cli.evaluation.table import SELECTIONS, Ground, Selection
from moefication_cli.models.loading import load_model
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import ffn_twin, permute_in_place


def test_layers_of_one_fraction_are_gone_before_the_next_are_made(
    calibrated_run: tuple[Path, Path], run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static pruning and peers hold weights of their own: of a 7B model, 10 GB a fraction."""
    run, data = calibrated_run[0], calibrated_run[0].parent / "train.txt"
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def probe(ground: Ground, fraction: float) -> list[SelectionRow]:
        gc.collect()
        alive.append(sum(layer() is not None for layer in made))
        rows = [replace(row, selection="probe") for row in SELECTIONS["static"].rows(ground, fraction)]
        made.extend(weakref.ref(layer) for row in rows for layer in row.layers)
        return rows

    monkeypatch.setitem(SELECTIONS, "probe", Selection(probe, reads_activations=True, default=False))
    # The last row's layers stay installed until the next ones are, so the probe is not the last
    words = ("eval", run, "--data", data, "--documents", "line", "--limit", 40, "--fractions", "0.3,0.5,1.0")
    rows = run_cli.ok(*words, "--selection", "probe,neuron")["rows"]
    assert alive == [0, 0, 0] and len(made) == 6
    # Every fraction was measured on the same examples, beside the same dense model
    assert [row["fraction"] for row in rows if row["selection"] == "probe"] == [0.3, 0.5, 1.0]
    losses = [row["kl"] for row in rows if row["selection"] == "probe"]
    assert losses[0] > losses[1] > losses[2] == pytest.approx(0.0, abs=1e-5)


def test_the_second_model_of_eval_has_only_ffns_of_its_own(calibrated_run: tuple[Path, Path]) -> None:
    model = load_model(calibrated_run[1]).model
    sites = find_sites(model)
    twin = ffn_twin(model, sites)
    own = {part.parameter for site in sites for part in site.slices()}
    before, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own and own < set(before)
    for name, tensor in before.items():
        assert torch.equal(tensor, theirs[name]) and (tensor is theirs[name]) == (name not in own)
    tokens = torch.arange(12).view(1, -1)
    expected = model(input_ids=tokens).logits
    for site in sites:
        permute_in_place(twin, site, torch.arange(site.num_neurons).flip(0))
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert torch.allclose(twin(input_ids=tokens).logits, expected, atol=1e-5)
    with torch.no_grad():
        twin.get_parameter(f"{sites[0].down}.weight").zero_()
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert not torch.allclose(twin(input_ids=tokens).logits, expected, atol=1e-3)


def test_int8_rows_are_what_is_loaded_as_int8(calibrated_run: tuple[Path, Path], run_cli: Runner) -> None:
    run, data = calibrated_run[0], calibrated_run[0].parent / "train.txt"
    words = ("eval", run, "--data", data, "--documents", "line", "--limit", 40, "--selection", "regression")
    refused = run_cli(*words, "--weights", "int8", "--json")
    assert refused.code == 3 and "moefication apply" in refused.json["error"]["hint"]
    run_cli.ok("apply", run, "--fraction", 0.8, "--keep-dense", 0)
    found = run_cli.ok(*words, "--weights", "int8")
    rows = {row["selection"]: row for row in found["rows"]}
    assert [name for name, row in rows.items() if row["weights"] == "int8"] == ["dense-int8", "regression-int8"]
    assert [name for name, row in rows.items() if row["applied"]] == ["regression"]
    dense, int8, exact = rows["dense-int8"], rows["regression-int8"], rows["regression"]
    assert dense["kind"] == "baseline" and dense["ffn_flops_fraction"] == 1.0 and 1e-6 < dense["kl"] < exact["kl"]
    assert (
        int8["ffn_flops_fraction"] == pytest.approx(exact["ffn_flops_fraction"], abs=0.01)
        and "numba" in int8["backend"]
    )
    assert int8["kl_over_float"] == int8["kl"] / exact["kl"] and 0 < abs(int8["kl_over_float"] - 1) < 0.25
    table = {row["selection"] for row in found["table"]}
    assert {"dense", "dense-int8", "regression", "regression-int8"} <= table
    run_cli.ok("report", run)
    assert "regression-int8" in (run / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"), [(("--dtype", "bfloat16"), "float32 activations"), (("--lm-eval", "arc_easy"), "--lm-eval")]
)
def test_what_int8_rows_do_not_go_with(
    words: tuple[str, ...], said: str, calibrated_run: tuple[Path, Path], run_cli: Runner
) -> None:
    outcome = run_cli("eval", calibrated_run[0], "--weights", "int8", "--device", "cpu", *words, "--json")
    assert outcome.code == 2 and said in outcome.json["error"]["message"]
