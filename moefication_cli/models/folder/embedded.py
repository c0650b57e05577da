"""Code that travels with a converted folder: `AutoModelForX.from_pretrained(RUN/model, trust_remote_code=True)` is the MoE.

`config.json` names a class of `modeling_moefication.py` under `auto_map`; transformers takes it only with
trust_remote_code=True, so plain `from_pretrained` stays dense. The class is the checkpoint's own, which attaches the experts
after loading; it needs this package installed and says so where it is not. Source:
https://huggingface.co/docs/transformers/custom_models
"""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models.folder.moe_folder import FOLDER, read_moe_folder
from moefication_cli.models.loading import attach_experts
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write

MODULE = "modeling_moefication"
_CODE = '''"""This folder as a mixture of experts: AutoModelForX.from_pretrained(FOLDER, trust_remote_code=True).

Without trust_remote_code the same call gives the dense model. Written by `moefication apply --embed-code`.
"""

from transformers import {architecture}

try:
    from moefication_cli.models.embedded import attach
except ImportError as error:
    raise ImportError(
        "the experts of this model need the package moefication (pip install moefication); "
        "without trust_remote_code=True the folder loads as the dense model"
    ) from error


class MoE{architecture}({architecture}):
    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        loaded = super().from_pretrained(folder, *args, **kwargs)
        attach(loaded[0] if isinstance(loaded, tuple) else loaded, folder, kwargs.get("revision"))
        return loaded
'''


def embed_code(folder: Path) -> list[Path]:
    """Write the module into a converted folder and name its class in config.json; returns both paths.

    Raises UnsupportedModelError for models that come with code of their own or name no class of transformers.
    """
    settings = jsonio.read_object(folder / "config.json")
    architecture = (settings.get("architectures") or [""])[0]
    if "auto_map" in settings or not hasattr(transformers, architecture):
        raise UnsupportedModelError(
            f"--embed-code: {architecture or 'the model'} is no class of transformers, its code cannot be extended",
            "leave --embed-code out and load the folder with moefication_cli.load",
        )
    kind = getattr(transformers, architecture).config_class
    names = [
        name
        for name in dir(transformers)
        if name.startswith("AutoModel")
        and getattr(getattr(transformers, name)._model_mapping.get(kind, None), "__name__", "") == architecture
    ]
    module = folder / f"{MODULE}.py"
    atomic_write(module, _CODE.format(architecture=architecture).encode())
    settings["auto_map"] = dict.fromkeys(names, f"{MODULE}.MoE{architecture}")
    jsonio.write(folder / "config.json", settings)
    return [module, folder / "config.json"]


def attach(model: Any, folder: str | Path, revision: str | None = None) -> None:
    """Make a loaded dense model the mixture of experts that its folder or hub repository describes.

    Raises MissingArtifactError (no experts there), CorruptArtifactError.
    """
    local = Path(folder)
    if not local.is_dir():
        local = Path(snapshot_download(str(folder), revision=revision, allow_patterns=[f"{FOLDER}/*"]))
    attach_experts(model.eval(), local, read_moe_folder(local))
