"""inspect: what a model's FFNs look like and into how many experts they divide. Reads headers, no weights."""

from moefication_cli.config import ModelConfig
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.runs.control import Control, Result

_COLUMNS = ("layer", "d_model", "num_neurons", "activation", "gated", "bias", "family")


def inspect_model(model: str, config: ModelConfig, control: Control) -> Result:
    """One row per FFN, the expert counts that divide F, and the share of the parameters that FFNs hold."""
    checkpoint = Checkpoint(model, revision=config.revision, ffn=config.ffn, trust_remote_code=config.trust_remote_code)
    found = checkpoint.describe()
    rows = [{name: row[name] for name in _COLUMNS} for row in found["ffns"]]
    notes = [
        f"{found['architecture']}: {len(rows)} FFNs hold {found['ffn_share']:.1%} of {found['parameters']:,} parameters"
    ]
    for neurons, counts in found["divisors"].items():
        notes.append(f"F={neurons} divides into E = {', '.join(map(str, counts))}")
    return Result("inspect", rows, dict(found), notes=notes)
