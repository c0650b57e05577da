"""`--objective time`: budgets in what layers take on this machine, with tables of times made by hand."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner

from moefication_cli.config import ApplyConfig
from moefication_cli.conversion.plan import (
    SAFETY,
    Budget,
    LayerPlan,
    RoutedLayer,
    in_flops,
    plan_layers,
    routed_layers,
    time_fraction,
)
from moefication_cli.conversion.times import LayerTimes, timed
from moefication_cli.errors import ConfigError
from moefication_cli.models.experts import ffn_kinds
from moefication_cli.routing.calibrate import Curve
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import RunModel, open_model
from moefication_cli.runtime import kernel_times
from moefication_cli.runtime.kernel_times import FFNTimes, KernelTimes
from moefication_cli.stages.tune import mark_best
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

# Dense takes 1 s. Router and experts: 0.05 s and 0.25 s with a tenth and half of the neurons; or more than dense in any case.
# The routers of so small a model are as large as what was measured with.
FAST = FFNTimes(dense=1.0, masked=2.0, few=0.05, many=0.25, router_flops=600)
SLOW = FFNTimes(dense=1.0, masked=2.0, few=3.0, many=5.0, router_flops=600)
Inputs = tuple[RunModel, Artifact, list[RoutedLayer]]


def inputs_of(run: Path) -> Inputs:
    """What plans are made from."""
    opened = RunDir(run)
    model, activations = open_model(opened, None, Control(device="cpu")), opened.require("activations")
    tokens = [layer["tokens"] for layer in activations.metrics["layers"]]
    layers = routed_layers(model, opened.require("split"), opened.require("router/regression"), tokens)
    return model, activations, layers


def plant(run: Path, table: Mapping[int, FFNTimes], tokens: int = 512) -> None:
    """Keeps {size of experts: times} of the run's FFNs."""
    model, known = open_model(RunDir(run), None, Control(device="cpu")), KernelTimes(str)
    for kind in ffn_kinds(model.sites, torch.float32):
        for size, times in table.items():
            known.keep(kind, size, tokens, times)


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "measure", lambda *asked: pytest.fail(f"measured {asked}"))


def test_the_time_of_a_layer_by_hand() -> None:
    times = LayerTimes(replace(FAST, dense=2.0, router_flops=100), dense_flops=1000)
    router = TwoLayerRouter(torch.zeros(6, 50))  # 300 multiply-adds, 200 more than what was measured
    assert times.share(router, 0.3, 0.0) == pytest.approx(0.15 / 2 + 0.2)
    assert times.share(router, 0.3, 0.04) == pytest.approx(0.15 / 2 + 0.2 + 0.04)
    assert times.share(None, 0.3, 0.04) == pytest.approx(0.34)  # neurons that always run take dense time
    assert times.share(router, 1.0, 0.0) == times.share(None, 1.0, 0.0) == 1.0
    columns = [torch.tensor(c) for c in ([-1, 0, 0, -1], [0.0] * 4, [3, 0, 0, 9], [0, 0, 2, 0])]
    curve = Curve(*columns, torch.zeros(4), torch.tensor([0.3, 0.3, 0.3, 1.0], dtype=torch.float64), torch.zeros(4))
    assert times.of_curve(curve, [router], 10).tolist() == pytest.approx([0.3, 0.275, 0.315, 1.0])


def test_slower_layers_compute_less(calibrated_run: Any) -> None:
    model, activations, layers = inputs_of(calibrated_run[0])
    quick, slow = (LayerTimes(times, layers[0].cost().dense_flops) for times in (FAST, SLOW))

    def shares(*times: LayerTimes) -> list[float]:
        budget = Budget(0.1, objective="time", times=times)
        plans = plan_layers(model, activations, layers, budget, 0)
        spent = time_fraction(plans, budget)
        assert spent is not None and 0 < spent <= 0.1
        return [plan.flops_fraction for plan in plans]

    even, first, last = shares(quick, quick), shares(slow, quick), shares(quick, slow)
    assert first[0] < even[0] and last[1] < even[1]
    # Refinement holds the multiply-adds of a plan
    plans = [LayerPlan(layer, None, share) for layer, share in zip(layers, (0.2, 0.4), strict=True)]
    asked = Budget(0.7, objective="time", times=())
    assert in_flops(asked, plans).fraction == pytest.approx(0.3 / SAFETY)
    assert in_flops(asked, plans).objective == "flops"
    assert in_flops(replace(asked, objective="flops"), plans).fraction == 0.7


@pytest.mark.parametrize("refine", [0, 3])
def test_apply_plans_for_the_time_of_the_kernels(refine: int, calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    options = ("--fraction", "0.5", "--refine", str(refine))

    def widths() -> tuple[list[Any], float]:
        metrics = run_cli.ok("apply", run, *options, "--objective", "time", "--force")["metrics"]
        return [layer["router_width"] for layer in metrics["layers"]], metrics["ffn_time_fraction"]

    plant(run, {4: FAST})
    routers, spent = widths()
    assert any(routers) and 0 < spent <= 0.5
    assert run_cli.ok("apply", run, *options, "--objective", "time")["up_to_date"]
    plant(run, {4: SLOW})  # no router is worth its time: the most important experts always run
    routers, spent = widths()
    assert not any(routers) and 0.2 < spent <= 0.5
    made = run_cli.ok("apply", run, *options)["metrics"]  # nothing of time
    assert made.keys().isdisjoint({"ffn_time_fraction", "ffn_times"})


def test_other_numbers_of_tokens_have_other_times(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    plant(run, {4: FAST})
    plant(run, {4: SLOW}, tokens=1)
    for tokens, routed in ((512, True), (1, False)):
        made = run_cli.ok("apply", run, "--objective", "time", "--objective-tokens", tokens, "--fraction", "0.5")
        assert any(layer["router_width"] for layer in made["metrics"]["layers"]) is routed


def test_tune_takes_larger_experts_where_small_ones_are_slow(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    options = ("--methods", "activation", "--expert-sizes", "4,8", "--fractions", "0.5", "--max-tokens", 2000,
               "--compensations", "auto", "--objective", "time", "--force")  # fmt: skip

    def best() -> dict[str, Any]:
        rows = run_cli.ok("tune", run, *options)["all"]
        assert {row["expert_size"] for row in rows} == {4, 8}
        assert all(row["ffn_time_fraction"] <= 0.5 for row in rows)
        (found,) = [row for row in rows if row["best"]]
        assert found["kl"] == min(row["kl"] for row in rows)
        return found

    plant(run, {4: SLOW, 8: FAST})
    assert best()["expert_size"] == 8
    plant(run, {4: FAST, 8: SLOW})
    assert best()["expert_size"] == 4


def test_best_is_the_least_loss_at_each_fraction() -> None:
    rows = [{"fraction": f, "kl": kl} for f, kl in ((0.1, 3.0), (0.1, 2.0), (0.3, 1.0), (0.3, 1.5))]
    mark_best(rows)
    assert [row["best"] for row in rows] == [False, True, True, False]


def test_what_has_no_times_is_refused_and_dry_runs_measure_nothing(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    assert run_cli.ok("apply", run, "--objective", "time", "--dry-run")
    _, _, layers = inputs_of(run)
    with pytest.raises(ConfigError, match="kernels of the CPU"):
        timed(Budget(0.5), ApplyConfig(objective="time"), layers, torch.device("cuda"), Control())
    assert timed(Budget(0.5), ApplyConfig(), layers, torch.device("cuda"), Control()).times is None
    plant(run, {4: FAST})
    for words in (("--top-k", "2"), ("--rule", "top_k"), ("--rule", "cumulative"), ("--fraction-of", "neurons")):
        refused = run_cli("apply", run, "--objective", "time", *words, "--json")
        assert refused.code == 2, words
        assert "--objective time needs a calibrated router" in refused.json["error"]["message"]
    assert not (run / "model").exists()
