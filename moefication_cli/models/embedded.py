"""What the code in a converted folder calls (see `folder.embedded`): its name is written into folders, so it stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from moefication_cli.models.experts import attach_experts, sites_of
from moefication_cli.models.folder.moe_folder import FOLDER, read_moe_folder
from moefication_cli.models.loading import check_weights
from moefication_cli.models.sites import find_sites


def attach(model: Any, folder: str | Path, revision: str | None = None) -> None:
    """Make a loaded dense model the mixture of experts that its folder or hub repository describes.

    A part of the converted model (the encoder of an encoder-decoder) gets the experts of its own layers. Raises
    MissingArtifactError (no experts there), CorruptArtifactError.
    """
    local = Path(folder)
    if not local.is_dir():
        local = Path(snapshot_download(str(folder), revision=revision, allow_patterns=[f"{FOLDER}/*"]))
    moe = read_moe_folder(local)
    if all((local / name).exists() for name in moe.settings.get("weights", {}).get("files", {})):
        check_weights(local, moe)  # a repository's weights may lie in another snapshot
    names = {site.name for site in find_sites(model, moe.settings.get("ffn"))}
    moe = replace(moe, layers=tuple(layer for layer in moe.layers if layer.name in names))
    attach_experts(model.eval(), sites_of(model, local, moe), local, moe)
