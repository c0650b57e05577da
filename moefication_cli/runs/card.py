"""Model cards: README.md of what a run wrote, with metadata the hub reads.

A card is made of configurations, never of paths or times, so that the same run writes the same bytes. What `eval` measures comes
after RUN/model is finished: it writes RUN/model's card again, with its table, into its own folder. Metadata:
https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moefication_cli import __version__
from moefication_cli.config import ApplyConfig, CollectConfig, Options, RouterConfig, SplitConfig, options_of
from moefication_cli.config.option import flag, list_text
from moefication_cli.errors import CorruptArtifactError
from moefication_cli.store import jsonio
from moefication_cli.store.rundir import RunDir, RunInfo

PIPELINES = {
    "lm": "text-generation", "classification": "text-classification", "text2text": "text2text-generation",
    "mlm": "fill-mask", "embedding": "feature-extraction",
}  # fmt: skip
AUTO = {
    "lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification", "text2text": "AutoModelForSeq2SeqLM",
    "mlm": "AutoModelForMaskedLM", "embedding": "AutoModel",
}  # fmt: skip
NOT_MEASURED = "Quality has not been measured yet: `moefication eval RUN`.\n"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def metadata(info: RunInfo) -> list[str]:
    """The YAML block between `---`, as lines; a base model that is a folder has no name on the hub and is left out."""
    lines = ["---", "library_name: transformers", "tags: [moe, mixture-of-experts, moefication]"]
    if info.task in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[info.task]}")
    if info.model is not None and info.revision is not None and _HUB_ID.fullmatch(info.model):
        lines.append(f"base_model: {json.dumps(info.model)}")  # a JSON string is one of YAML
    return [*lines, "---", ""]


def base_model(info: RunInfo) -> str:
    """The base model's name as the card says it: a hub id, or the name of a folder."""
    name = info.model or "unknown"
    return name if info.revision is not None else Path(name).name


def base_line(info: RunInfo) -> str:
    """The line of a card that names the base model."""
    return f"- base model: `{base_model(info)}`" + (f", revision `{info.revision}`" if info.revision else "")


def converted_card(run: RunDir, config: ApplyConfig, layers: Iterable[Mapping[str, Any]]) -> str:
    """README.md of RUN/model; `layers` are the rows of `apply`, of which `ffn_flops_fraction` is read."""
    info, shares = run.info, [float(row["ffn_flops_fraction"]) for row in layers]
    name, auto = base_model(info), AUTO.get(str(info.task), "AutoModel")
    made: list[tuple[str, str, type[Options]]] = [
        ("collect-activations", "activations", CollectConfig), ("split", "split", SplitConfig),
        ("train-router", f"router/{config.router}", RouterConfig),
    ]  # fmt: skip
    commands: list[str] = []
    for command, stage, kind in made:
        manifest = run.manifest(stage)
        if manifest is not None:
            commands.append(_command(command, kind.recorded(manifest.values), info.options() if not commands else {}))
    # No steps of refinement are none, whichever way it was said: a recipe says 0 where `apply` by itself says nothing
    commands.append(_command("apply", replace(config, refine=config.refine or None), {}))
    dense = "neurons permuted, same function" if config.finetuned is None else "fine-tuned with its experts"
    plain = f"Plain `from_pretrained` gives the dense model ({dense})."
    if config.weights is not None:
        plain = "The weights are int8; plain `from_pretrained` cannot load them."
    embedded = [
        "",
        f'model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)  # the same, by the code in this folder',
    ]
    return "\n".join([
        *metadata(info),
        f"# {name.rpartition('/')[2]} as a mixture of experts", "",
        "The feed-forward layers of a trained dense model, split into experts by MoEfication",
        "([arXiv 2110.01786](https://arxiv.org/abs/2110.01786)).", "",
        base_line(info),
        f"- multiply-adds of the FFNs, router and corrections included, of the dense ones: {sum(shares) / len(shares):.3f} planned"
        f" (per layer {min(shares):.3f} to {max(shares):.3f})",
        f"- made with moefication {__version__}, torch {version('torch')}, transformers {version('transformers')}", "",
        f"{plain} The mixture of experts:", "",
        "```python", "from moefication_cli import load  # pip install moefication", "",
        'model = load("FOLDER")', *(embedded if config.embed_code else []), "```", "",
        "## Quality", "", NOT_MEASURED,
        "## How it was made", "", "```", *commands, "```", "",
    ])  # fmt: skip


def with_quality(card: str, metrics: Mapping[str, Any]) -> str:
    """A card of RUN/model with the table of one evaluation in place of the sentence that there is none."""
    return card.replace(NOT_MEASURED, "\n".join([*quality_table(quality_rows(metrics)), ""]))


def quality_of_run(run: RunDir) -> list[str]:
    """Table rows of all current evaluations of RUN/model."""
    rows = []
    for name in run.names("eval"):
        if run.why_stale(f"eval/{name}") is not None:
            continue
        try:
            rows += quality_rows(jsonio.read_object(run.path(f"eval/{name}") / "metrics.json"))
        except (OSError, CorruptArtifactError):
            continue
    return rows


def quality_table(rows: list[str]) -> list[str]:
    """Markdown lines of a table; none without rows."""
    if not rows:
        return []
    return ["| data | metric | dense | this | KL to dense (nats) |", "|---|---|---|---|---|", *rows]


def quality_rows(metrics: Mapping[str, Any]) -> list[str]:
    """The rows of metrics.json that are RUN/model, as lines of that table."""
    named = metrics.get("datasets") or {}
    found = []
    for row in metrics["rows"]:
        if row["applied"]:
            part = named.get(row.get("data"), metrics)
            kl = f"{row['kl']:.4g}" + (" (1 - cosine)" if row.get("agreement", 1) is None else "")
            values = f"{part['dense']['value']:.4g} | {row['value']:.4g} | {kl}"
            found.append(f"| {Path(str(part['data'])).name} | {part['dense']['metric']} | {values} |")
    return found


def _command(name: str, config: Options, known: Mapping[str, Any]) -> str:
    """The command with every option that is not at its default, or is `known` from elsewhere; of paths only their last part."""
    words = ["moefication", name, "RUN"]
    for entry in options_of(config):
        value = getattr(config, entry.name)
        if entry.name == "model" and not known:  # a run's model is named once
            continue
        if value is None:
            value = known.get(entry.name)
        if value == entry.default or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag(entry) if value else "--no-" + flag(entry).removeprefix("--"))
            continue
        text = str(list_text(value) if isinstance(value, tuple) else value)
        words += [flag(entry), Path(text).name if Path(text).is_absolute() else text]
    return shlex.join(words)
