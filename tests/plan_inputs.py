"""What plans are made from, of a run whose stages up to `train-router` are there."""

from pathlib import Path

from moefication_cli.conversion.plan import routed_layers
from moefication_cli.conversion.search import PlanInputs
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import open_model
from moefication_cli.store.rundir import RunDir


def plan_inputs(run: Path, control: Control) -> PlanInputs:
    directory = RunDir(run)
    model = open_model(directory, None, control)
    split, router, activations = (directory.require(n) for n in ("split", "router/regression", "activations"))
    return PlanInputs(directory, model, routed_layers(model, split, router), {"activations": activations}, control)
