"""How many experts a token gets: each rule against its definition, and through the product."""

from typing import Any

import pytest
import torch
from cli_runner import Runner

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import RULES, Cumulative, MaxRatio, Threshold, TopK, read_rule, rule_setting

SCORES_TE = torch.tensor([[4.0, 1.0, 3.0, 0.0], [1.0, 1.1, -2.0, 0.2], [0.0, 0.0, 0.0, 0.0]])


def test_max_ratio_takes_what_is_near_the_best() -> None:
    found = MaxRatio(0.7).select(SCORES_TE)
    assert found[:2].tolist() == [[True, False, True, False], [True, True, False, False]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_cumulative_takes_the_fewest_that_hold_the_share(share: float) -> None:
    scores_TE = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    for scores_E, taken_E in zip(scores_TE, Cumulative(share).select(scores_TE), strict=True):
        total, held, count = float(scores_E.sum()), 0.0, 0
        for value in scores_E.sort(descending=True).values.tolist():
            if held >= share * total - 1e-6:
                break
            held, count = held + value, count + 1
        assert int(taken_E.sum()) == count
        assert bool(taken_E[scores_E.topk(count).indices].all())


def test_a_rule_says_what_it_is() -> None:
    assert rule_setting(Cumulative(0.4)) == {"cumulative": 0.4}
    for rule in (TopK(3), Threshold(0.25), MaxRatio(0.1), Cumulative(0.4)):
        assert read_rule(rule_setting(rule)) == rule and RULES[rule.name] is type(rule)
    with pytest.raises(ConfigError, match="nonsense"):
        read_rule({"nonsense": 1})


@pytest.mark.parametrize("rule", ["max_ratio", "cumulative"])
def test_relative_rules_spend_the_budget(rule: str, calibrated_run: Any, run_cli: Runner, tmp_path: Any) -> None:
    run, _ = calibrated_run
    made = run_cli.ok("apply", run, "--fraction", 0.6, "--fraction-of", "neurons", "--rule", rule)
    assert {row["rule"] for row in made["rows"]} == {rule}
    for layer, row in zip(read_moe_folder(run / "model").layers, made["rows"], strict=True):
        assert layer.rule is not None and layer.rule.name == rule
        assert row["experts_p10"] <= row["experts_mean"] <= row["experts_p90"]
    test = tmp_path / "test.txt"
    test.write_text("\n".join(" ".join(f"w{(i * 7 + j) % 40}" for j in range(12)) for i in range(60)) + "\n")
    found = run_cli.ok(
        "eval", run, "--data", test, "--documents", "line", "--max-length", 16, "--fraction-of", "neurons",
        "--selection", "regression",
    )  # fmt: skip
    (row,) = [row for row in found["rows"] if row["applied"]]
    assert row["rule"] == rule
    assert 0.3 < row["active_fraction"] < 0.75
    assert row["kl"] >= 0


def test_relative_rules_need_contribution_scores(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    run_cli.ok("train-router", run, "--router", "similarity")
    refused = run_cli("apply", run, "--router", "similarity", "--rule", "max_ratio", "--json")
    assert refused.code == 2
    assert "max_ratio" in refused.json["error"]["message"]


def test_router_scores_feed_the_rule() -> None:
    router = TwoLayerRouter(torch.eye(4))
    assert MaxRatio(0.7).select(router.scores(SCORES_TE))[0].tolist() == [True, False, True, False]
