"""export: write a converted model as a native MoE checkpoint, which stock transformers and other engines load."""

from pathlib import Path

from moefication_cli.config import ExportConfig
from moefication_cli.errors import ConfigError
from moefication_cli.export.card import model_card
from moefication_cli.export.check import compare
from moefication_cli.export.record import made_before, write_record
from moefication_cli.export.write import write_native
from moefication_cli.runs.control import Control, Result
from moefication_cli.stages.export_gguf import export_gguf
from moefication_cli.stages.exported import (
    check_tokens,
    is_half,
    open_converted,
    refuse_unless_forced,
    router_spreads,
    work_folder,
)
from moefication_cli.store import files
from moefication_cli.store.rundir import RunDir


def export(run: RunDir, config: ExportConfig, control: Control = Control()) -> Result:
    """Write RUN/model in the format `to` to the folder `out`, run both on calibration text, and keep it if they agree.

    A folder that holds this very export is up to date.
    Raises ConfigError (a model or plan that the format cannot hold, a folder with files in it), MissingArtifactError,
    CorruptArtifactError, LockedError, MoEficationError where the exported model does not do what the converted one does.
    """
    if config.to is None or config.out is None:
        raise ConfigError("export needs a format and a folder", "--to mixtral --out DIR")
    if config.to == "gguf":
        return export_gguf(run, config, control)
    if config.quantise is not None:
        raise ConfigError(
            f"{config.to} has no --quantise", "--to gguf has; or quantise what is written with another tool"
        )
    out = Path(config.out)
    source = open_converted(run, config.to, control)
    notes = [f"{out} loads with AutoModelForCausalLM.from_pretrained, without this package"]
    done = Result("export", [], {"path": str(out)}, up_to_date=True, notes=notes)
    if made_before(out, config.to, source.made.digest):  # without a lock: what is there may be read-only
        return done
    with work_folder(run, out) as partial:
        if made_before(out, config.to, source.made.digest):  # by another process, in the meantime
            return done
        spreads = router_spreads(source, control)
        written = write_native(source.checkpoint, source.moe, config.to, spreads, partial)
        found = compare(source.made.path, partial, source.moe, check_tokens(run, source, control))
        refuse_unless_forced(found.faults(is_half(source.checkpoint)), control)
        card = model_card(run, source.made, config.to, found)
        files.atomic_write(partial / "README.md", card.encode())
        write_record(partial, config.to, source.made.digest)
        if out.exists():
            out.rmdir()
        with files.writing(out):
            files.replace(partial, out)
    size = sum((out / path.name).stat().st_size for path in written)
    row = {"format": config.to, "megabytes": size / 1e6, **found.row()}
    return Result("export", [row], {"path": str(out)}, notes=notes)
