"""The report as one HTML page that needs nothing else: no network, no scripts; light and dark, phone and paper."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from moefication_cli.evaluation.report import charts
from moefication_cli.evaluation.report.gather import ReportData
from moefication_cli.tasks.examples import LOWER_IS_BETTER, distance_name

_DEAD, _ALWAYS = 0.001, 0.999  # shares of tokens below and above which an expert counts as dead or always on

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --paper: #ffffff; --line: #dfe3e8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14171a; --line: #2e353c; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; }
svg { width: 100%; height: auto; display: block; color: var(--ink); } svg text { fill: currentColor; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.figure { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.figure b { display: block; font-size: 1.55rem; line-height: 1.2; color: var(--accent); font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } .wide svg { min-width: 36rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; } 
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr.applied td { font-weight: 650; }
code { font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.text { line-height: 2; overflow-wrap: anywhere; } .text i { font-style: normal; border-radius: .2rem; padding: .05rem .1rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; } svg, .figure { break-inside: avoid; } }
"""


def page(runs: Sequence[ReportData]) -> str:
    """The whole document. Everything that comes from a run is escaped."""
    single = len(runs) == 1
    title = f"{runs[0].name}: MoEfication report" if single else "MoEfication: " + ", ".join(run.name for run in runs)
    parts = [_head(title)]
    parts += _single(runs[0]) if single else _several(runs)
    return "\n".join([*parts, "</body></html>", ""])


def _head(title: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
    )


def _single(run: ReportData) -> list[str]:
    return [
        f"<h1>{_text(_short(run.model))} as a mixture of experts</h1>",
        f'<p class="soft">run <code>{_text(run.run)}</code>, task {_text(run.task or "not known yet")}</p>',
        *_headline(run),
        *_quality(run),
        *_layers(run),
        *_experts(run),
        *_tokens(run),
        *_provenance(run),
        *_missing(run),
    ]


def _several(runs: Sequence[ReportData]) -> list[str]:
    rows = []
    for run in runs:
        found = run.applied()
        entry: dict[str, Any] = {"run": run.name, "model": _short(run.model)}
        if found is not None:
            metrics, row = found
            entry |= {
                "data": _short(str(metrics["data"])),
                metrics["dense"]["metric"]: row["value"],
                "dense": metrics["dense"]["value"],
                "over dense": row["relative"],
                "agreement": row["agreement"],
                distance_name(metrics["dense"]["metric"]): row["kl"],
                "FFN FLOPs": row["ffn_flops_fraction"],
                "speed-up": row["speedup"],
            }
        rows.append(entry)
    parts = [f"<h1>{len(runs)} conversions side by side</h1>", _table(rows)]
    measured = [(run.name, run.evaluations[0]) for run in runs if run.evaluations]
    if measured:
        parts += ["<h2>Quality against compute</h2>", *_pair(charts.comparison(measured))]
    for run in runs:
        parts += [f"<h2>{_text(run.name)}</h2>", *_layers(run, 3), *_experts(run, 3), *_missing(run, 3)]
    for run in runs:
        parts += _provenance(run, run.name)
    return parts


def _headline(run: ReportData) -> list[str]:
    found = run.applied()
    if found is None:
        return []
    metrics, row = found
    dense, better = metrics["dense"], "lower" if metrics["dense"]["metric"] in LOWER_IS_BETTER else "higher"
    figures = [
        (f"{row['ffn_flops_fraction']:.1%}", "of the FFNs' multiply-adds, router and correction included"),
        (f"{row['value']:.4g}", f"{dense['metric']} (dense {dense['value']:.4g}; {better} is better)"),
        (f"{row['kl']:.3g}", distance_name(dense["metric"])),
        (f"{row['speedup']:.2f}x", f"whole-model speed, {row['backend']} on {metrics['device']}{_bound(row)}"),
    ]
    if row["agreement"] is not None:
        figures.insert(2, (f"{row['agreement']:.1%}", "of the predictions as the dense model's"))
    cells = "".join(
        f'<div class="figure"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in figures
    )
    on = f"{metrics['examples']} examples of {_short(str(metrics['data']))}"
    return [f'<div class="figures">{cells}</div>', f'<p class="soft">Measured on {_text(on)}.</p>']


def _bound(row: dict[str, Any]) -> str:
    return f" (multiply-adds allow {row['bound']:.2f}x)" if row.get("bound") else ""


def _quality(run: ReportData) -> list[str]:
    parts = ["<h2>Quality against compute</h2>"]
    if not run.evaluations:
        return [*parts, '<p class="soft">Nothing was measured yet.</p>']
    for metrics in run.evaluations:
        rows = [
            {
                "selection": row["selection"], "fraction": row["fraction"], metrics["dense"]["metric"]: row["value"],
                "over dense": row["relative"], "agreement": row["agreement"], "KL": row["kl"],
                "FFN FLOPs": row["ffn_flops_fraction"], "speed-up": row["speedup"], "bound": row.get("bound"),
                "applied": row["applied"],
            }
            for row in metrics["rows"]
        ]  # fmt: skip
        data = f"{metrics['name']}: {metrics['data']}, {metrics['examples']} examples"
        parts += [
            f"<h3>{_text(data)}</h3>",
            *_pair(charts.quality(metrics)),
            '<p class="soft">Bars and bands are 95 % intervals. Oracles know every activation and cost nothing: no router '
            "can do better with these experts. Bold: what the converted model does. Bound: the speed-up by the multiply-adds of all "
            "linear layers; neurons skipped because their ReLU is zero may pass it.</p>",
            _table(rows, mark="applied"),
        ]
    return parts


def _layers(run: ReportData, level: int = 2) -> list[str]:
    if not run.layers:
        return []
    parts = [f"<h{level}>Layers</h{level}>", _wide(charts.budgets(run.layers, run.run))]
    capture = charts.captured(run.layers, run.run)
    if capture is not None:
        said = "Share of activation mass on held-out tokens, mean over the layers: what routers could still gain."
        parts += [_wide(capture), f'<p class="soft">{said}</p>']
    rows = [
        {"layer": number, "name": layer["name"]}
        | {
            label: layer.get(key)
            for label, key in (
                ("experts", "num_experts"), ("size", "expert_size"), ("always on", "always_on"), ("rule", "rule"),
                ("k", "top_k"), ("experts per token", "experts_mean"), ("router width", "router_width"),
                ("correction rank", "correction_rank"), ("FFN FLOPs", "ffn_flops_fraction"), ("firing", "firing"),
                ("dead neurons", "dead_neurons"),
            )
        }
        for number, layer in enumerate(run.layers)
    ]  # fmt: skip
    return [*parts, f"<details><summary>every layer in numbers</summary>{_table(rows)}</details>"]


def _experts(run: ReportData, level: int = 2) -> list[str]:
    parts = []
    if run.load:
        dead = sum(share < _DEAD for layer in run.load for share in layer["share_E"])
        always = sum(share > _ALWAYS for layer in run.load for share in layer["share_E"])
        total = sum(len(layer["share_E"]) for layer in run.load)
        said = f"{total} experts on calibration tokens; {dead} run for fewer than one token in a thousand, {always} for all."
        parts += [
            f"<h{level}>Expert load</h{level}>",
            _wide(charts.load_map(run.load, run.run)),
            f'<p class="soft">{said}</p>',
        ]
    if run.coactivation:
        parts += [
            f"<h{level}>Co-activation</h{level}>",
            _wide(charts.coactivation(run.coactivation, run.run)),
            '<p class="soft">Neurons in expert order; bright: fire together. A good split puts it on the diagonal.</p>',
        ]
    return parts


def _pair(pictures: Sequence[str]) -> list[str]:
    """Side by side, on a phone one below the other."""
    return ['<div class="pair">', *(f"<div>{picture}</div>" for picture in pictures), "</div>"]


def _wide(picture: str) -> str:
    """A chart that is scrolled sideways where it would be too small to read."""
    return f'<div class="scroll wide">{picture}</div>'


def _tokens(run: ReportData) -> list[str]:
    if not run.text:
        return []
    if len({token["share"] for token in run.text}) == 1:
        share = run.text[0]["share"]
        return [
            "<h2>Experts per token</h2>",
            f"<p>Every token runs the same number of experts: {share:.1%} of them.</p>",
        ]
    most = max(token["share"] for token in run.text) or 1.0
    words = []
    for token in run.text:
        alpha = 0.85 * token["share"] / most
        style = f"background: rgb(230 159 0 / {alpha:.2f})"
        hint = f"{token['share']:.1%} of the experts"
        gap = " " if token["starts"] else ""
        words.append(f'{gap}<i style="{style}" title="{hint}">{_text(token["text"].strip())}</i>')
    shares = sorted(token["share"] for token in run.text)
    said = f"from {shares[0]:.1%} to {shares[-1]:.1%} of all routed experts, {shares[len(shares) // 2]:.1%} for the median token"
    return [
        "<h2>Experts per token</h2>",
        f'<p class="soft">Darker: more experts ran for this token, {said}.</p>',
        f'<p class="text">{"".join(words)}</p>',
    ]


def _provenance(run: ReportData, name: str = "") -> list[str]:
    rows = [
        {"stage": s["stage"], "seconds": s["seconds"], "megabytes": s["bytes"] / 1e6, "finished": s["finished"],
         "host": s["host"], "device": s["device"], "digest": s["digest"][:12]}
        for s in run.stages
    ]  # fmt: skip
    versions = {**run.stages[-1]["versions"]} if run.stages else {}
    said = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    commands = "".join(
        f"<p><code>{_text(command)}</code></p>" for command in dict.fromkeys(s["command"] for s in run.stages)
    )
    inputs = {key: digest for s in run.stages for key, digest in s["inputs"].items() if key in ("base_model", "data")}
    digests = ", ".join(f"{key} {digest[:16]}" for key, digest in inputs.items())
    return [
        f"<h2>Provenance{_text(': ' + name if name else '')}</h2>",
        f"<p>Model <code>{_text(run.model or '')}</code></p>",
        f'<p class="soft">{_text(said)}. Inputs: {_text(digests)}</p>',
        _table(rows),
        f"<details><summary>commands</summary>{commands}</details>",
    ]


def _missing(run: ReportData, level: int = 2) -> list[str]:
    if not run.missing:
        return []
    items = "".join(f"<p>{_text(what)}: <code>{_text(command)}</code></p>" for what, _, command in
                    (entry.partition(": ") for entry in run.missing))  # fmt: skip
    return [f"<h{level}>Not in this report</h{level}>", items]


def _table(rows: Sequence[Mapping[str, Any]], mark: str = "") -> str:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != mark]
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        f"<tr{' class=applied' if mark and row.get(mark) else ''}>"
        + "".join(f"<td>{_text(_cell(row.get(name)))}</td>" for name in names)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(path: str | None) -> str:
    return (path or "a model").rstrip("/").rpartition("/")[2]


def _text(value: str) -> str:
    return html.escape(value, quote=True)
