"""demo: the whole method on the model that ships with the package, on data every Python has: its standard library."""

from dataclasses import replace
from pathlib import Path

from moefication_cli.config import (
    ApplyConfig,
    CollectConfig,
    DemoConfig,
    EvalConfig,
    RouterConfig,
    RunConfig,
    SplitConfig,
)
from moefication_cli.errors import MissingArtifactError
from moefication_cli.evaluation.plots import text_chart
from moefication_cli.runs.control import Control, Result
from moefication_cli.stages.convert import Pipeline, estimate_stages, run_stages
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.stdlib import Part, stdlib_documents

_CALIBRATION_TOKENS = 32768
_EVAL_WINDOWS = 48
_MEASURED = ("groundtruth", "neuron", "random", "static", "paper", "regression")  # peers take minutes
_REFINE_STEPS = 20  # at each fraction: minutes are all the demo has


def demo(run: RunDir, config: DemoConfig, control: Control) -> Result:
    """Convert the demo model, measure it on held-out standard-library modules, say where the picture is.

    Raises MissingArtifactError when the package was installed without its model.
    """
    asked = Pipeline(
        RunConfig(eval_limit=_EVAL_WINDOWS),
        CollectConfig(model=str(demo_model()), max_tokens=_CALIBRATION_TOKENS),
        EvalConfig(fractions=config.fractions, selection=_MEASURED),
        SplitConfig(),
        RouterConfig(),
        ApplyConfig(refine=_REFINE_STEPS),
    )
    if control.dry_run:  # the data would be written first
        return replace(estimate_stages(run, asked, control), command="demo")
    calibration, heldout = (_write_documents(run, part) for part in ("train", "heldout"))
    asked = replace(
        asked,
        extra=replace(asked.extra, eval_data=str(heldout)),
        collect=replace(asked.collect, data=str(calibration)),
    )
    result = run_stages(run, asked, control)
    metrics = jsonio.read_object(run.path("eval/default") / "metrics.json")
    notes = [
        *text_chart(metrics),
        *result.notes,
        "your own model: moefication run RUN --model M --data calibration.txt --eval-data test.txt",
    ]
    return replace(result, command="demo", notes=notes)


def demo_model() -> Path:
    """The shipped model: inside an installed package, or artifacts/demo of a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "demo", package.parent / "artifacts" / "demo"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise MissingArtifactError(
        "the demo model is not installed", "train it: python artifacts/demo/train_demo.py (about an hour on two cores)"
    )


def _write_documents(run: RunDir, part: Part) -> Path:
    path = run.root / f"demo-{part}.jsonl"
    data = b"".join(jsonio.canonical({"text": text}) + b"\n" for text in stdlib_documents(part))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data:
        atomic_write(path, data)
    return path
