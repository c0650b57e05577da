"""Turns the dataclasses of `config.py` into Typer options, so that a name or a default is written once."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, get_type_hints

import typer

from moefication_cli.cli.complete import COMPLETE
from moefication_cli.cli.guide import GUIDE
from moefication_cli.config import ControlConfig, options_of, same_option
from moefication_cli.config.option import (
    CONTROL,
    PANELS,
    OptionType,
    distribute,
    flag,
    list_text,
    offered_options,
    option_types,
    parse_list,
)
from moefication_cli.config.toml import read_tables
from moefication_cli.errors import ConfigError, did_you_mean

ENV_PREFIX = "MOEFICATION_"
_SOURCES = {
    "COMMANDLINE": "command line",
    "ENVIRONMENT": "environment",
    "DEFAULT_MAP": "config file",
    "DEFAULT": "default",
}

Body = Callable[..., Any]  # (run directory or model argument, one instance per config class, where values came from)
Sources = dict[type, dict[str, str]]  # config class -> option -> command line, environment, config file or default


def register(
    app: typer.Typer,
    name: str,
    configs: Sequence[type],
    body: Body,
    *,
    argument: str = "run",
    argument_help: str = "Run directory",
    argument_default: Any = ...,
    second: tuple[str, str] | None = None,
    many: bool = False,
    without: Collection[str] = (),
) -> None:
    """Add the command `name` whose options are the fields of `configs`, and of ControlConfig but those in `without`.

    Stages that share a name and its help share the option. Where the help differs it is another option: the first config
    has it, the others keep their default (`run --batch-size` is not the batch size routers are trained with).
    `many` takes one argument or more, as a list.
    `second` is the name and the help of an argument after it that may be left out, and then is "".
    `body` gets the arguments, one instance of each config class, a ControlConfig and where each value came from.
    """
    arguments = {argument: _argument(argument, argument_help, argument_default, many)}
    if second is not None:
        arguments[second[0]] = _argument(*second, "")
    parameters = [*arguments.values(), _context(), _config_file(name)]
    everything = (*configs, ControlConfig)
    offered = {n: e for n, e in offered_options(everything).items() if n != argument and n not in without}
    kinds: dict[str, OptionType] = {}
    for config in everything:
        hints, types = get_type_hints(config), option_types(config)
        for entry in options_of(config):
            if offered.get(entry.name) is entry and entry.name not in kinds:
                kinds[entry.name] = types[entry.name]
                parameters.append(_option(entry, hints[entry.name], types[entry.name]))

    parameters.sort(key=_panel_number)

    def command(**values: Any) -> None:
        context = values["context"]
        instances = distribute(
            {name: _value(entry, kinds[name], values[name]) for name, entry in offered.items()}, everything
        )
        sources: Sources = {}
        for config in everything:
            own = {e.name for e in options_of(config) if e.name in offered and same_option(e, offered[e.name])}
            asked = own | ({"seed"} & offered.keys())
            sources[config] = {key: _SOURCES.get(source_name(context, key), "default") for key in asked}
        body(*(values[name] for name in arguments), *instances, sources)

    command.__doc__ = body.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    guide = GUIDE[name]
    app.command(name, rich_help_panel=guide.panel, epilog=f"Example: moefication {guide.example}")(command)


def _panel_number(parameter: inspect.Parameter) -> int:
    """Where a parameter's panel stands in the help; arguments first."""
    info = getattr(parameter.annotation, "__metadata__", (None,))[0]
    panel = getattr(info, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def source_name(context: typer.Context, key: str) -> str:
    """COMMANDLINE, ENVIRONMENT, DEFAULT_MAP or DEFAULT."""
    source = context.get_parameter_source(key)
    return "DEFAULT" if source is None else str(source.name)


def _value(entry: Any, kind: OptionType, value: Any) -> Any:
    """What the config is given for an option: a tuple where the command line has a comma list."""
    if not kind.many or value is None:
        return value
    return parse_list(value, flag(entry), kind)


def _option(entry: Any, hint: Any, kind: OptionType) -> inspect.Parameter:
    spelling, default = flag(entry), entry.default
    if hint is bool:
        spelling += "/--no-" + entry.name.replace("_", "-") if entry.default else ""
    if kind.many:
        hint, default = (str | None if kind.optional else str), list_text(entry.default)
    info = typer.Option(
        *(entry.metadata["names"] or (spelling,)),
        help=entry.metadata["help"],
        min=None if kind.many else entry.metadata["minimum"],
        max=None if kind.many else entry.metadata["maximum"],
        envvar=ENV_PREFIX + entry.name.upper(),
        show_envvar=False,
        rich_help_panel=entry.metadata["panel"],
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(entry.name, keyword, default=default, annotation=Annotated[hint, info])


def _argument(name: str, help: str, default: Any, many: bool = False) -> inspect.Parameter:
    kind: Any = list[str] if many else str
    annotation = Annotated[kind, typer.Argument(help=help, metavar=name.upper(), autocompletion=COMPLETE.get(name))]
    empty = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=annotation)


def _context() -> inspect.Parameter:
    return inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def _config_file(command: str) -> inspect.Parameter:
    def read(context: typer.Context, value: str | None) -> str | None:
        if value is not None:
            tables = read_config(value)
            check_tables(tables, context, value)
            context.default_map = {**(context.default_map or {}), **tables.get(command, {})}
        if context.default_map:  # of this file, or of `moefication --config FILE COMMAND`
            check_keys(context, command, value or str(context.find_root().params.get("config")))
        return value

    info = typer.Option(
        "--config", help="TOML file with defaults, one table per command", is_eager=True, callback=read,
        envvar=ENV_PREFIX + "CONFIG", show_envvar=False, rich_help_panel=CONTROL,
    )  # fmt: skip
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("config", kind, default=None, annotation=Annotated[str | None, info])


def read_config(path: str) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, values as the command line has them. Raises ConfigError."""
    tables = read_tables(path, "--config")
    return {name: {key: _as_text(value) for key, value in table.items()} for name, table in tables.items()}


def _as_text(value: Any) -> Any:
    """A TOML array as the comma list of the command line."""
    return list_text(tuple(value)) if isinstance(value, list) else value


def check_keys(context: typer.Context, command: str, path: str) -> None:
    """Unknown keys in a config file are a mistake, not a default."""
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(set(context.default_map or {}) - known)
    if unknown:
        options = ", ".join(sorted(name for name in known if name not in ("context", "config") and name))
        hint = did_you_mean(unknown[0], known, f"its options are {options}")
        raise ConfigError(f"--config {path}: `{unknown[0]}` is no option of {command}", hint)


def check_tables(tables: Collection[str], context: typer.Context, path: str) -> None:
    """A table that is nearly the name of a command is a slip; other tables are none of our business."""
    commands = getattr(context.find_root().command, "commands", {})
    for table in tables:
        if table not in commands and (hint := did_you_mean(table, commands)):
            raise ConfigError(f"--config {path}: [{table}] is no command", hint)
