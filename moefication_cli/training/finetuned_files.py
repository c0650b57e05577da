"""RUN/finetuned/NAME on disk: the plan as RUN/refined has it, the changed weights, and the conversion they belong to.

moefication/          routers, rules and corrections (`models.folder.moe_folder`)
weights.safetensors   changed weights under the model's parameter names, in the checkpoint's order and dtypes; may be absent
conversion.json       the options of `apply` that the conversion was made with
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefication_cli.config import ApplyConfig, recorded_values
from moefication_cli.conversion.plan import LayerPlan
from moefication_cli.conversion.plan_files import router_tensors, settings
from moefication_cli.models.folder.moe_folder import write_moe_settings
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.layerfile import write_layer

WEIGHTS, CONVERSION = "weights.safetensors", "conversion.json"


def write_finetuned(
    folder: Path, plans: list[LayerPlan], weights: Mapping[str, Tensor], like: ApplyConfig, ffn: str | None
) -> None:
    """Write the three into a stage's folder."""
    write_moe_settings(folder, settings(plans, str(like.router), like, ffn), router_tensors(plans))
    if weights:
        write_layer(folder / WEIGHTS, weights, {"layer": "model"})
    jsonio.write(folder / CONVERSION, recorded_values(like))


def conversion_options(finetuned: Artifact) -> ApplyConfig:
    """The options of `apply` that its conversion was made with."""
    return ApplyConfig.recorded(jsonio.read_object(finetuned.file(CONVERSION)))


def weights_file(finetuned: Artifact) -> Path | None:
    """The changed weights, None where there are none (`--train router`)."""
    return finetuned.file(WEIGHTS) if WEIGHTS in finetuned.manifest.files else None


def said_of(finetuned: Artifact) -> dict[str, Any]:
    """What `moefication.json` says of the fine-tuning that a folder comes from."""
    names = ("train", "steps", "tokens", "kl_before", "kl_after")
    name = finetuned.manifest.stage.partition("/")[2]
    return {"name": name, "weights_changed": weights_file(finetuned) is not None} | {
        key: finetuned.metrics[key] for key in names
    }
