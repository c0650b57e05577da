"""What the inputs of a run's stages are as of now, without loading a model or data: for `status`. Imports no torch."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.contents import fingerprint, tokenizer_digest, weight_files
from moefication_cli.store.manifest import BASE_MODEL, Manifest
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import Purpose, expanded, local_digest, named_data

GONE = "not there any more"  # in place of a digest


def inputs_today(run: RunDir) -> Callable[[Manifest], Mapping[str, str]]:
    """What gives, of a stage, digests of the model, its tokenizer and the data that are local files.

    What comes from a hub is named by a commit and does not change; it is left out.
    """
    of_model = model_today(run)

    def of_stage(manifest: Manifest) -> Mapping[str, str]:
        found = dict(of_model)
        purpose: Purpose = "calibrate" if manifest.stage == "activations" else "evaluate"
        for name, data in _data(manifest).items():
            found[name] = GONE
            with suppress(ConfigError, OSError):
                found[name] = local_digest(expanded(data), manifest.values.get("split"), purpose, run.hashes.sha256)
        run.hashes.save()
        return found

    return of_stage


def model_today(run: RunDir) -> dict[str, str]:
    """Digests of the run's model and its tokenizer; empty where the model comes from a hub or is not known."""
    info = run.info
    folder = None if info.model is None else Path(info.model)
    if folder is None or not folder.is_absolute():
        return {}
    try:
        return {
            BASE_MODEL: fingerprint(folder, weight_files(folder), info.ffn, run.hashes.sha256),
            "tokenizer": tokenizer_digest(folder, run.hashes.sha256),
        }
    except (ConfigError, OSError):
        return {BASE_MODEL: GONE, "tokenizer": GONE}


def _data(manifest: Manifest) -> Mapping[str, str]:
    """The local data files of a stage, by the names of its inputs."""
    text = manifest.values.get("data")
    if not isinstance(text, str) or not any(name.partition("/")[0] == "data" for name in manifest.inputs):
        return {}
    named = {f"data/{name}" if name else "data": path for name, path in named_data(text).items()}
    return {name: path for name, path in named.items() if Path(path).is_absolute()}
