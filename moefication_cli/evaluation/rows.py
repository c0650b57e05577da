"""The rows of metrics.json: what was measured of each selection, with its uncertainty, and beside static pruning."""

from collections.abc import Sequence
from typing import Any

from moefication_cli.evaluation.selections import SelectionRow, flops_fractions
from moefication_cli.tasks.examples import Scores, summarise
from moefication_cli.tasks.stats import Values, bootstrap_ci, paired_bootstrap

_CALLED = {"static": "static pruning", "paper": "the published recipe", "teal": "TEAL", "cmoe": "CMoE"}
_MEANING = _CALLED | {
    "groundtruth": "an oracle that knows which experts matter",
    "neuron": "an oracle that knows which neurons matter",
    "random": "experts drawn by chance",
    "dense-finetuned": "the fine-tuned weights, every neuron",
    "dense-int8": "the dense model with int8 weights",
}


def row_of(
    row: SelectionRow, scores: Scores, reference: dict[str, Any], tokens: int, sizes: Sequence[float], seed: int
) -> dict[str, Any]:
    """One row of metrics.json; `sizes` is each FFN's part of the dense work, `reference` the dense model's entry."""
    summary = summarise(reference["metric"], scores)
    kl = bootstrap_ci(_filled(scores.kl_B), seed, weights=scores.weight_B)
    active = [float(layer.active_fraction) for layer in row.layers]
    flops = flops_fractions(row)

    def mean(values: Sequence[float]) -> float:
        return sum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)

    entry: dict[str, Any] = {
        "selection": row.selection,
        "kind": row.kind,
        "applied": row.applied,
        "fraction": row.fraction,
        "top_k": None,
        "rule": None,
        "budget": "uniform",
        "score": None,
        "seed": None,
        "weights": None,
    }
    return entry | row.meta | {
        "metric": summary.metric,
        "value": summary.value,
        "stderr": summary.stderr,
        "relative": summary.value / reference["value"] if reference["value"] else None,
        "agreement": summary.agreement,
        "kl": summary.kl,
        "kl_interval": [kl.low, kl.high],
        "active_fraction": mean(active),
        "ffn_flops_fraction": mean(flops),
        "seconds": row.seconds,
        "tokens_per_second": tokens / row.seconds,
        "speedup": reference["seconds"] / row.seconds,
        "bound": 1 / (1 - reference["ffn_share"] * (1 - mean(flops))),  # by multiply-adds of linear layers
        "backend": row.backend,
    }  # fmt: skip


def legend(selections: Sequence[str]) -> str:
    """One sentence that says what the rows of a table are."""
    names = dict.fromkeys(selections)
    own = [name for name in names if name not in _MEANING and name != "dense"]
    known = [f"{name}: {_MEANING[name]}" for name in names if name in _MEANING]
    routers = [f"{', '.join(own)}: trained here, what `apply` converts with"] if own else []
    return "; ".join([*routers, *known])


def by_data(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {dense, examples, tokens, rows, ...}} of metrics.json; the name is "" where the data had none."""
    parts: dict[str, dict[str, Any]] = metrics.get("datasets") or {"": metrics}
    return {
        name: part | {"rows": [row for row in metrics["rows"] if row.get("data", "") == name]}
        for name, part in parts.items()
    }


def compare_with(
    baseline: str, rows: Sequence[SelectionRow], scores: Sequence[Scores], entries: list[dict[str, Any]], seed: int
) -> None:
    """Adds to each entry the paired difference of KL to this baseline at the same fraction, with a 95 % interval."""
    found = {v.fraction: s for v, s in zip(rows, scores, strict=True) if v.selection == baseline}
    for row, mine, entry in zip(rows, scores, entries, strict=True):
        base = found.get(row.fraction)
        if base is None or row.selection == baseline:
            continue
        difference = paired_bootstrap(_filled(mine.kl_B), _filled(base.kl_B), seed, weights=mine.weight_B)
        entry[f"kl_minus_{baseline}"] = difference.value
        entry[f"kl_minus_{baseline}_interval"] = [difference.low, difference.high]


def compare_int8(entries: list[dict[str, Any]]) -> None:
    """Adds to the entry of RUN/model in int8 how its KL to dense compares with that of the float weights.

    Those come before it (`table._converted`), perhaps after other rows of the same router.
    """
    exact: dict[str, float] = {}
    for entry in entries:
        if entry["kind"] == "router" and entry["weights"] is None:
            exact[entry["selection"]] = entry["kl"]
        elif entry["kind"] == "router":
            kl = exact.get(entry["selection"].removesuffix("-int8"))
            entry["kl_over_float"] = entry["kl"] / kl if kl else None


def lost_to(baseline: str, entry: dict[str, Any]) -> str | None:
    """A sentence if a router's entry does not beat this baseline with 95 % confidence."""
    interval = entry.get(f"kl_minus_{baseline}_interval")
    if entry["kind"] != "router" or interval is None or interval[1] < 0:
        return None
    distance = "KL" if entry["agreement"] is not None else "1 - cosine"
    return (
        f"{entry['selection']} at {entry['fraction']:g} does not beat {_CALLED[baseline]} "
        f"({distance} difference {entry[f'kl_minus_{baseline}']:+.4f}, 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    )


def _filled(values: Values | None) -> Values:
    assert values is not None  # every entry is scored beside the dense model
    return values
