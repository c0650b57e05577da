"""Model cards: metadata the hub accepts, commands that parse, the table of an evaluation, the same bytes for the same run."""

import json
import shlex
from pathlib import Path

from cli_runner import Runner
from huggingface_hub import ModelCard
from typer.main import get_command

from moefication_cli import load
from moefication_cli.cli.app import app
from moefication_cli.runs.card import NOT_MEASURED, metadata
from moefication_cli.store.rundir import RunInfo


def test_the_card_of_a_converted_folder(calibrated_run: tuple[Path, Path], run_cli: Runner, tmp_path: Path) -> None:
    run, _ = calibrated_run
    run_cli.ok("apply", run, "--fraction", 0.8, "--keep-dense", "0", "--embed-code")
    text = (run / "model" / "README.md").read_text()
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert "moe" in card.data.tags and card.data.base_model is None  # a folder is no model of the hub
    assert "base model: `opt`" in text and str(tmp_path) not in text and NOT_MEASURED in text
    commands = [line for line in text.splitlines() if line.startswith("moefication ")]
    assert [line.split()[1] for line in commands] == ["collect-activations", "split", "train-router", "apply"]
    for line in commands:
        _, name, *words = shlex.split(line)
        get_command(app).commands[name].make_context(name, words)
    assert "--expert-size 4" in commands[1] and "--keep-dense 0 --embed-code" in commands[3]
    assert "trust_remote_code=True" in text
    load(run / "model", verify=True)  # the card is no damage

    run_cli.ok("apply", run, "--fraction", 0.8, "--keep-dense", "0", "--embed-code", "--force")
    assert (run / "model" / "README.md").read_text() == text

    run_cli.ok(
        "eval", run, "--data", tmp_path / "train.txt", "--documents", "line", "--limit", 40, "--selection", "regression"
    )
    measured = (run / "eval" / "default" / "README.md").read_text()
    metrics = json.loads((run / "eval" / "default" / "metrics.json").read_text())
    (row,) = [row for row in metrics["rows"] if row["applied"]]
    line = f"| train.txt | perplexity | {metrics['dense']['value']:.4g} | {row['value']:.4g} | {row['kl']:.4g} |"
    assert line in measured and NOT_MEASURED not in measured
    assert measured.replace(line, "").splitlines()[:12] == text.splitlines()[:12]


def test_a_base_model_of_the_hub_is_named_in_the_metadata() -> None:
    lines = metadata(RunInfo(model="someone/model-1.5", revision="0123abc", task="classification"))
    card = ModelCard("\n".join(lines))
    assert card.data.base_model == "someone/model-1.5" and card.data.pipeline_tag == "text-classification"
    odd = ModelCard("\n".join(metadata(RunInfo(model='a: "b"\n- c', revision="1", task=None))))
    assert odd.data.base_model is None
