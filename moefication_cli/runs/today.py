"""What the inputs of a run's stages are as of now, without loading a model or data: for `status`. Imports no torch."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.contents import fingerprint, tokenizer_digest, weight_files
from moefication_cli.store.manifest import BASE_MODEL, Manifest
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import Purpose, expanded, local_digest

GONE = "not there any more"  # in place of a digest


def inputs_today(run: RunDir, manifest: Manifest) -> Mapping[str, str]:
    """Digests of the model, its tokenizer and the data of a stage that are local files.

    What comes from a hub is named by a commit and does not change; it is left out.
    """
    found: dict[str, str] = {}
    info = run.info
    folder = None if info.model is None else Path(info.model)
    if folder is not None and folder.is_absolute():
        try:
            found[BASE_MODEL] = fingerprint(folder, weight_files(folder), info.ffn, run.hashes.sha256)
            found["tokenizer"] = tokenizer_digest(folder, run.hashes.sha256)
        except (ConfigError, OSError):
            found |= {BASE_MODEL: GONE, "tokenizer": GONE}
    data = manifest.values.get("data")
    if "data" in manifest.inputs and isinstance(data, str) and Path(data).is_absolute():
        purpose: Purpose = "calibrate" if manifest.stage == "activations" else "evaluate"
        found["data"] = GONE
        with suppress(ConfigError, OSError):
            found["data"] = local_digest(expanded(data), manifest.values.get("split"), purpose, run.hashes.sha256)
    run.hashes.save()
    return found
