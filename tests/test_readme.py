"""The README against the program: every command it shows parses, every command there is appears in it."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from moefication_cli.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Every `moefication ...` of a code block or between backticks; variables of make and the shell become words."""
    found = re.findall(r"`(moefication [a-z][^`|]*)`", text)
    found += re.findall(r"^(?: {4}|\t)(moefication [^#\n]*)", text, re.MULTILINE)
    plain = [re.sub(r"\$\(\(.*?\)\)", "0", command) for command in found]
    return [re.sub(r"\$\(?(\w+)\)?", r"\1", command).strip() for command in plain]


def parse(command: str) -> None:
    """Parses as the command line does, and runs nothing; raises KeyError, or what the command line would print."""
    _, name, *words = shlex.split(command)
    get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", sorted(set(commands(README))))
def test_every_command_parses(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("words", ["split RUN --nope", "nope RUN", "apply RUN --fraction x", "split"])
def test_a_wrong_command_is_found(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|'nope'|valid number|missing parameter") as error:
        parse(f"moefication {words}")
    assert isinstance(error.value, KeyError) or hasattr(error.value, "format_message")


def test_every_command_is_shown() -> None:
    shown = {command.split()[1] for command in commands(README)}
    assert set(get_command(app).commands) <= shown
    assert len(commands(README)) > 10


def test_files_and_make_targets_exist() -> None:
    scripts = set(re.findall(r"python ((?:tests|artifacts)/\S+\.py)", README))
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^ {4}make (\w+)", README, re.MULTILINE))
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_library_example_runs(tmp_path, monkeypatch):
    """The Python block, on a tiny model and a file of the names it uses."""
    import random
    import re

    from tiny_models import save_tiny

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_tiny("opt", tmp_path / "MODEL")
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(40)}" for _ in range(60)) for _ in range(60)]
    (tmp_path / "calibration.txt").write_text("\n".join(lines) + "\n")
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "RUN" / "model" / "moefication").is_dir() and names["model"].config.model_type == "opt"
