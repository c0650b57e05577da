"""End-to-end refinement: the learnable layer computes what the product computes, budgets are spent, weights stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from plan_inputs import plan_inputs

from moefication_cli.config import ApplyConfig
from moefication_cli.conversion import refine, settle
from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.search import WholeModel
from moefication_cli.conversion.straight_through import StraightThroughMoEFFN
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.models.loading import load_model
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import live_weights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold, TopK
from moefication_cli.runs.control import Control
from moefication_cli.runtime.layer import MoEFFN

D, F, E, S, T = 8, 26, 6, 2, 11


def random_layer(seed: int = 0, gated: bool = False) -> tuple[ExpertWeights, TwoLayerRouter, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ffn = FFNWeights(draw(F, D), draw(F, D), draw(F, D) if gated else None, b_up_F=draw(F), b_down_D=draw(D))
    extra = Compensation(draw(D), draw(3, D), draw(3, D))
    router = TwoLayerRouter(draw(5, D), draw(5), draw(E, 5), draw(E), activation="relu")
    return ExpertWeights(ffn, E, S, extra), router, draw(T, D)


@pytest.mark.parametrize("gated", [False, True])
def test_learnable_layer_computes_what_the_product_does(gated: bool) -> None:
    weights, router, x_TD = random_layer(gated=gated)
    threshold = float(router.scores(x_TD).median())
    soft = StraightThroughMoEFFN(weights, router, Threshold(threshold))
    product = MoEFFN(weights, router, Threshold(threshold), backend="reference")
    with torch.no_grad():
        expected_TD, found_TD = product(x_TD), soft(x_TD)
        assert not (router.scores(x_TD) >= threshold).all(1).any()  # all on would switch the compensation off
        assert torch.allclose(found_TD, expected_TD, atol=1e-4)
        soft.shift = 1.0
        assert (soft(x_TD) - expected_TD).abs().max() > 0.1  # negative control
        soft.as_dense = True
        assert torch.allclose(soft(x_TD), weights.ffn.forward(x_TD), atol=1e-5)


@pytest.mark.parametrize("routed", [True, False])
def test_a_wider_down_projection_is_computed_in_its_dtype(routed: bool) -> None:
    """T5 keeps it in float32 under float16."""
    weights, router, x_TD = random_layer()
    ffn, scores = weights.ffn.to(torch.float16), router.scores(x_TD).flatten().sort().values
    gap = int((scores[1:] - scores[:-1]).argmax())  # rounded inputs must not select otherwise
    mixed = replace(weights, ffn=replace(ffn, w_down_FD=weights.ffn.w_down_FD))
    found = []
    for these, inputs_TD in ((weights, x_TD), (mixed, x_TD.half())):
        rule = Threshold(float(scores[gap : gap + 2].mean())) if routed else TopK(0)
        soft = StraightThroughMoEFFN(these, router if routed else None, rule)
        with torch.no_grad():
            found.append(soft(inputs_TD))
    assert found[1].dtype == torch.float16
    assert torch.allclose(found[0], found[1].float(), rtol=1e-2, atol=0.05)
    assert not torch.allclose(found[0], found[1].float().roll(1, 0), rtol=1e-2, atol=0.05)


def test_padding_is_left_out() -> None:
    weights, router, x_TD = random_layer()
    soft = StraightThroughMoEFFN(weights, router, Threshold(float(router.scores(x_TD).median())))
    real_T = torch.arange(T) < 7
    with torch.no_grad():
        alone = soft(x_TD[:7])
        share = float(soft.active)
        padded = soft(x_TD.view(1, T, D), real_T.view(1, T))[0]
    assert torch.allclose(padded[:7], alone, atol=1e-5)
    assert not padded[7:].any()
    assert float(soft.active) == pytest.approx(share)


def test_gradients_reach_router_and_correction_and_nothing_else() -> None:
    weights, router, x_TD = random_layer()
    soft = StraightThroughMoEFFN(weights, router, Threshold(float(router.scores(x_TD).median())))
    (soft(x_TD).square().sum() + soft.active).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in soft.parameters.values())
    assert weights.ffn.w_up_FD.grad is None
    assert soft.active.grad_fn is not None


def test_refined_model_is_kept_found_again_and_measured(calibrated_run: Any, run_cli: Runner, tmp_path: Path) -> None:
    run, model = calibrated_run
    run_cli.ok("apply", run, "--fraction", 0.5)
    planned = read_moe_folder(run / "model")
    run_cli.ok("apply", run, "--fraction", 0.5, "--refine", 12)
    refined = read_moe_folder(run / "model")
    made = (run / "refined" / "regression-0.5" / "manifest.json").stat().st_mtime_ns
    outcome = run_cli.ok("apply", run, "--fraction", 0.5, "--refine", 12)
    assert outcome["up_to_date"]

    pairs = [(a.compensation, b.compensation) for a, b in zip(planned.layers, refined.layers, strict=True)]
    assert any(not torch.equal(a.constant_D, b.constant_D) for a, b in pairs if a is not None and b is not None)
    # Weights are those of the dense model in another order, refined or not.
    dense, written = load_model(model).model, load_model(run / "model").model
    for site in find_sites(dense):
        before, after = live_weights(dense, site).w_up_FD, live_weights(written, site).w_up_FD
        assert torch.equal(before.sort(0).values, after.sort(0).values)
    # The refined stage is found again by `eval` and by an `apply` after the model was deleted.
    test = tmp_path / "test.txt"
    test.write_text("\n".join(" ".join(f"w{n}" for n in range(i, i + 9)) for i in range(30)) + "\n")
    found = run_cli.ok(
        "eval", run, "--data", test, "--documents", "line", "--max-length", 16, "--fractions", "0.5", "--selection",
        "regression",
    )  # fmt: skip
    applied = [row for row in found["rows"] if row["applied"]]
    assert len(applied) == 1
    assert applied[0]["ffn_flops_fraction"] <= 0.55
    assert (run / "refined" / "regression-0.5" / "manifest.json").stat().st_mtime_ns == made


def test_the_dense_model_answers_once_and_the_figures_stay(
    calibrated_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = plan_inputs(calibrated_run[0], Control())
    asked: list[bool] = []
    outputs, config = Conversion.outputs, ApplyConfig(fraction=0.5, router="regression", refine=4)

    def counted(self: Conversion, batch: Any, *, dense: bool = False, hidden: bool = False) -> Any:
        asked.append(dense)
        return outputs(self, batch, dense=dense, hidden=hidden)

    monkeypatch.setattr(Conversion, "outputs", counted)
    found = []
    for room in (256 << 20, 0):
        monkeypatch.setattr(settle, "_KEPT_BYTES", room)
        whole = WholeModel(inputs, 4)
        asked.clear()
        plans, metrics = whole.refined(config)
        found.append(([plan.flops_fraction for plan in plans], metrics["kl_before"], metrics["kl_after"]))
        assert (sum(asked) <= len(whole.heldout.batches) + 1 + 4) is bool(room)  # one for the step size, four steps
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-4)
    assert found[0][1] != pytest.approx(found[0][2], rel=1e-3)  # the control: other thresholds, another KL


def test_target_kl_buys_less_compute_when_it_is_looser(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    fractions = []
    for target in (0.5, 0.001):
        run_cli.ok("apply", run, "--target-kl", target)
        fractions.append(read_moe_folder(run / "model").settings["fraction"])
        assert run_cli.ok("apply", run, "--target-kl", target)["up_to_date"]
    assert fractions[0] < fractions[1] < 1
    impossible = run_cli("apply", run, "--target-kl", 0, "--json")
    assert impossible.code == 2
    assert "only the dense model" in impossible.json["error"]["message"]


def test_refining_what_is_not_calibrated_is_refused(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    run_cli.ok("train-router", run, "--router", "mlp", "--epochs", 1)
    for option in (("--refine", 5), ("--target-kl", 0.1)):
        refused = run_cli("apply", run, "--router", "mlp", "--fraction-of", "neurons", *option, "--json")
        assert refused.code == 2
        assert option[0] in refused.json["error"]["message"]
    assert not (run / "model").exists()


@pytest.mark.parametrize("gated", [False, True])
def test_a_fixed_k_runs_what_the_product_runs_and_is_learned(gated: bool) -> None:
    weights, router, x_TD = random_layer(gated=gated)
    soft = StraightThroughMoEFFN(weights, router, TopK(2))
    with torch.no_grad():
        found_TD = soft(x_TD)
        for top_k, same in ((2, True), (3, False)):
            expected_TD = MoEFFN(weights, router, TopK(top_k), backend="reference")(x_TD)
            assert torch.allclose(found_TD, expected_TD, atol=1e-4) is same
        assert not soft.shifts and float(soft.active) == pytest.approx((S + 2 * (F - S) // E) / F)
    soft(x_TD).square().sum().backward()
    assert not soft.active.requires_grad or float(soft.active.detach()) == pytest.approx(10 / F)
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in soft.parameters.values())
    # One constant for all scores decides nothing, so it is not part of what tells tokens and experts apart
    shifted = StraightThroughMoEFFN(weights, router.with_tensors({"b_out_E": router.b_out_E + 100}), TopK(2))
    with torch.no_grad():
        assert torch.allclose(shifted(x_TD), found_TD, atol=1e-4)
    assert shifted.spread == pytest.approx(soft.spread, rel=1e-3)


def test_no_correction_is_learned_where_none_may_be() -> None:
    weights, router, x_TD = random_layer()
    bare = StraightThroughMoEFFN(replace(weights, compensation=None), router, TopK(2), constant=False)
    assert bare.parameters.keys() == router.tensors().keys() and bare.learned_compensation() is None
    with torch.no_grad():
        expected_TD = MoEFFN(replace(weights, compensation=None), router, TopK(2), backend="reference")(x_TD)
        assert torch.allclose(bare(x_TD), expected_TD, atol=1e-4)
    assert "extra.constant_D" in StraightThroughMoEFFN(weights, router, TopK(2)).parameters


def test_steps_that_were_too_large_begin_again_smaller(calibrated_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Llama at 0.6 of its FLOPs, whose KL doubled in the first quarter of the steps and which then stayed as it was."""
    said: list[str] = []
    inputs = plan_inputs(calibrated_run[0], Control(say=said.append))
    config = ApplyConfig(fraction=0.5, router="regression", refine=12)
    monkeypatch.setattr(refine, "_FULL_PREDICTIONS", 1)
    rates: list[float] = []
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **how: rates.append(groups[0]["lr"]) or adam(groups, **how))
    for rate, restarts in ((1e-4, 0), (300.0, 1)):
        said.clear(), rates.clear()
        monkeypatch.setattr(refine, "LEARNING_RATE", rate)
        _, metrics = WholeModel(inputs, 12).refined(config)
        assert sum("too large" in line for line in said) == restarts and len(rates) == 1 + restarts
        assert metrics["kl_after"] < metrics["kl_before"] or not metrics["kept"]
    assert rates[1] == pytest.approx(rates[0] / 3)
