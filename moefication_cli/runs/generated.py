"""A run without data: `--data generated:N` has the dense language model write its own calibration text, RUN/generated.

The file is data like any other from then on: its content is an input of the stages that read it.
"""

import json
from itertools import count
from pathlib import Path

from moefication_cli.config import CollectConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.heads import checked_task
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.sampling import sample_texts
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import load_whole
from moefication_cli.runs.inputs import RunModel, layer_seed
from moefication_cli.store import files, jsonio
from moefication_cli.store.manifest import BASE_MODEL
from moefication_cli.store.options import StageOptions
from moefication_cli.store.output import begin_output
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import GENERATED
from moefication_cli.tasks.encoding import length_limit

_WAIT = 86_400.0  # seconds, for another rank that writes the text
_MOST_TEXTS = 64  # written at the same time


def generated_data(run: RunDir, model: RunModel, config: CollectConfig, control: Control) -> str | None:
    """The data to read: `config.data`, or for `generated:N` the file RUN/generated/text.jsonl, of about N tokens.

    Written anew where N, the seed or the model changed; a killed command goes on at the next 64 texts. In a dry run nothing is
    written. Raises ConfigError: N is no number, the model is no language model.
    """
    if config.data is None or not config.data.startswith(GENERATED):
        return config.data
    size = config.data.removeprefix(GENERATED).replace("_", "")
    if not (size.isascii() and size.isdigit() and int(size) > 0):
        raise ConfigError(
            f"--data {config.data}: {size!r} is no number of tokens", "write e.g. --data generated:200000"
        )
    ref = model.checkpoint.source.ref
    if (task := checked_task(model.checkpoint.config, config.task or run.info.task, ref)) != "lm":
        raise ConfigError(
            f"--data {config.data}: only a causal language model can write its own text, and this is a {task} model",
            "name data with --data",
        )
    folder = run.root / "generated"
    text = folder / "text.jsonl"
    if control.dry_run:
        return str(text.absolute())
    num_tokens = int(size)
    wanted = {"tokens": num_tokens, "seed": control.seed, "max_length": config.max_length}
    options = StageOptions(wanted, inputs={BASE_MODEL: model.fingerprint}, device=str(model.device))
    with begin_output(folder, "generated", options, _WAIT, run.hashes.sha256, renew=True) as output:
        if output.manifest is None:
            control.say(f"{ref} writes its own calibration text, about {num_tokens} tokens: {text}")
            loaded = load_whole(run, model, "lm", config.dtype, output.scratch / "offload" if config.offload else None)
            lines = _lines(loaded, num_tokens, config.max_length, output.scratch, control)
            files.atomic_write(output.folder / text.name, "".join(lines).encode())
            output.finish({})
    return str(text.resolve())


def _lines(loaded: LoadedModel, num_tokens: int, max_length: int | None, scratch: Path, control: Control) -> list[str]:
    """The texts as lines of JSON; each block of texts is kept in `scratch` as soon as it is written."""
    length = length_limit(loaded.config, loaded.tokenizer, max_length)
    texts = max(1, min(_MOST_TEXTS, num_tokens // length))
    lines: list[str] = []
    for number in control.track(count(), "generate"):
        path = scratch / f"texts_{number:05d}.json"
        if not path.is_file():
            found, written = sample_texts(loaded, texts, length, layer_seed(control.seed, number))
            jsonio.write(path, {"texts": found, "tokens": written})
        held = jsonio.read_object(path)
        if not held["tokens"]:
            raise ConfigError(
                "the model ends every text at once: it cannot write its own data", "name real data with --data"
            )
        lines += [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held["texts"]]
        num_tokens -= held["tokens"]
        if num_tokens <= 0:
            break
    return lines
