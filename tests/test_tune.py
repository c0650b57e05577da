"""tune: every combination is measured, the front is what no other row beats."""

from typing import Any

from cli_runner import Runner

from moefication_cli.stages.tune import mark_front

OPTIONS = ("--methods", "activation,random", "--expert-sizes", "4,5,8", "--fractions", "0.4,0.7", "--max-tokens", 2000)


def test_front_is_what_no_other_row_beats() -> None:
    points = [(0.1, 5.0), (0.2, 6.0), (0.3, 2.0), (0.3, 3.0), (0.5, 2.0), (0.6, 1.0)]
    rows: list[dict[str, Any]] = [{"cost": cost, "kl": kl} for cost, kl in points]
    mark_front(rows, "cost", "front")
    for row in rows:
        beaten = any(
            other["cost"] <= row["cost"] and other["kl"] <= row["kl"] and other is not row
            and (other["cost"], other["kl"]) != (row["cost"], row["kl"])
            for other in rows
        )  # fmt: skip
        assert row["front"] is not beaten


def test_sweep_measures_every_combination_and_keeps_the_run_as_it_was(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    before = (run / "split" / "manifest.json").read_bytes()
    found = run_cli.ok("tune", run, *OPTIONS)
    rows = found["all"]
    assert {(row["method"], row["expert_size"]) for row in rows} == {
        ("activation", 4), ("activation", 8), ("random", 4), ("random", 8)
    }  # fmt: skip
    assert all(row["kl"] >= 0 and row["seconds"] > 0 for row in rows)
    assert any(row["pareto_flops"] for row in rows)
    assert (run / "split" / "manifest.json").read_bytes() == before
    assert run_cli.ok("tune", run, *OPTIONS)["up_to_date"]


def test_what_cannot_be_swept_is_refused(calibrated_run: Any, run_cli: Runner) -> None:
    run, _ = calibrated_run
    for options, word in ((("--methods", "voronoi"), "voronoi"), (("--expert-sizes", "5"), "no combination")):
        refused = run_cli("tune", run, *options, "--json")
        assert refused.code == 2
        assert word in refused.json["error"]["message"]
    assert not (run / "tune").exists()
