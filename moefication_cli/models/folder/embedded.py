"""Code that travels with a converted folder: `AutoModelForX.from_pretrained(RUN/model, trust_remote_code=True)` is the MoE.

`config.json` names classes of `modeling_moefication.py` under `auto_map`; transformers takes them only with
trust_remote_code=True, so plain `from_pretrained` stays dense. They are the classes that the auto classes load anyway, and
attach the experts after loading: with this package where it is installed, else with `plain`, which stands in the file behind
the modules it needs, as they are in this package but for their imports of each other. Source:
https://huggingface.co/docs/transformers/custom_models
"""

import ast
from pathlib import Path

import transformers

import moefication_cli
from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models.heads import auto_architectures
from moefication_cli.store import jsonio
from moefication_cli.store.files import atomic_write

MODULE = "modeling_moefication"
_BUNDLED = (  # each needs only those before it
    "errors", "ffn", "routing/router", "routing/rules", "runtime/reference", "models/masking", "models/families",
    "models/sites", "models/projections", "models/installed", "models/surgery", "models/folder/plain",
    "models/folder/plain_saving",
)  # fmt: skip
_HEAD = '''"""This folder as a mixture of experts: AutoModelForX.from_pretrained(FOLDER, trust_remote_code=True).

Without trust_remote_code the same call gives the dense model. Where the package moefication {version} is installed its kernels
are used; elsewhere the plain torch code in this file computes the same, without saving time.
Written by `moefication apply --embed-code`. Licence of this file: Apache-2.0.
"""

import transformers

try:
    from moefication_cli.models.embedded import attach
except ImportError:
    attach = None
'''
_MIXIN = """

class WithExperts:
    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        loaded = super().from_pretrained(folder, *args, **kwargs)
        install_experts = attach_plain if attach is None else attach
        install_experts(loaded[0] if isinstance(loaded, tuple) else loaded, folder, kwargs.get("revision"))
        return loaded

    if attach is None:  # the package saves the experts too

        def save_pretrained(self, save_directory, *args, **kwargs):
            refuse_upload(kwargs)
            super().save_pretrained(save_directory, *args, **kwargs)
            save_plain(self, Path(save_directory))
"""
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
    atomic_write(
        module, "".join([_HEAD.format(version=moefication_cli.__version__), plain_code(), _MIXIN, *classes]).encode()
    )
    settings["auto_map"] = {auto: f"{MODULE}.MoE{name}" for auto, name in loads.items()}
    jsonio.write(folder / "config.json", settings)
    return [module, folder / "config.json"]


def plain_code() -> str:
    """The bundled modules one after the other, without their docstrings and imports of each other."""
    root, parts, seen = Path(moefication_cli.__file__).parent, list[str](), set[str]()
    for name in _BUNDLED:
        source = (root / f"{name}.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            own = isinstance(node, ast.ImportFrom) and str(node.module).startswith("moefication_cli")
            if own or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = ""
            defined = {getattr(node, "name", None)} if not isinstance(node, ast.Assign) else _assigned(node)
            assert not defined & seen, f"{name}: {defined & seen} is defined in two bundled modules"
            seen |= defined - {None}  # type: ignore[arg-type]
        body = "\n".join(lines).strip()
        while "\n\n\n\n" in body:
            body = body.replace("\n\n\n\n", "\n\n\n")
        parts.append(f"\n\n# moefication_cli/{name}.py\n\n{body}\n")
    return "".join(parts)


def _assigned(node: ast.Assign) -> set[str | None]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}
