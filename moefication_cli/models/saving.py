"""`save_pretrained` of a loaded mixture of experts: the whole converted folder, not the dense model alone."""

from pathlib import Path
from typing import Any

from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.embedded import MODULE, embed_code
from moefication_cli.models.folder.moe_folder import MoEFolder, layer_tensors, write_moe_settings
from moefication_cli.models.folder.seal import sealed
from moefication_cli.models.surgery import installed_layers
from moefication_cli.routing.routers import router_settings
from moefication_cli.routing.rules import TopK, rule_setting
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.store import jsonio


def refuse_to_save(save_directory: str | Path, **options: Any) -> None:
    """`save_pretrained` of a model with int8 weights. Raises ConfigError: its float weights, which the folder's format and its seal are
    of, are gone, and what is rounded must not pass for them.
    """
    raise ConfigError(
        f"{save_directory}: a model loaded with int8 weights cannot be saved, its float weights are rounded",
        "copy the folder; or load float weights, save them, and quantise when loading",
    )


def save_converted(model: Any, moe: MoEFolder, save_directory: str | Path, **options: Any) -> None:
    """`model.save_pretrained(save_directory, ...)` as transformers has it, and the experts as they are installed now.

    `load(save_directory)` gives the same mixture, also where `load` was given a fraction; a folder that came with code gets
    code again. As always, the tokenizer is saved by itself. Raises ConfigError for `push_to_hub`.
    """
    if options.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub would upload the dense model alone", "save to a folder and upload that: hf upload REPO FOLDER"
        )
    folder = Path(save_directory)
    type(model).save_pretrained(model, folder, **options)
    _name_base_class(model, folder)
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    installed = installed_layers(model)
    for index, (layer, entry) in enumerate(zip(moe.layers, _entries(moe), strict=True)):
        found = installed.get(layer.name)
        if found is None:
            layers.append({"layer": layer.name, "dense": True})
            continue
        router = found.router if isinstance(found, MoEFFN) else None
        weights = found.weights
        rule = rule_setting(found.rule if router is not None else TopK(0))
        routed = {} if router is None else {"router": router_settings(router)}
        sizes = {"num_experts": weights.num_experts, "num_shared": weights.num_shared, "rule": rule}
        layers.append({name: value for name, value in entry.items() if name != "router"} | sizes | routed)
        tensors |= layer_tensors(index, router, weights.compensation)
    checkpoint = Checkpoint(folder, ffn=moe.settings.get("ffn"))
    write_moe_settings(folder, moe.settings | {"layers": layers, "weights": sealed(checkpoint)}, tensors)


def _entries(moe: MoEFolder) -> list[dict[str, Any]]:
    """What the folder recorded of each of its layers; a model that is a part of the folder's has some of them."""
    recorded = {entry["layer"]: entry for entry in moe.settings["layers"]}
    return [recorded[layer.name] for layer in moe.layers]


def _name_base_class(model: Any, folder: Path) -> None:
    """config.json names the class of transformers, not the one of our code, which is then written anew."""
    settings = jsonio.read_object(folder / "config.json")
    code = settings.get("auto_map")
    if not isinstance(code, dict) or not any(MODULE in str(entry) for entry in code.values()):
        return
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    del settings["auto_map"]
    jsonio.write(folder / "config.json", settings | {"architectures": kinds[:1]})
    (folder / f"{MODULE}.py").unlink(missing_ok=True)
    embed_code(folder)
