"""The pictures of an evaluation: what is drawn where."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from moefication_cli.evaluation import plots


def row(selection: str, kind: str, speedup: float, kl: float) -> dict[str, Any]:
    return {"selection": selection, "kind": kind, "speedup": speedup, "kl": kl, "value": 0.9, "ffn_flops_fraction": 0.2}


DENSE = {"metric": "accuracy", "value": 0.95}
ROWS = [
    row("regression", "router", 2.0, 0.1), row("regression", "router", 1.25, 0.05), row("static", "baseline", 2.5, 0.4),
    row("groundtruth", "oracle", 0.5, 0.01), row("neuron", "oracle", 0.6, 0.01), row("teal", "baseline", 0.8, 0.2),
]  # fmt: skip


def test_kl_is_drawn_against_measured_time_of_what_saves_time() -> None:
    axis = Figure().subplots()
    plots._plot_time(DENSE, ROWS, axis, "cpu, 2 threads")
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert {name for name in lines if not name.startswith("_")} == {"regression", "static"}
    assert list(lines["regression"].get_xdata()) == pytest.approx([0.5, 0.8])  # time over dense, fastest first
    assert list(lines["regression"].get_ydata()) == pytest.approx([0.1, 0.05])
    assert "2 threads" in axis.get_xlabel()


def test_every_data_set_has_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append((len(figure.axes),)))
    metrics: dict[str, Any] = {"dense": DENSE, "rows": ROWS, "device": "cpu", "threads": 2}
    plots.plot_quality(metrics, tmp_path / "quality.png")
    named = [entry | {"data": name} for name in "ab" for entry in ROWS]
    plots.plot_quality(
        metrics | {"rows": named, "datasets": {"a": {"dense": DENSE}, "b": {"dense": DENSE}}}, tmp_path / "x.png"
    )
    assert drawn == [(3,), (6,)]
