"""The rows of metrics.json: what was measured of a variant, with its uncertainty, and beside static pruning."""

from collections.abc import Sequence
from typing import Any

from moefication_cli.evaluation.selections import SelectionRow, flops_fractions
from moefication_cli.tasks.examples import Scores, summarise
from moefication_cli.tasks.stats import Values, bootstrap_ci, paired_bootstrap


def row_of(
    variant: SelectionRow, scores: Scores, reference: dict[str, Any], tokens: int, sizes: Sequence[float], seed: int
) -> dict[str, Any]:
    """One row of metrics.json; `sizes` is each FFN's part of the dense work, `reference` the dense model's entry."""
    summary = summarise(reference["metric"], scores)
    kl = bootstrap_ci(_filled(scores.kl_B), seed, weights=scores.weight_B)
    active = [float(layer.active_fraction) for layer in variant.layers]  # type: ignore[attr-defined]
    flops = flops_fractions(variant)

    def mean(values: Sequence[float]) -> float:
        return sum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)

    row: dict[str, Any] = {
        "selection": variant.selection,
        "kind": variant.kind,
        "applied": variant.applied,
        "fraction": variant.fraction,
        "top_k": None,
        "rule": None,
        "budget": "uniform",
        "score": None,
        "seed": None,
    }
    return row | variant.meta | {
        "metric": summary.metric,
        "value": summary.value,
        "stderr": summary.stderr,
        "relative": summary.value / reference["value"] if reference["value"] else None,
        "agreement": summary.agreement,
        "kl": summary.kl,
        "kl_interval": [kl.low, kl.high],
        "active_fraction": mean(active),
        "ffn_flops_fraction": mean(flops),
        "seconds": variant.seconds,
        "tokens_per_second": tokens / variant.seconds,
        "speedup": reference["seconds"] / variant.seconds,
        "backend": variant.backend,
    }  # fmt: skip


def compare_with(
    baseline: str, variants: Sequence[SelectionRow], scores: Sequence[Scores], rows: list[dict[str, Any]], seed: int
) -> None:
    """Adds to each row the paired difference of KL to `static` or `paper` at the same fraction, with a 95 % interval."""
    found = {v.fraction: s for v, s in zip(variants, scores, strict=True) if v.selection == baseline}
    for variant, mine, row in zip(variants, scores, rows, strict=True):
        base = found.get(variant.fraction)
        if base is None or variant.selection == baseline:
            continue
        difference = paired_bootstrap(_filled(mine.kl_B), _filled(base.kl_B), seed, weights=mine.weight_B)
        row[f"kl_minus_{baseline}"] = difference.value
        row[f"kl_minus_{baseline}_interval"] = [difference.low, difference.high]


def lost_to(baseline: str, row: dict[str, Any]) -> str | None:
    """A sentence if a router's row does not beat this baseline with 95 % confidence."""
    interval = row.get(f"kl_minus_{baseline}_interval")
    if row["kind"] != "router" or interval is None or interval[1] < 0:
        return None
    name = {"static": "static pruning", "paper": "the published recipe"}[baseline]
    return (
        f"{row['selection']} at {row['fraction']:g} does not beat {name} "
        f"(KL difference {row[f'kl_minus_{baseline}']:+.4f}, 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    )


def _filled(values: Values | None) -> Values:
    assert values is not None  # every row is scored beside the dense model
    return values
