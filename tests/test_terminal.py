"""What a person sees: panels and examples of the help, did-you-mean, progress, what comes next, completion."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import Runner
from rich.console import Console as RichConsole
from test_readme import parse
from typer.main import get_command

from moefication_cli.cli.app import app
from moefication_cli.cli.guide import GUIDE
from moefication_cli.cli.progress import Reporter
from moefication_cli.config.option import PANELS

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_panels_and_an_example_that_parses(name: str, run_cli: Runner) -> None:
    said = run_cli(name, "--help").out
    assert all(parameter.rich_help_panel in PANELS for parameter in COMMANDS[name].params if parameter.name != "context"
               and parameter.param_type_name == "option")  # fmt: skip
    assert "─ Control ─" in said and "Example: moefication" in said
    parse(f"moefication {GUIDE[name].example}")
    if GUIDE[name].then:
        parse(f"moefication {GUIDE[name].then.format('RUN')}")


def test_every_option_is_in_the_panel_of_its_kind(run_cli: Runner) -> None:
    said = run_cli("split", "--help").out
    places = [said.index(text) for text in ("─ Input", "--model", "─ Method", "--restarts", "─ Control", "--quiet")]
    assert places == sorted(places)


def test_the_list_of_commands_is_grouped_in_whole_sentences(run_cli: Runner) -> None:
    said = run_cli("--help").out
    for panel in {guide.panel for guide in GUIDE.values()}:
        assert f"─ {panel} ─" in said
    assert "..." not in said.split("The six stages")[1]
    assert all(command.help.split("\n\n")[0].endswith(".") for command in COMMANDS.values())


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["split", "RUN", "--exprt-size", "4"], "--expert-size"),
        (["splt", "RUN"], "split"),
        (["split", "RUN", "--method", "kmean"], "kmeans"),
        (["train-router", "RUN", "--router", "regresion"], "regression"),
        (["tune", "RUN", "--routers", "regresion"], "regression"),
        (["split", "RUN", "--config", "table.toml"], "split"),
        (["--config", "key.toml", "split", "RUN"], "method"),
        (["split", "RUN", "--config", "key.toml"], "method"),
    ],
)
def test_did_you_mean(
    words: list[str], meant: str, run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.toml").write_text('[splt]\nmethod = "random"\n')
    Path("key.toml").write_text('[split]\nmethd = "random"\n')
    outcome = run_cli(*words)
    assert outcome.code == 2 and "did you mean" in outcome.err.lower() and meant in outcome.err.lower()
    assert "did you mean" not in run_cli("split", "RUN", "--method", "zzzz").err


def shown(mode: str, terminal: bool, times: list[float]) -> list[str]:
    """What a loop of three items writes whose clock is at `times`, one after the other, when asked."""
    out = io.StringIO()
    console = RichConsole(file=out, force_terminal=terminal, width=100, soft_wrap=True)
    moments = iter(times)
    reporter = Reporter(console, mode, clock=lambda: next(moments))  # type: ignore[arg-type]
    assert list(reporter.track("abc", "split", 3)) == ["a", "b", "c"]
    return out.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_a_minute_at_most() -> None:
    assert shown("auto", False, [0, 0, 0, 20, 40, 59]) == []
    assert shown("auto", False, [0, 0, 0, 61, 100, 110]) == ["split: 1 of 3, 1 min 1 s each, 2 min 2 s left"]
    assert shown("none", False, [0]) == []


def test_json_progress_is_one_object_per_line() -> None:
    events = [json.loads(line) for line in shown("json", False, [0, 0, 0, 0.5, 2, 2.5])]
    assert [(e["event"], e["stage"], e["done"], e["total"]) for e in events] == [
        ("progress", "split", 0, 3), ("progress", "split", 2, 3), ("progress", "split", 3, 3)
    ]  # fmt: skip
    assert [event["seconds"] for event in events] == [0, 2, 2.5]


def test_a_terminal_gets_a_bar_without_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38" in "".join(shown("auto", True, [0])) or "\x1b[3" in "".join(shown("auto", True, [0]))
    monkeypatch.setenv("NO_COLOR", "1")
    said = "".join(shown("auto", True, [0]))
    assert "split" in said and "\x1b[3" not in said
    monkeypatch.setenv("TERM", "dumb")
    assert shown("auto", True, [0, 0, 0, 1, 2, 3]) == []


def test_stdout_is_one_object_and_stderr_events(run_cli: Runner, tmp_path: Path) -> None:
    from tiny_models import save_tiny

    save_tiny("opt", tmp_path / "MODEL")
    words = ["split", tmp_path / "run", "--model", tmp_path / "MODEL", "--method", "random", "--num-experts", 6]
    outcome = run_cli(*words, "--json", "--progress", "json")
    assert outcome.json["ok"] is True
    events = [json.loads(line) for line in outcome.err.splitlines()]
    assert {"progress", "message"} >= {event["event"] for event in events} >= {"progress"}
    assert "next: moefication train-router" in run_cli(*words).err
    assert "next:" not in run_cli(*words, "--json").err and run_cli(*words, "--quiet").err == ""


def complete(line: str, folder: Path) -> list[str]:
    """What bash would be offered at the end of `line`."""
    words = line.split(" ")
    environment = os.environ | {
        "_MOEFICATION_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    code = (
        "import sys; from moefication_cli.cli.app import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout.split()


def test_the_shell_completes_runs_and_stages(tmp_path: Path) -> None:
    for name in ("bert", "books/opt", "books/other"):
        (tmp_path / name / "split").mkdir(parents=True)
        if name != "books/other":
            (tmp_path / name / "run.json").write_text("{}")
            (tmp_path / name / "split" / "manifest.json").write_text("{}")
    assert complete("moefication split b", tmp_path) == ["bert", "books/opt"]
    assert complete("moefication status books/", tmp_path) == ["books/opt"]
    assert complete("moefication clean bert s", tmp_path) == ["split"]
    assert complete("moefication clean bert x", tmp_path) == []
    assert complete("moefication config spl", tmp_path) == ["split"]
    assert complete("moefication split bert --method k", tmp_path) == ["kmeans"]
    assert complete("moefication split none/", tmp_path) == []


def test_finished_stages_stay_with_what_came_out(run_cli: Runner, tmp_path: Path) -> None:
    from tiny_models import save_tiny

    save_tiny("opt", tmp_path / "MODEL")
    lines = [" ".join(f"w{(i * 7 + k * k) % 40}" for k in range(40)) for i in range(60)]
    (tmp_path / "c.txt").write_text("\n".join(lines) + "\n")
    data = tmp_path / "c.txt"
    words = ["run", tmp_path / "run", "--model", tmp_path / "MODEL", "--data", data, "--fraction", 0.5, "--refine", 0]
    first = run_cli(*words, "--method", "random", "--num-experts", 6, "--router", "similarity")
    assert first.code == 0, first.err
    for line in (r"collect-activations: 2 layers, [\d,]+ tokens, [\d.]+ s", r"split: 2 layers, 6 experts of 8, [\d.]+ s",
                 r"train-router: 2 layers, [\d.]+ s", r"apply: 2 layers, 0\.\d+ of the dense FFNs' compute, [\d.]+ s"):  # fmt: skip
        assert re.search(f"^{line}$", first.err, re.MULTILINE), (line, first.err)
    for wrong in (["apply", tmp_path / "run", "--router", "similarty"],
                  ["eval", tmp_path / "run", "--data", data, "--selection", "similarty"]):  # fmt: skip
        refused = run_cli(*wrong)
        assert refused.code == 2 and "hint: did you mean similarity?" in refused.err
    refused = run_cli("eval", tmp_path / "run", "--data", data, "--backend", "refrence")
    assert refused.code == 2 and "hint: did you mean reference?" in refused.err
    again = run_cli(*words, "--method", "random", "--num-experts", 6, "--router", "similarity")
    assert "split: up to date" in again.err and "6 experts" not in again.err
