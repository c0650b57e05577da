"""Code that travels with a converted folder: `AutoModelForX.from_pretrained(RUN/model, trust_remote_code=True)` is the MoE.

`config.json` names classes of `modeling_moefication.py` under `auto_map`; transformers takes them only with
trust_remote_code=True, so plain `from_pretrained` stays dense. They are the classes that the auto classes load anyway, and
attach the experts after loading; they need this package installed and say so where it is not. Source:
https://huggingface.co/docs/transformers/custom_models
"""

from pathlib import Path

import transformers

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models.heads import auto_architectures
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write

MODULE = "modeling_moefication"
_CODE = '''"""This folder as a mixture of experts: AutoModelForX.from_pretrained(FOLDER, trust_remote_code=True).

Without trust_remote_code the same call gives the dense model. Written by `moefication apply --embed-code`.
"""

import transformers

try:
    from moefication_cli.models.embedded import attach
except ImportError as error:
    raise ImportError(
        "the experts of this model need the package moefication (pip install moefication); "
        "without trust_remote_code=True the folder loads as the dense model"
    ) from error


class WithExperts:
    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        loaded = super().from_pretrained(folder, *args, **kwargs)
        attach(loaded[0] if isinstance(loaded, tuple) else loaded, folder, kwargs.get("revision"))
        return loaded
'''
_CLASS = """

class MoE{architecture}(WithExperts, transformers.{architecture}):
    pass
"""


def embed_code(folder: Path) -> list[Path]:
    """Write the module into a converted folder and name its classes in config.json; returns both paths.

    There is a class, and an `auto_map` entry, for every auto class that supports the model: whichever of them a user
    calls gives the mixture, never the dense model without a word. Raises UnsupportedModelError for models that come with
    code of their own or name no class of transformers.
    """
    settings = jsonio.read_object(folder / "config.json")
    architecture = (settings.get("architectures") or [""])[0]
    if "auto_map" in settings or not hasattr(transformers, architecture):
        raise UnsupportedModelError(
            f"--embed-code: {architecture or 'the model'} is no class of transformers, its code cannot be extended",
            "leave --embed-code out and load the folder with moefication_cli.load",
        )
    loads = auto_architectures(getattr(transformers, architecture).config_class)
    loads = {auto: name for auto, name in loads.items() if hasattr(transformers, name)}
    classes = [_CLASS.format(architecture=name) for name in sorted({architecture, *loads.values()})]
    module = folder / f"{MODULE}.py"
    atomic_write(module, "".join([_CODE, *classes]).encode())
    settings["auto_map"] = {auto: f"{MODULE}.MoE{name}" for auto, name in loads.items()}
    jsonio.write(folder / "config.json", settings)
    return [module, folder / "config.json"]
