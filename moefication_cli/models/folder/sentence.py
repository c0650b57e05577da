"""What a sentence-transformers folder says beside its encoder: modules.json, and how token states are pooled.

Source: https://sbert.net/docs/sentence_transformer/usage/custom_models.html. Imports no torch.
"""

import json
from pathlib import Path
from typing import Any, Literal

Pooling = Literal["mean", "cls"]
MODULES = "modules.json"
POOLING = "*_Pooling/config.json"
_FLAGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def module_folders(folder: Path) -> list[Path]:
    """The folders of the modules behind the encoder that are there, inside `folder`."""
    names = [str(module.get("path", "")) for module in _modules(folder)]
    return [folder / name for name in names if name and Path(name).name == name and (folder / name).is_dir()]


def pooling_of(folder: Path) -> tuple[Pooling, list[str]]:
    """How the folder pools, mean where it does not say mean or CLS; and sentences for the user about it."""
    modules = _modules(folder)
    if not modules:
        return "mean", [f"embeddings: mean of all tokens (no {MODULES} says otherwise)"]
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    notes = []
    if further := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        notes.append(f"embeddings are taken before the folder's {', '.join(further)}, which stays as it is")
    for path in sorted(folder.glob(POOLING)):
        settings = _read(path)
        asked = [name for name, value in settings.items() if name.startswith("pooling_mode") and value is True]
        asked += [str(settings["pooling_mode"])] if "pooling_mode" in settings else []
        found = _FLAGS.get(asked[0], asked[0]) if len(asked) == 1 else None
        if found == "mean" or found == "cls":
            return found, [f"embeddings: {found} pooling, as {path.parent.name} says", *notes]
        said = " and ".join(asked) or "nothing"
        return "mean", [
            f"embeddings: mean of all tokens; {path.parent.name} says {said}, which is not computed here",
            *notes,
        ]
    return "mean", [f"embeddings: mean of all tokens (the folder has no {POOLING})", *notes]


def _modules(folder: Path) -> list[dict[str, Any]]:
    found = _read(folder / MODULES)
    return [module for module in found if isinstance(module, dict)] if isinstance(found, list) else []


def _read(path: Path) -> Any:
    """What a JSON file holds; nothing where it is not there or none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
