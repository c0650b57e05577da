"""A checkpoint without a folder: a state dict in one file, as training scripts and the published ReLU models leave it.

`write_folder` makes the ordinary folder that everything else reads, of that file and of a folder with configuration and
tokenizer. Loads with `torch.load(weights_only=True)`: no code of the file runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moefication_cli.errors import ConfigError, first_line
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.permuted import copy_side_files
from moefication_cli.models.folder.source import load_pickled
from moefication_cli.store.tensorfile import write_tensors

# Where training scripts keep the weights, beside steps and optimisers, and what their wrappers put before every name
_NESTED = ("state_dict", "model_state_dict", "module", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def write_folder(weights: Path, config: Path, out: Path, ffn: str | None = None) -> None:
    """Fill the empty folder `out` with model.safetensors and the other files of the folder `config`.

    Raises ConfigError where the file holds no state dict, the folder no config.json, or the two do not belong together.
    """
    if not (config / "config.json").is_file():
        raise ConfigError(
            f"{config} has no config.json", "give the folder with the model's configuration and tokenizer"
        )
    tensors = _state_dict(weights)
    copy_side_files(config, out, code=False)
    write_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    checkpoint = Checkpoint(out, ffn=ffn)
    try:
        for site in checkpoint.sites:
            for part in site.slices():
                checkpoint.locate(part.parameter)
    except ConfigError:
        raise ConfigError(
            f"{weights} and {config / 'config.json'} do not belong together: there is no tensor for {part.parameter}, only for "
            f"{', '.join(sorted(tensors)[:3])} ...",
            "name the configuration that the checkpoint was saved with",
        ) from None


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in the file."""
    if path.suffix == ".safetensors":
        try:
            found: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({first_line(error)})", "copy or download it again") from None
    else:
        found = load_pickled(path)
    while isinstance(found, Mapping) and not _is_state_dict(found):
        inner = next((found[name] for name in _NESTED if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            raise ConfigError(f"{path} holds no state dict; its entries: {', '.join(map(str, list(found)[:5]))}",
                              "save it with torch.save(model.state_dict(), FILE)")  # fmt: skip
        found = inner
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds no state dict", "save it with torch.save(model.state_dict(), FILE)")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return dict(found)


def _is_state_dict(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())
