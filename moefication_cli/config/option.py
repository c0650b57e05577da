"""What an option is, and the check of every value against it. Imports nothing heavy, so `--help` stays instant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from moefication_cli.errors import ConfigError, did_you_mean

INPUT, METHOD, OUTPUT, CONTROL = PANELS = ("Input", "Method", "Output", "Control")  # of the help, in this order
LAYERS = "layers"  # kind of an option: layer numbers, written 0,3-7 on the command line
MOST_LAYERS = 100_000  # a number above is a slip of the finger, and a range up to it would fill memory


def option(
    default: Any,
    help: str,
    *,
    compared: bool = True,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    names: tuple[str, ...] = (),
    kind: str = "",
    panel: str = METHOD,
) -> Any:
    """A dataclass field that is also a command-line option.

    help                the option's help text
    compared            False: recorded in the manifest but no reason to redo a stage (batch size, ...)
    minimum, maximum    bounds of the value, or of each item of a list; `above` is a bound it must exceed
    names               the option's spelling when it is not `--field-name`
    kind                `LAYERS` for lists of layer numbers
    panel               the panel of the help that shows it: INPUT, METHOD, OUTPUT or CONTROL
    """
    metadata = {"help": help, "compared": compared, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata=metadata | {"names": names, "kind": kind, "panel": panel})


def options_of(config: Any) -> list[Field[Any]]:
    """The option fields of a config class or instance, in order."""
    return [f for f in fields(config) if "help" in f.metadata]


def same_option(first: Field[Any], second: Field[Any]) -> bool:
    """Whether two config classes mean the same thing by a name: a command that has both then offers it once."""
    return first.name == second.name and first.metadata["help"] == second.metadata["help"]


def compared_values(config: Any) -> dict[str, Any]:
    """The values whose change makes a finished stage stale."""
    return {f.name: getattr(config, f.name) for f in options_of(config) if f.metadata["compared"]}


def recorded_values(config: Any) -> dict[str, Any]:
    """Every value, as a manifest records it."""
    return {f.name: getattr(config, f.name) for f in options_of(config)}


def flag(entry: Field[Any]) -> str:
    """How the option is written on the command line."""
    return str(entry.metadata["names"][0]) if entry.metadata["names"] else "--" + entry.name.replace("_", "-")


@dataclass(frozen=True)
class OptionType:
    """The type of an option, taken apart: `item` is that of a tuple's items, else of the value itself."""

    item: type
    choices: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False
    layers: bool = False  # the items are layer numbers, and 3-7 is five of them


@cache
def option_types(config: type) -> dict[str, OptionType]:
    """The types of a config class's options by name."""
    hints = get_type_hints(config)
    return {e.name: _taken_apart(hints[e.name], e.metadata["kind"] == LAYERS) for e in options_of(config)}


def _taken_apart(hint: Any, layers: bool) -> OptionType:
    parts = get_args(hint)
    optional = type(None) in parts and get_origin(hint) is not Literal
    if optional:
        (hint,) = (part for part in parts if part is not type(None))
    if get_origin(hint) is Union:
        raise TypeError(f"an option has one type, not {hint}")
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return OptionType(str, tuple(get_args(hint)), optional, many)
    return OptionType(hint, (), optional, many, layers)


class Options:
    """Base of every config: values are checked when one is made, whoever makes it.

    Raises ConfigError naming the option as the command line spells it.
    """

    def __post_init__(self) -> None:
        types = option_types(type(self))  # type: ignore[arg-type]
        for entry in options_of(self):
            value = _checked(entry, types[entry.name], getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """The config that a manifest recorded. Other versions knew other options: those are left out, or get their default.

        Versions before 0.2 recorded lists as the text of the command line.
        """
        types = option_types(cls)  # type: ignore[arg-type]
        known = {name: value for name, value in values.items() if name in types}
        for entry in options_of(cls):
            text = known.get(entry.name)
            if types[entry.name].many and isinstance(text, str):
                known[entry.name] = parse_list(text, flag(entry), types[entry.name])
        return cls(**known)


def parse_list(text: str, option: str, kind: OptionType) -> tuple[Any, ...]:
    """The items of a comma list. Raises ConfigError naming the option."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise ConfigError(f"{option} {text!r} is an empty list")
    if kind.layers:
        return _layer_numbers(pieces, option, text)
    if kind.item is str:
        return tuple(pieces)
    try:
        return tuple(kind.item(piece) for piece in pieces)
    except (ValueError, OverflowError):
        what, example = ("numbers", "0.1,0.2,0.3") if kind.item is float else ("counts", "1,8,64")
        raise ConfigError(f"{option} {text!r} is not a comma list of {what}", f"write e.g. {example}") from None


def _layer_numbers(pieces: list[str], option: str, text: str) -> tuple[int, ...]:
    chosen: set[int] = set()
    for piece in pieces:
        first, dash, last = piece.partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):
            raise ConfigError(f"{option} {text!r}: {piece!r} is not a layer number or range", "write e.g. 0,3-7")
        start, stop = int(ends[0]), int(ends[-1])
        if stop > MOST_LAYERS:
            raise ConfigError(f"{option} {text!r}: no model has so many layers", "write e.g. 0,3-7")
        chosen.update(range(start, stop + 1))
    if not chosen:
        raise ConfigError(f"{option} {text!r} names no layer", "write e.g. 0,3-7")
    return tuple(sorted(chosen))


def offered_options(configs: Sequence[type]) -> dict[str, Field[Any]]:
    """The options that several configs offer together, by name.

    Where two mean different things by a name, the first has it and the others keep their default.
    """
    offered: dict[str, Field[Any]] = {}
    for config in configs:
        for entry in options_of(config):
            offered.setdefault(entry.name, entry)
    return offered


def distribute(values: Mapping[str, Any], configs: Sequence[type]) -> list[Any]:
    """One instance of each config from values by option name, which may be left out. See `offered_options`."""
    offered = offered_options(configs)
    made = []
    for config in configs:
        own = [e.name for e in options_of(config) if e.name in values and same_option(e, offered[e.name])]
        made.append(config(**{name: values[name] for name in own}))
    return made


def list_text(values: tuple[Any, ...] | None) -> str | None:
    """A tuple as the command line writes it."""
    return None if values is None else ",".join(map(str, values))


def _checked(entry: Field[Any], kind: OptionType, value: Any) -> Any:
    if value is None and kind.optional:
        return None
    if kind.many:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{flag(entry)} takes a tuple in Python, not {value!r}")
        if not value:
            raise ConfigError(f"{flag(entry)} is an empty list")
        return tuple(_checked_item(entry, kind, item) for item in value)
    return _checked_item(entry, kind, value)


def _checked_item(entry: Field[Any], kind: OptionType, value: Any) -> Any:
    said = f"{flag(entry)} {value!r}"
    if kind.item is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.item:
        if kind.item is str and hasattr(value, "__fspath__"):
            return str(value)
        raise ConfigError(f"{said} is not of type {kind.item.__name__}")
    if kind.choices and value not in kind.choices:
        raise ConfigError(f"{said} is not one of {', '.join(kind.choices)}", did_you_mean(str(value), kind.choices))
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{said} holds a null character")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{said} is not a finite number")
    low, high, above = (entry.metadata[name] for name in ("minimum", "maximum", "above"))
    if low is not None and value < low:
        raise ConfigError(f"{said} is below {low:g}")
    if above is not None and not value > above:
        raise ConfigError(f"{said} is not above {above:g}")
    if high is not None and value > high:
        raise ConfigError(f"{said} is above {high:g}")
    return value
