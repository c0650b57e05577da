"""How far a command is, on stderr: a bar with rate and time left, a plain line a minute at most, or JSON lines."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
ProgressName = Literal["auto", "plain", "json", "none"]
_PLAIN_INTERVAL = 60.0  # seconds between two lines where stderr is no terminal
_EVENT_INTERVAL = 1.0  # seconds between two events of a loop, its first and its last apart


class _Rate(ProgressColumn):
    """Items per second, or seconds per item where one takes longer."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed or 0.0))


class Reporter:
    """Shows loops on `console`, in the way that was asked for; `auto` is a bar on a terminal and plain elsewhere."""

    def __init__(
        self, console: RichConsole, wanted: ProgressName, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        able = console.is_terminal and not console.is_dumb_terminal
        self.mode = ("bar" if able else "plain") if wanted == "auto" else wanted
        self._console, self._clock = console, clock
        self._last_line = clock()  # of any loop: a stage of many short loops is no louder than one of a long one

    def track(self, items: Iterable[T], stage: str, total: int | None) -> Iterator[T]:
        """The items, unchanged."""
        if self.mode == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                yield from progress.track(items, total=total, description=stage)
        elif self.mode == "none":
            yield from items
        else:
            show = self._events(stage, total) if self.mode == "json" else self._lines(stage, total)
            done = 0
            for done, item in enumerate(items):
                show(done, False)
                yield item
                done += 1
            show(done, True)

    def event(self, event: str, **values: Any) -> None:
        """One JSON object, one line."""
        self._console.print(Text(json.dumps({"event": event, **values}, allow_nan=False)), soft_wrap=True)

    def _events(self, stage: str, total: int | None) -> Callable[[int, bool], None]:
        begun = self._clock()
        last = begun - _EVENT_INTERVAL

        def show(done: int, finished: bool) -> None:
            nonlocal last
            now = self._clock()
            if finished or now - last >= _EVENT_INTERVAL:
                last = now
                self.event("progress", stage=stage, done=done, total=total, seconds=round(now - begun, 3))

        return show

    def _lines(self, stage: str, total: int | None) -> Callable[[int, bool], None]:
        begun = self._clock()

        def show(done: int, finished: bool) -> None:
            now = self._clock()
            if finished or now - self._last_line < _PLAIN_INTERVAL:
                return
            self._last_line = now
            rate = done / (now - begun) if now > begun else 0.0
            said = [f"{stage}: {done}" + (f" of {total}" if total else ""), _rate(rate)]
            if total and rate:
                said.append(f"{_duration((total - done) / rate)} left")
            self._console.print(Text(", ".join(part for part in said if part)))

        return show


def _rate(per_second: float) -> str:
    if per_second <= 0:
        return ""
    return f"{per_second:.1f} a second" if per_second >= 1 else f"{_duration(1 / per_second)} each"


def _duration(seconds: float) -> str:
    """3.1 s, 4 min 5 s, 2 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
