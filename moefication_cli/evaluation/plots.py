"""The picture of an evaluation: quality against the share of the FFN that is computed, and against measured time."""

from pathlib import Path
from typing import Any

from moefication_cli.evaluation.rows import by_data
from moefication_cli.tasks.examples import distance_name

STYLE = {
    "neuron": ("#999999", ":", "neuron oracle"),
    "groundtruth": ("#777777", "--", "expert oracle"),
    "static": ("#d95f02", "-", "static pruning"),
    "paper": ("#7570b3", "-", "published recipe"),
    "teal": ("#a6761d", "-", "TEAL (input sparsity)"),
    "cmoe": ("#e6ab02", "-", "CMoE (no training)"),
    "random": ("#bbbbbb", "-.", "random experts"),
}
_ROUTER_COLOURS = ("#1b9e77", "#1f78b4", "#e7298a", "#66a61e")


def plot_quality(metrics: dict[str, Any], path: Path) -> None:
    """Write quality.png: metric and KL to dense against `ffn_flops_fraction`, and KL against measured time; a line per selection.

    One row of axes per data set.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = by_data(metrics)
    size = (16, 4.2 * len(parts))
    figure, axes = pyplot.subplots(len(parts), 3, figsize=size, constrained_layout=True, squeeze=False)
    for (name, part), (left, right, time) in zip(parts.items(), axes, strict=True):
        _plot(part["dense"], part["rows"], left, right)
        _plot_time(part["dense"], part["rows"], time, f"{metrics['device']}, {metrics['threads']} threads")
        left.set_title(name)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _plot(dense: dict[str, Any], rows: list[dict[str, Any]], left: Any, right: Any) -> None:
    """One data set: its metric on the left axes, its KL on the right ones."""
    colours = iter(_ROUTER_COLOURS * 4)
    for name in dict.fromkeys(row["selection"] for row in rows):
        points = sorted((r for r in rows if r["selection"] == name), key=lambda r: float(r["ffn_flops_fraction"]))
        colour, line, label = STYLE.get(name) or (next(colours), "-", f"{name} router")
        x = [row["ffn_flops_fraction"] for row in points]
        for axis, key in ((left, "value"), (right, "kl")):
            axis.plot(x, [row[key] for row in points], line, color=colour, marker="o", markersize=4, label=label)
    left.axhline(dense["value"], color="black", linewidth=1, label="dense")
    left.set_ylabel(dense["metric"])
    right.set_ylabel(distance_name(dense["metric"]))
    right.set_yscale("log")
    if dense["metric"] == "perplexity":
        left.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("share of the dense FFN's multiply-adds")
        axis.grid(alpha=0.3)


def has_time(row: dict[str, Any]) -> bool:
    """Whether the time of a row is that of its method: oracles compute all neurons to choose some, and TEAL's masks skip nothing here."""
    return row["kind"] != "oracle" and row["selection"] != "teal"


def _plot_time(dense: dict[str, Any], rows: list[dict[str, Any]], axis: Any, where: str) -> None:
    """KL of one data set against the time of the whole model over dense, as measured in this evaluation."""
    colours = iter(_ROUTER_COLOURS * 4)
    for name in dict.fromkeys(row["selection"] for row in rows):
        colour, line, _ = STYLE.get(name) or (next(colours), "-", "")
        points = sorted((1 / row["speedup"], row["kl"]) for row in rows if row["selection"] == name and has_time(row))
        if points:
            axis.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=4, label=name)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel(distance_name(dense["metric"]))
    axis.set_xlabel(f"measured time of the whole model over dense ({where})")
    axis.grid(alpha=0.3)


def text_chart(metrics: dict[str, Any], width: int = 48) -> list[str]:
    """A small chart for the terminal: bars of agreement with the dense model, one per row."""
    lines = ["agreement with the dense model"]
    for row in metrics["rows"]:
        filled = round(width * max(0.0, min(1.0, row["agreement"])))
        label = f"{row['selection']} {row['fraction']:g}"
        lines.append(f"  {label:<18} {'█' * filled}{'·' * (width - filled)} {row['agreement']:.3f}")
    return lines
