"""Recipes: a whole run as one file, options and seeds of every stage and digests of what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moefication_cli import __version__
from moefication_cli import config as configs
from moefication_cli.config import CollectConfig, ControlConfig, EvalConfig, options_of
from moefication_cli.config.toml import read_tables
from moefication_cli.errors import ConfigError, MissingArtifactError, did_you_mean
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.data import data_inputs
from moefication_cli.runs.inputs import open_model
from moefication_cli.stages.show_config import Tables, recorded_tables, toml_lines
from moefication_cli.store.manifest import BASE_MODEL
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.data_files import named_data

SCHEMA = "moefication/recipe@1"
_CLASSES: dict[str, type[configs.Options]] = {
    "collect-activations": configs.CollectConfig,
    "build-graph": configs.GraphConfig,
    "split": configs.SplitConfig,
    "train-router": configs.RouterConfig,
    "apply": configs.ApplyConfig,
    "finetune": configs.FinetuneConfig,
    "eval": configs.EvalConfig,
}
_APART = ("recipe", "digests")  # tables that are no command's
_MODEL = ("model", "revision", "ffn")
_SAYS = {
    "model": ("the model", "model", CollectConfig),
    "tokenizer": ("the tokenizer of the model", "model", CollectConfig),
    "data": ("the calibration data", "data", CollectConfig),
    "eval-data": ("the evaluation data", "eval_data", configs.RunConfig),
}
C = TypeVar("C", bound=configs.Options)


@dataclass(frozen=True)
class Recipe:
    """The file as read: options by command, and digests of model, tokenizer and data by name."""

    path: str
    tables: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]

    def config(self, command: str, asked: C, control: Control) -> C:
        """`asked` where the command line, the environment or a configuration file say something, else the recipe."""
        table = {name: value for name, value in self.tables.get(command, {}).items() if name != "seed"}
        said = {name: getattr(asked, name) for name in said_options(control, type(asked)) if name != "seed"}
        if not table:
            return asked
        try:
            return type(asked).recorded({**table, **said})
        except ConfigError as error:
            raise ConfigError(f"--recipe {self.path}: [{command}] {error.message}", error.hint) from None

    def control(self, command: str, control: Control) -> Control:
        """With the seed of the command's table, unless another was asked for; values from the recipe are said to be."""
        table, kind = self.tables.get(command, {}), _CLASSES[command]
        seed = table.get("seed", control.seed)
        if "seed" in said_options(control, ControlConfig):
            seed = control.seed
        sources = dict.fromkeys(table, "recipe") | said_options(control, kind)
        return replace(control, seed=seed, sources=control.sources | {kind: sources})


def said_options(control: Control, config: type) -> dict[str, str]:
    """The options of a config that somebody chose, and where."""
    return {name: source for name, source in control.sources.get(config, {}).items() if source != "default"}


def read_recipe(path: str) -> Recipe:
    """Raises ConfigError for a file that cannot be read, another schema, unknown tables, options and digests."""
    tables = read_tables(path, "--recipe")
    head, digests = tables.pop("recipe", {}), tables.pop("digests", {})
    if head.get("schema", SCHEMA) != SCHEMA:
        raise ConfigError(f"--recipe {path}: its schema is {head['schema']!r}, not {SCHEMA}", "update this program")
    for command, table in tables.items():
        if command not in _CLASSES:
            raise ConfigError(
                f"--recipe {path}: [{command}] is no stage of run", did_you_mean(command, [*_CLASSES, *_APART])
            )
        known = [e.name for e in options_of(_CLASSES[command])] + ["seed"]
        if unknown := sorted(table.keys() - set(known)):
            raise ConfigError(
                f"--recipe {path}: `{unknown[0]}` is no option of {command}", did_you_mean(unknown[0], known)
            )
        ControlConfig(**{name: value for name, value in table.items() if name == "seed"})
    digests = {name.replace("eval_data", "eval-data", 1): value for name, value in digests.items()}
    for name, value in digests.items():
        if name.partition("/")[0] not in _SAYS or not isinstance(value, str):
            raise ConfigError(f"--recipe {path}: [digests] {name} is not the digest of {', '.join(_SAYS)}")
    return Recipe(path, tables, digests)


def check_digests(recipe: Recipe, run: RunDir, collect: CollectConfig, evaluate: EvalConfig, control: Control) -> None:
    """Refuse a model or data whose content is not the recipe's, unless it was named anew.

    Raises ConfigError: which, and how to go on.
    """
    if not recipe.digests:
        return
    model = open_model(run, collect, control)
    today, refs = {"model": model.fingerprint}, {"model": model.checkpoint.source.ref, "data": collect.data}
    refs["tokenizer"] = refs["model"]
    if collect.data is not None:
        today |= data_inputs(run, model, collect)
    for name, data in named_data(evaluate.data).items() if evaluate.data else ():
        key = f"eval-data/{name}" if name else "eval-data"
        today[key], refs[key] = data_inputs(run, model, replace(evaluate, data=data))["data"], data
    for name, digest in recipe.digests.items():
        if today.get(name, digest) == digest:
            continue
        what, option, config = _SAYS[name.partition("/")[0]]
        message = f"{what} {refs[name]} is not what the recipe {recipe.path} was made with: its content differs"
        flag = "--" + option.replace("_", "-")
        if option not in said_options(control, config):
            raise ConfigError(message, f"put the right files there, or name with {flag} what shall be used instead")
        control.say(f"note: {message} (named with {flag})")


def print_recipe(run: RunDir) -> Result:
    """The recipe of a run, as lines of TOML: of RUN/model and what it was made from, and of one evaluation.

    Raises MissingArtifactError where nothing has been made, StaleArtifactError where stages do not fit together.
    """
    stages = _stages(run)
    tables = recorded_tables(run, stages)
    if not tables:
        raise MissingArtifactError(f"{run.root}: nothing has been made here yet", f"moefication run {run.root}")
    digests: dict[str, tuple[Any, str]] = {}
    for stage in stages:
        for name, digest in run.require(stage).manifest.inputs.items():
            kind, slash, label = name.partition("/")
            if kind == "data" and stage.startswith("eval"):
                digests[f"eval-data{slash}{label}"] = (digest, "default")
            elif name in (BASE_MODEL, "data", "tokenizer"):
                digests["model" if name == BASE_MODEL else name] = (digest, "default")
    _complete(run, tables)
    head = {"schema": (SCHEMA, "default"), "made_by": (f"moefication {__version__}", "default")}
    whole = {"recipe": head, **tables, "digests": digests}
    values = {table: {name: value for name, (value, _) in entries.items()} for table, entries in whole.items()}
    return Result("run", [], {"recipe": values}, notes=toml_lines(whole))


def _stages(run: RunDir) -> list[str]:
    """What RUN/model was made from, in order; of several evaluations `default`, or the first."""
    made = run.manifest("model")
    values = {} if made is None else made.values
    routers, evaluations = run.names("router"), run.names("eval")
    found = ["activations", "graph", "split"]
    split = run.manifest("split")
    if split is not None and "graph" not in split.inputs:
        found.remove("graph")
    routed = [name.partition("/")[2] for name in ({} if made is None else made.inputs) if name.startswith("router/")]
    found += [f"router/{name}" for name in (routed or routers)[:1]]
    if values.get("finetuned") is not None:
        found.append(f"finetuned/{values['finetuned']}")
    found.append("model")
    found += [f"eval/{name}" for name in sorted(evaluations, key=lambda name: name != "default")[:1]]
    return [stage for stage in found if run.manifest(stage) is not None]


def _complete(run: RunDir, tables: Tables) -> None:
    """What run.json knows goes to the first stage, the model to it alone; what `run` would choose is as it was."""
    known, first = run.info.options(), next(iter(tables))
    for name, (value, _) in tables[first].items():
        if value is None and known.get(name) is not None:
            text: Any = known[name]
            if name in ("label_words", "text_field") and isinstance(text, str):
                text = text.split(",")
            tables[first][name] = (text, "run.json")
    for command in tables.keys() - {first}:
        for name in _MODEL:
            tables[command].pop(name, None)
    if "apply" in tables and tables["apply"]["refine"][0] is None:  # `apply` does none, `run` would
        tables["apply"]["refine"] = (0, "default")
