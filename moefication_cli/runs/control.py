"""What a stage is given besides its run directory and its config, and what it returns.

A stage is a function `(RunDir, Config, Control) -> Result`. It raises, it never prints: `say` carries sentences for
people (stderr), `track` wraps the loop over layers or batches so that the command line can show progress.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moefication_cli.errors import ConfigError, RunAgainError
from moefication_cli.runs.ranks import Ranks

T = TypeVar("T")


class Track(Protocol):
    """Yields the items of `items` unchanged while showing how far the loop is."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]: ...


def _silent(message: str) -> None:
    """Say nothing."""


def _untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    return iter(items)


def stopping(track: Track, stop: Callable[[], bool]) -> Track:
    """`track` that raises RunAgainError in place of the next item once `stop` says so: what was begun is finished."""

    def until_stopped(items: Iterable[T]) -> Iterator[T]:
        for item in items:
            if stop():
                raise RunAgainError
            yield item

    def tracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        count = len(items) if total is None and isinstance(items, Sized) else total
        return track(until_stopped(items), description, count)

    return tracked


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Control:
    """How to run, as opposed to what to compute; see `config.ControlConfig` for the meaning of each."""

    device: str = "auto"
    seed: int = 0
    layers: tuple[int, ...] | None = None
    force: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    sources: dict[type, dict[str, str]] = field(default_factory=dict)  # config class -> option -> where it came from
    say: Callable[[str], None] = _silent
    track: Track = _untracked
    stop: Callable[[], bool] = _never  # whether somebody asks for an end after the present layer, shard or batch
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share this stage


@dataclass(frozen=True)
class Result:
    """What a command prints: rows for the table, and everything under `--json`."""

    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    up_to_date: bool = False
    notes: list[str] = field(default_factory=list)  # sentences under the table
    exit_code: int = 0  # of a command that answers by it (`status --exit-code`)

    @property
    def path(self) -> Path:
        """The folder that the command wrote, where it says so: RUN/model of `apply_experts` and `convert`."""
        return Path(self.payload["path"])


def chosen_layers(layers: Sequence[int] | None, num_layers: int, option: str = "--layers") -> list[int] | None:
    """Layer numbers in order; None means all. Raises ConfigError for one that the model has not."""
    if layers is None:
        return None
    if any(not 0 <= layer < num_layers for layer in layers):
        text = ",".join(map(str, layers))
        raise ConfigError(f"{option} {text}: this model has FFN layers 0 to {num_layers - 1}")
    return sorted(set(layers))
