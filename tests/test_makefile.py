"""The Makefile finds a Python, says what is missing, and makes an environment that is broken anew."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="needs make")
OLD = "#!/bin/sh\nexit 1\n"  # what a Python before 3.11, or one without venv, answers to the question


def make(path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`make` of the checkout with only `path` to find programs in."""
    command = [str(MAKE), "-C", str(ROOT), "--no-print-directory", *map(str, words)]
    return subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, check=False)


def put(folder: Path, name: str, text: str | None = None) -> Path:
    """A program of that name: this Python, or a script."""
    path = folder / name
    if text is None:
        text = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_first_usable_python_is_taken(tmp_path: Path) -> None:
    put(tmp_path, "python3", None)
    assert make(tmp_path, "python").stdout == "python3\n"
    put(tmp_path, "python3.11", OLD)
    put(tmp_path, "python3.13", None)
    assert make(tmp_path, "python").stdout == "python3.13\n"
    assert make(tmp_path, "python", "PYTHON=python3").stdout == "python3\n"


def test_without_one_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    put(tmp_path, "python3", OLD)
    nothing = make(tmp_path, "python")
    assert nothing.returncode != 0 and nothing.stdout == ""
    assert nothing.stderr.startswith("There is no Python 3.11 or newer")
    named = make(tmp_path, "python", f"PYTHON={tmp_path / 'python3'}")
    assert named.returncode != 0 and f"{tmp_path / 'python3'} is not Python 3.11" in named.stderr


def test_a_broken_environment_is_made_anew_and_a_whole_one_stays(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    # Makes environments of one file, its own kind: a real one takes pip half a minute on a busy machine
    real = put(tmp_path, "real")
    put(
        programs,
        "python3",
        f'#!/bin/sh\n[ "$2" = venv ] || exec {real} "$@"\nmkdir -p $3/bin && cp {real} $3/bin/python\n',
    )
    for name in ("rm", "touch", "mkdir", "cp"):
        put(programs, name, f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(tmp_path / "gone")
    (venv / ".installed").touch()
    variable = f"VENV={venv}"
    assert "pip install" in make(programs, "-n", variable, f"{venv}/.installed").stdout  # the stamp counts for nothing
    made = make(programs, "venv", variable)
    assert made.returncode == 0 and "python3 -m venv" in made.stdout, made.stderr
    assert not (venv / ".installed").exists()
    (venv / ".installed").touch()
    assert make(programs, "venv", variable).stdout == ""
    assert (venv / ".installed").exists()
    assert "up to date" in make(programs, "-n", variable, f"{venv}/.installed").stdout
