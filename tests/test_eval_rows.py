"""The rows of eval: made and measured one fraction after the other."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner

from moefication_cli.evaluation.selections import SelectionRow
from moefication_cli.evaluation.table import SELECTIONS, Ground, Selection


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
