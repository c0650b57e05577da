"""README.md of an exported model: what it is, how it is loaded, and what it keeps."""

from moefication_cli import __version__
from moefication_cli.export.check import Comparison
from moefication_cli.runs.card import base_line, base_model, metadata, quality_of_run, quality_table
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


def model_card(run: RunDir, made: Artifact, name: str, found: Comparison) -> str:
    """Markdown. The quality rows are those of the run's evaluations of RUN/model."""
    model = base_model(run.info)
    lines = [
        *metadata(run.info),
        f"# {model.rpartition('/')[2]} as a mixture of experts ({name})", "",
        "The feed-forward layers of a trained dense model, split into experts by MoEfication (arXiv 2110.01786) without",
        "retraining, and written as an ordinary checkpoint of this format.", "",
        base_line(run.info),
        f"- made with: moefication {__version__}; fraction of the dense FFNs' multiply-adds: {made.config.get('fraction')}",
        f"- against the converted model it was exported from, on {found.tokens} tokens: relative error of the logits "
        f"{found.relative_error:.2e}, tokens with other experts {found.selections_differing:.2%}, perplexity "
        f"{found.perplexity:.4f} ({found.perplexity_converted:.4f})", "",
        "```python", "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")', "```", "",
    ]  # fmt: skip
    rows = quality_table(quality_of_run(run))
    return "\n".join([*lines, *rows, ""] if rows else lines)
