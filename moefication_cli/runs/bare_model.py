"""A run whose model is a file with weights alone: the folder that its stages read is made inside of the run directory."""

from pathlib import Path

from moefication_cli.config import RunModelConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.bare import write_folder
from moefication_cli.models.folder.permuted import is_side_file
from moefication_cli.runs.control import Control
from moefication_cli.store import jsonio
from moefication_cli.store.options import StageOptions
from moefication_cli.store.output import begin_output
from moefication_cli.store.rundir import RunDir

_WAIT = 600.0  # seconds, for another rank that makes the folder


def folder_of_file(run: RunDir, config: RunModelConfig, control: Control) -> Path | None:
    """RUN/source, made of the file `--model` and the folder `--model-config`; None where the model is no file.

    Made anew where one of them changed. Raises ConfigError where one is missing or they do not belong together.
    """
    weights, folder = Path(config.model or ""), Path(config.model_config or "")
    if not _is_file(weights):
        if config.model_config is None:
            return None
        raise ConfigError(f"--model-config is for a file with weights; {config.model} is none", "leave it out")
    if config.model_config is None or not folder.is_dir():
        raise ConfigError(
            f"{weights} holds weights alone" + (f", and {folder} is not a folder" if config.model_config else ""),
            "name the folder with its config.json and tokenizer: --model-config DIR",
        )
    made = run.root / "source"
    described = {path.name: run.hashes.sha256(path) for path in sorted(folder.iterdir()) if is_side_file(path)}
    inputs = {"weights": run.hashes.sha256(weights), "configuration": jsonio.digest(described)}
    if control.dry_run and not (made / "source.json").is_file():
        raise ConfigError(
            f"--dry-run writes nothing, and {made} is still to be made of {weights}",
            f"moefication split {run.root} --model {weights} --model-config {folder} makes it",
        )
    options = StageOptions({}, inputs=inputs)
    with begin_output(made, "source", options, _WAIT, run.hashes.sha256, renew=not control.dry_run) as output:
        if output.manifest is None:
            write_folder(weights, folder, output.folder, config.ffn)
            output.finish({})
            control.say(f"{made}: made of {weights} and {folder}")
    return made.resolve()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a path, for instance
        return False
