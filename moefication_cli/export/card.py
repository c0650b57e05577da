"""README.md of an exported model: what it is, how it is loaded, and what it keeps."""

from typing import Any

from moefication_cli import __version__
from moefication_cli.errors import CorruptArtifactError
from moefication_cli.export.check import Comparison
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


def model_card(run: RunDir, made: Artifact, name: str, found: Comparison) -> str:
    """Markdown. The quality rows are those of the run's evaluations of RUN/model."""
    model = run.info.model or "unknown"
    lines = [
        "---", "library_name: transformers", "tags: [moe, moefication]", "---", "",
        f"# {model.rstrip('/').rpartition('/')[2]} as a mixture of experts ({name})", "",
        "The feed-forward layers of a trained dense model, split into experts by MoEfication (arXiv 2110.01786) without",
        "retraining, and written as an ordinary checkpoint of this format.", "",
        f"- base model: `{model}`" + (f", revision `{run.info.revision}`" if run.info.revision else ""),
        f"- made with: moefication {__version__}; fraction of the dense FFNs' multiply-adds: {made.config.get('fraction')}",
        f"- against the converted model it was exported from, on {found.tokens} tokens: relative error of the logits "
        f"{found.relative_error:.2e}, tokens with other experts {found.selections_differing:.2%}, perplexity "
        f"{found.perplexity:.4f} ({found.perplexity_converted:.4f})", "",
        "```python", "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")', "```", "",
    ]  # fmt: skip
    rows = _quality(run)
    if rows:
        lines += ["| data | metric | dense | this | KL to dense (nats) |", "|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _quality(run: RunDir) -> list[str]:
    rows = []
    for name in run.names("eval"):
        if run.why_stale(f"eval/{name}") is not None:
            continue
        try:
            metrics = jsonio.read_object(run.path(f"eval/{name}") / "metrics.json")
        except (OSError, CorruptArtifactError):
            continue
        dense: dict[str, Any] = metrics["dense"]
        for row in metrics["rows"]:
            if row["applied"]:
                values = f"{dense['value']:.4g} | {row['value']:.4g} | {row['kl']:.4g}"
                rows.append(f"| {metrics['data']} | {dense['metric']} | {values} |")
    return rows
