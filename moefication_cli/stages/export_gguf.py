"""export --to gguf: one file that llama.cpp runs, checked against the converted model where llama.cpp is here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moefication_cli.config import ExportConfig
from moefication_cli.errors import UnavailableError
from moefication_cli.export.check import compare
from moefication_cli.export.engine import GET_ENGINE, call_engine, compare_engine, has_engine
from moefication_cli.export.gguf_file import require_gguf, write_gguf
from moefication_cli.export.gguf_shape import BLOCK, choose_host, filled
from moefication_cli.export.record import file_made_before, write_file_record
from moefication_cli.export.write import common_shape, write_native
from moefication_cli.models.loading import load_tokenizer
from moefication_cli.runs.control import Control, Result
from moefication_cli.stages.exported import (
    Converted,
    check_tokens,
    is_half,
    open_converted,
    refuse_unless_forced,
    router_spreads,
    work_folder,
)
from moefication_cli.store import files
from moefication_cli.store.rundir import RunDir

_TEXTS = 16  # whose tokens are compared


def export_gguf(run: RunDir, config: ExportConfig, control: Control) -> Result:
    """Write RUN/model as a GGUF file: as a native checkpoint first, which is checked as `export` does, then converted.

    The same file again, unchanged, is up to date.
    Raises ConfigError (a shape that llama.cpp cannot run, a tokenizer without a counterpart, a file that is there),
    UnavailableError without the package gguf, or for q4_k without llama.cpp; and what `export` raises.
    """
    require_gguf()
    quantise = config.quantise or "f16"
    if quantise == "q4_k" and not has_engine():
        raise UnavailableError("q4_k is quantised by llama.cpp, which is not here", GET_ENGINE)
    assert config.out is not None
    out = _target(run, Path(config.out), quantise)
    kind, notes = f"gguf {quantise}", [f"llama-cli -m {out} runs it"]
    source = open_converted(run, "gguf", control)
    done = Result("export", [], {"path": str(out)}, up_to_date=True, notes=notes)
    if file_made_before(out, kind, source.made.digest):
        return done
    settings = source.checkpoint.config.to_dict()
    shape = common_shape(source.checkpoint, source.moe, "gguf")
    host = choose_host(settings, shape, quantise)
    whole = filled(shape, host, BLOCK[quantise])
    if whole.expert_size > shape.expert_size:
        control.say(f"experts of {shape.expert_size} neurons are filled with zeros to {whole.expert_size}")
    if not has_engine():
        control.say(
            f"warning: llama.cpp is not here, so that it is not checked against the converted model; {GET_ENGINE}"
        )
    with work_folder(run, out) as partial:
        if file_made_before(out, kind, source.made.digest):  # by another process, in the meantime
            return done
        native, made = partial / "native", partial / "model.gguf"
        spreads = router_spreads(source, control)
        write_native(source.checkpoint, source.moe, host, spreads, native, BLOCK[quantise])
        batches = check_tokens(run, source, control)
        stock = compare(source.made.path, native, source.moe, batches)
        refuse_unless_forced(stock.faults(is_half(source.checkpoint)), control)
        about = f"mixture of experts made by moefication, {shape.num_experts} experts of {shape.expert_size} neurons"
        if quantise == "q4_k":
            write_gguf(native, "f32", partial / "whole.gguf", out.stem, about)
            call_engine("quantise", source=str(partial / "whole.gguf"), target=str(made))
        else:
            write_gguf(native, quantise, made, out.stem, about)
        checked = _check(source, made, batches, quantise, control) if has_engine() else {}
        write_file_record(out, made, kind, source.made.digest)
        with files.writing(out):
            files.replace(made, out)
    row = {
        "format": kind, "architecture": host, "megabytes": out.stat().st_size / 1e6, **stock.row(), **checked
    }  # fmt: skip
    return Result("export", [row], {"path": str(out), "checked": bool(checked)}, notes=notes)


def _target(run: RunDir, out: Path, quantise: str) -> Path:
    """The file to write: `out` itself where it ends with .gguf, else one in that folder, named after the model."""
    if out.suffix != ".gguf":
        name = (run.info.model or "model").rstrip("/").rpartition("/")[2]
        out = out / f"{name}-moe-{quantise}.gguf"
    return out


def _check(source: Converted, file: Path, batches: Sequence[Tensor], quantise: str, control: Control) -> dict[str, Any]:
    """Log-probabilities of llama.cpp beside ours, and its tokens of the same text. Raises MoEficationError where they differ."""
    texts: list[tuple[str, list[int]]] = []
    if source.activations is not None:
        words = load_tokenizer(source.checkpoint.source, source.checkpoint.trust_remote_code)
        for ids_BL in batches[:_TEXTS]:
            text = words.decode(ids_BL[0], skip_special_tokens=True)
            texts.append((text, words(text)["input_ids"]))
    found = compare_engine(source.made.path, file, batches, texts)
    refuse_unless_forced(found.faults(quantise), control)
    return {f"llama_cpp_{name}": value for name, value in found.row().items() if name != "tokens"}
