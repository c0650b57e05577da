"""inspect: what a model's FFNs look like and into how many experts they divide. Reads headers, no weights."""

from moefication_cli.config import ModelConfig
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.heads import why_no_task
from moefication_cli.runs.control import Control, Result

_COLUMNS = ("layer", "d_model", "num_neurons", "activation", "gated", "bias", "family")


def inspect_model(model: str, config: ModelConfig, control: Control) -> Result:
    """One row per FFN, the task that can convert the model, the expert counts that divide F, the FFNs' share of parameters.

    Raises ConfigError (model not found, unreadable) and UnsupportedModelError (no FFN that can be converted).
    """
    checkpoint = Checkpoint(
        model, revision=config.revision, ffn=config.ffn, trust_remote_code=control.trust_remote_code
    )
    found = checkpoint.describe()
    rows = [{name: row[name] for name in _COLUMNS} for row in found["ffns"]]
    notes = [
        f"{found['architecture']}: {len(rows)} FFNs hold {found['ffn_share']:.1%} of {found['parameters']:,} parameters"
    ]
    if found["task"] is None:
        notes.append(f"no task can convert this model: {why_no_task(checkpoint.config)}")
    else:
        notes.append(f"converted with --task {found['task']}, which `run` and `collect-activations` take by default")
    for neurons, counts in found["divisors"].items():
        notes.append(f"F={neurons} divides into E = {', '.join(map(str, counts))}")
    return Result("inspect", rows, dict(found), notes=notes)
