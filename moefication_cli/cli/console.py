"""What people and scripts see: results on stdout (a table, or one JSON object), conversation on stderr."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from moefication_cli.cli.progress import ProgressName, Reporter
from moefication_cli.errors import MoEficationError
from moefication_cli.runs.control import Result

T = TypeVar("T")
_TITLES = {
    "ffn_flops_fraction": "FFN FLOPs",
    "active_fraction": "active",
    "agreement": "agree",
    "num_neurons": "F",
    "d_model": "d",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line ends
_PIPE_WIDTH = 200  # columns of a table where stdout is no terminal


class Console:
    """One per command: knows whether the user wants JSON and whether stderr is a terminal."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, progress: ProgressName = "auto") -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self._out = RichConsole(highlight=False, soft_wrap=True)
        if not self._out.is_terminal:
            self._out.width = _PIPE_WIDTH
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._reporter = Reporter(self._err, progress)

    def say(self, message: str) -> None:
        """A sentence about what is happening (which path was taken, what was guessed)."""
        if self.quiet and not message.startswith("warning"):
            return
        if self._reporter.mode == "json":
            self._reporter.event("message", text=message)
        else:
            self._err.print(_text(message))

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """The items, unchanged, while stderr shows how far they are."""
        if self.quiet:
            return iter(items)
        count = total if total is not None or not isinstance(items, Sized) else len(items)
        return self._reporter.track(items, description, count)

    def result(self, result: Result) -> None:
        """Print a command's result on stdout."""
        if self.json_mode:
            self.json({"ok": True, "command": result.command, "up_to_date": result.up_to_date, "rows": result.rows}
                      | result.payload)  # fmt: skip
            return
        if result.up_to_date:
            self.say(f"{result.command}: up to date")
        if result.rows:
            self._out.print(_table(result.rows))
        for note in result.notes:
            self._out.print(_text(note))

    def error(self, error: MoEficationError) -> None:
        """One message on stderr; under --json the object on stdout as well."""
        self._err.print(_text(f"error: {error.message}"))
        if error.hint:
            self._err.print(_text(f"hint: {error.hint}"))
        if self.json_mode:
            details = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            self.json({"ok": False, "error": details})

    def json(self, value: dict[str, Any]) -> None:
        """Exactly one strict JSON object: no NaN, keys sorted."""
        sys.stdout.write(json.dumps(_finite(value), sort_keys=True, allow_nan=False) + "\n")
        sys.stdout.flush()


def _text(message: str) -> Text:
    """A message as it is shown: what files and other people's records put into it cannot steer the terminal."""
    return Text(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name for name in names if all(isinstance(row.get(name), int | float | None) for row in rows)}
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(
            _TITLES.get(name, name.replace("_", " ")), justify="right" if name in numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_text(_cell(row.get(name))) for name in names))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
