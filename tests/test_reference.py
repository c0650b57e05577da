"""artifacts/reference.md is what the options are today, and its commands parse."""

import os
import re
import subprocess
import sys
from pathlib import Path

from test_readme import commands, parse
from typer.main import get_command

from moefication_cli.cli.app import app

ROOT = Path(__file__).parents[1]
MAKE = f"{sys.executable} -m moefication_cli.cli.reference > artifacts/reference.md"


def test_the_reference_is_current_and_made_without_torch() -> None:
    code = "import sys; from moefication_cli.cli.reference import reference; print(reference(), end='')\n"
    code += "assert 'torch' not in sys.modules"
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    ).stdout
    assert made == (ROOT / "artifacts" / "reference.md").read_text(encoding="utf-8"), f"make it again: {MAKE}"


def test_it_has_every_option_and_commands_that_parse() -> None:
    sections = dict(part.split("\n", 1) for part in (ROOT / "artifacts/reference.md").read_text().split("\n### ")[1:])
    every = get_command(app).commands  # type: ignore[attr-defined]
    assert sections.keys() == every.keys()
    for name, command in every.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}" in sections[name], (name, parameter.opts)
        (example,) = commands(sections[name])[:1]
        parse(example)


def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "artifacts/reference.md" in links and "artifacts/demo/quality.png" in links
    assert all((ROOT / link).exists() for link in links)
