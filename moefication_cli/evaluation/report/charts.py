"""The charts of a report as inline SVG, drawn by matplotlib. Text stays text, and takes the page's colour.

`run` tells the charts of several runs on one page apart.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from moefication_cli.evaluation.plots import STYLE
from moefication_cli.tasks.examples import distance_name

# Colours that are told apart by most colour-blind readers, on white and on black (Okabe and Ito, jfly.uni-koeln.de/color)
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")


def quality(metrics: dict[str, Any]) -> list[str]:
    """The metric, and the KL to dense, against compute: a line per selection, with 95 % intervals."""
    (first, (left,)), (second, (right,)) = (_figure(1, 1, (5.2, 4)) for _ in range(2))
    colours = iter(PALETTE * 8)
    for name, rows in _series(metrics["rows"]).items():
        own, line, label = STYLE.get(name) or (next(colours), "-", f"{name} router")
        x = [row["ffn_flops_fraction"] for row in rows]
        spread = [1.96 * (row["stderr"] or 0.0) for row in rows]
        left.errorbar(
            x,
            [row["value"] for row in rows],
            yerr=spread,
            fmt=line,
            color=own,
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )
        _kl_line(right, rows, line, own)
    left.axhline(metrics["dense"]["value"], color="#777777", linewidth=1, label="dense")
    left.set_ylabel(metrics["dense"]["metric"])
    if metrics["dense"]["metric"] == "perplexity":
        left.set_yscale("log")
    salt = f"{metrics['data']} {metrics.get('name')}"
    return _quality_svgs((first, left), (second, right), salt, distance_name(metrics["dense"]["metric"]))


def comparison(runs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Routers of several runs (name, metrics): the metric over dense, and the KL, against compute."""
    (first, (left,)), (second, (right,)) = (_figure(1, 1, (5.2, 4)) for _ in range(2))
    colours = iter(PALETTE * 8)
    for run, metrics in runs:
        for name, rows in _series(row for row in metrics["rows"] if row["kind"] == "router").items():
            colour = next(colours)
            x = [row["ffn_flops_fraction"] for row in rows]
            left.plot(x, [row["relative"] for row in rows], "-o", color=colour, markersize=4, label=f"{run}: {name}")
            _kl_line(right, rows, "-", colour)
    left.axhline(1.0, color="#777777", linewidth=1, label="dense")
    left.set_ylabel("metric over dense")
    names = dict.fromkeys(distance_name(metrics["dense"]["metric"]) for _, metrics in runs)
    return _quality_svgs((first, left), (second, right), " and ".join(run for run, _ in runs), " or ".join(names))


def _series(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by selection, each in order of compute."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: float(row["ffn_flops_fraction"])):
        found.setdefault(row["selection"], []).append(row)
    return found


def _kl_line(axis: Any, rows: Sequence[dict[str, Any]], line: str, colour: str) -> None:
    x = [row["ffn_flops_fraction"] for row in rows]
    low, high = zip(*(row["kl_interval"] for row in rows), strict=True)
    kl = [row["kl"] for row in rows]
    errors = [[k - a for k, a in zip(kl, low, strict=True)], [b - k for k, b in zip(kl, high, strict=True)]]
    axis.errorbar(x, kl, yerr=[[max(0.0, e) for e in side] for side in errors], fmt=line, color=colour, marker="o",
                  markersize=4, capsize=2)  # fmt: skip
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _quality_svgs(left: tuple[Any, Any], right: tuple[Any, Any], salt: str, distance: str) -> list[str]:
    right[1].set_yscale("log")
    right[1].set_ylabel(distance)
    for _, axis in (left, right):
        axis.set_xlabel("share of the dense FFNs' multiply-adds")
    left[1].legend(fontsize=8, frameon=False)
    return [
        _svg(left[0], "quality against compute", salt),
        _svg(right[0], "KL to the dense model against compute", salt),
    ]


def budgets(layers: Sequence[dict[str, Any]], run: str) -> str:
    """Per layer: what it computes, and how many of its neurons fire."""
    figure, (axis,) = _figure(1, 1, (10, 2.8))
    x = range(len(layers))
    axis.bar(
        x, [layer["ffn_flops_fraction"] for layer in layers], color=PALETTE[0], label="multiply-adds, share of dense"
    )
    if all(layer.get("firing") is not None for layer in layers):
        axis.plot(x, [layer["firing"] for layer in layers], "o", color=PALETTE[1], label="neurons that fire")
    axis.set_xticks(list(x))
    axis.set_xlabel("layer")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    return _svg(figure, "budget per layer", run)


def captured(layers: Sequence[dict[str, Any]], run: str) -> str | None:
    """Share of the activation mass that routers, the oracle and random experts capture, mean over the layers."""
    tables = [layer["captured"] for layer in layers if layer.get("captured")]
    if not tables:
        return None
    figure, (axis,) = _figure(1, 1, (10, 3))
    x = [row["fraction"] for row in tables[0]]
    styles = (("oracle", "--", "#888888"), ("router", "-", PALETTE[2]), ("random", "-.", "#aaaaaa"))
    for name, line, colour in styles:
        means = [sum(table[i][name] for table in tables) / len(tables) for i in range(len(x))]
        axis.plot(x, means, line, marker="o", markersize=4, color=colour, label=name)
    axis.set_xlabel("share of the experts that run")
    axis.set_ylabel("captured mass")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure, "captured activation mass", run)


def load_map(load: Sequence[dict[str, Any]], run: str) -> str:
    """Layers x experts: the share of tokens that run each expert, experts from the busiest to the idlest."""
    import numpy as np

    width = max(len(layer["share_E"]) for layer in load)
    table = np.full((len(load), width), np.nan)
    for number, layer in enumerate(load):
        values = sorted(layer["share_E"], reverse=True)
        table[number, : len(values)] = values
    figure, (axis,) = _figure(1, 1, (10, 0.9 + 0.28 * len(load)))
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(load)))
    axis.set_xlabel("experts of the layer, busiest first")
    axis.set_ylabel("layer")
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="share of tokens", fraction=0.03, pad=0.01)
    return _svg(figure, "expert load", run)


def coactivation(layers: Sequence[dict[str, Any]], run: str) -> str:
    """One small matrix per layer, neurons in expert order: what fires together should lie on the diagonal."""
    columns = min(6, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = _figure(rows, columns, (10, 0.3 + 1.75 * rows))
    for axis in axes:
        axis.set_axis_off()
    for number, (axis, layer) in enumerate(zip(axes, layers, strict=False)):
        axis.imshow([[cell**0.5 for cell in row] for row in layer["matrix"]], cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"layer {number}", fontsize=8)
    return _svg(figure, "co-activation", run)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    found = list(axes.flat)
    for axis in found:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def _svg(figure: Any, title: str, salt: str = "") -> str:
    """The SVG element alone, transparent, scaled by the page; black becomes the text colour of the page.

    `salt` tells charts of one title apart: the names inside a page's SVGs must differ.
    """
    import matplotlib
    from matplotlib import pyplot

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title + salt}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
    text = text.replace("#000000", "currentColor").replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    # Text without a fill of its own is black
    return re.sub(r'<text style="', '<text style="fill: currentColor; ', text)
