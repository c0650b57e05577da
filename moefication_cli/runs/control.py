"""What a stage is given besides its run directory and its config, and what it returns.

A stage is a function `(RunDir, Config, Control) -> Result`. It raises, it never prints: `say` carries sentences for
people (stderr), `track` wraps the loop over layers or batches so that the command line can show progress.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from moefication_cli.errors import ConfigError
from moefication_cli.runs.ranks import Ranks

T = TypeVar("T")


class Track(Protocol):
    """Yields the items of `items` unchanged while showing how far the loop is."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]: ...


def _silent(message: str) -> None:
    """Say nothing."""


def _untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    return iter(items)


@dataclass(frozen=True)
class Control:
    """How to run, as opposed to what to compute; see `config.ControlConfig` for the meaning of each."""

    device: str = "auto"
    seed: int = 0
    layers: str | None = None
    force: bool = False
    dry_run: bool = False
    sources: dict[type, dict[str, str]] = field(default_factory=dict)  # config class -> option -> where it came from
    say: Callable[[str], None] = _silent
    track: Track = _untracked
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share this stage


@dataclass(frozen=True)
class Result:
    """What a command prints: rows for the table, and everything under `--json`."""

    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    up_to_date: bool = False
    notes: list[str] = field(default_factory=list)  # sentences under the table


def parse_layers(text: str | None, num_layers: int) -> list[int] | None:
    """`0,3-7` as a sorted list of layer numbers; None means all. Raises ConfigError for what is not there."""
    if text is None:
        return None
    chosen: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--layers {text!r}: {piece!r} is not a layer number or range", "write e.g. 0,3-7")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    beyond = [i for i in chosen if i >= num_layers]
    if beyond or not chosen:
        raise ConfigError(f"--layers {text!r}: this model has FFN layers 0 to {num_layers - 1}")
    return sorted(chosen)


def parse_fractions(text: str, option: str = "--fractions") -> list[float]:
    """`0.1,0.2` as numbers in (0, 1]. Raises ConfigError naming the option."""
    try:
        values = [float(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a comma list of numbers", "write e.g. 0.1,0.2,0.3") from None
    if not values or any(not 0 < value <= 1 for value in values):
        raise ConfigError(f"{option} {text!r}: every fraction must be above 0 and at most 1")
    return values
