"""Runs commands in this process, through the same error boundary as the console script."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from moefication_cli.cli.app import exit_code
from moefication_cli.cli.console import Console


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.strip().splitlines()
        assert len(lines) == 1, f"stdout is not one JSON object: {self.out[:300]!r}"
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value


class Runner:
    """`run("split", folder, "--json")` -> Outcome."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        words = [str(a) for a in arguments]
        code = exit_code(Console(json_mode="--json" in words), words)
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def ok(self, *arguments: object) -> dict[str, Any]:
        """A command that must succeed, under --json."""
        outcome = self(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        assert outcome.json["ok"] is True
        return outcome.json
