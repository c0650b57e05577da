"""config: the options of a run or of a command, as TOML that `--config` reads. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moefication_cli import config as configs
from moefication_cli.config import options_of
from moefication_cli.errors import ConfigError, MissingArtifactError, did_you_mean
from moefication_cli.runs.control import Result
from moefication_cli.store.artifact import COMMANDS, StagePaths, stages_in
from moefication_cli.store.rundir import RunDir

Tables = dict[str, dict[str, tuple[Any, str]]]  # command -> option -> (value, where it came from)
OPTIONS: dict[str, type] = {
    "collect-activations": configs.CollectConfig,
    "build-graph": configs.GraphConfig,
    "split": configs.SplitConfig,
    "train-router": configs.RouterConfig,
    "apply": configs.ApplyConfig,
    "eval": configs.EvalConfig,
    "run": configs.RunConfig,
    "tune": configs.TuneConfig,
    "finetune": configs.FinetuneConfig,
    "relufy": configs.RelufyConfig,
    "export": configs.ExportConfig,
    "bench": configs.BenchConfig,
    "demo": configs.DemoConfig,
}
_NOT_OPTIONS = {"seed"}  # of every stage, recorded with its own


def show_config(target: str) -> Result:
    """TOML, one table per command, with where each value came from: of the stages of a run, or a command's defaults.

    Raises ConfigError for a name that is neither, MissingArtifactError for a run without stages.
    """
    if target in OPTIONS:
        entries = {e.name: (e.default, "default") for e in options_of(OPTIONS[target])}
        return _result({target: entries})
    root = Path(target)
    if not (root / "run.json").is_file():
        hint = did_you_mean(target, OPTIONS, f"commands are {', '.join(OPTIONS)}")
        raise ConfigError(f"{target} is neither a run directory nor a command with options", hint)
    tables = recorded_tables(RunDir(root), stages_in(root))
    if not tables:
        raise MissingArtifactError(f"{root}: nothing has been made here yet", f"moefication run {root} --model MODEL")
    return _result(tables)


def recorded_tables(run: RunDir, stages: Iterable[str]) -> Tables:
    """The options of these stages of a run as their manifests record them; the first one names the model."""
    tables: Tables = {}
    for stage in stages:
        kind = stage.partition("/")[0]
        manifest, command = StagePaths(run.root, stage).read_manifest_or_none(), COMMANDS[kind]
        if manifest is None or command not in OPTIONS or kind in ("refined", "baseline", "harness"):
            continue
        known = {e.name for e in options_of(OPTIONS[command])} | _NOT_OPTIONS
        tables[command] = {
            name: (entry["value"], entry["source"]) for name, entry in manifest.config.items() if name in known
        }
    first = next(iter(tables.values()), {})
    if run.info.model is not None and "model" in first:
        first["model"] = (run.info.model, "run.json")
    return tables


def _result(tables: Tables) -> Result:
    values = {command: {name: value for name, (value, _) in entries.items()} for command, entries in tables.items()}
    sources = {command: {name: source for name, (_, source) in entries.items()} for command, entries in tables.items()}
    return Result("config", [], {"config": values, "sources": sources}, notes=toml_lines(tables))


def toml_lines(tables: Tables) -> list[str]:
    """The tables as TOML, a comment behind each value that is not a default."""
    lines = []
    for command, entries in tables.items():
        lines += [f"[{command}]"]
        for name, (value, source) in entries.items():
            key = name.replace("_", "-")
            if value is None:
                lines.append(f"# {key} is not set")
            else:
                lines.append(f"{key} = {_toml(value)}" + ("" if source == "default" else f"  # {source}"))
        lines.append("")
    return lines


def _toml(value: Any) -> str:
    """A string, number, bool or list of them; JSON writes these as TOML reads them."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
