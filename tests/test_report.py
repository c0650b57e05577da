"""report: one self-contained page of a tiny converted run, and of two."""

import csv
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from safetensors.torch import load_file

VOID = {"meta", "br", "hr", "img", "link", "input"}
SECTIONS = ("Quality against compute", "Layers", "Expert load", "Co-activation", "Experts per token", "Provenance")


class Page(HTMLParser):
    """Checks that every element is closed; keeps tags, references, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


@pytest.fixture
def made(calibrated_run: Any, run_cli: Runner) -> Path:
    run, _ = calibrated_run
    run_cli.ok("apply", run, "--fraction", 0.5, "--rule", "cumulative")
    data = run.with_name("train.txt")
    run_cli.ok(
        "eval", run, "--data", data, "--limit", 20, "--selection", "groundtruth,regression", "--fractions", "0.5,0.7"
    )
    run_cli.ok("build-graph", run)
    return Path(run)


def test_one_page_without_anything_else(made: Path, run_cli: Runner) -> None:
    found = run_cli.ok("report", made)
    assert found["path"] == str(made / "report" / "report.html")
    page = read_page(made / "report")
    for section in SECTIONS:
        assert section in page.text, section
    assert "Not in this report" not in page.text
    assert page.tags.count("svg") >= 6 and "script" not in page.tags and "link" not in page.tags
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert run_cli.ok("report", made)["up_to_date"]
    run_cli.ok("apply", made, "--fraction", 0.7)
    stale = {stage["stage"]: stage["state"] for stage in run_cli.ok("status", made)["stages"]}
    assert stale["report"] == "stale"


def test_numbers_are_those_of_the_evaluation(made: Path, run_cli: Runner) -> None:
    run_cli.ok("report", made)
    metrics = json.loads((made / "eval" / "default" / "metrics.json").read_text())
    with (made / "report" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["selection"], float(row["kl"])) for row in rows] == [
        (r["selection"], r["kl"]) for r in metrics["rows"]
    ]
    data = json.loads((made / "report" / "report.json").read_text())["runs"][0]
    assert data["evaluations"][0]["rows"] == metrics["rows"]
    applied = next(row for row in metrics["rows"] if row["applied"])
    assert f"{applied['kl']:.3g}" in read_page(made / "report").text
    # The bound is that of the multiply-adds of all matrices; positions are looked up, and the words' embedding is the head as well
    weights = load_file(Path(json.loads((made / "run.json").read_text())["model"]) / "model.safetensors")
    sizes = {name: w.numel() for name, w in weights.items() if w.dim() == 2 and "positions" not in name}
    ffns = sum(size for name, size in sizes.items() if ".fc" in name)
    other = sum(sizes.values()) - ffns
    assert applied["bound"] == pytest.approx(sum(sizes.values()) / (other + ffns * applied["ffn_flops_fraction"]))
    assert f"allow {applied['bound']:.2f}x" in read_page(made / "report").text
    # Loads are shares of tokens, and their mean is what the layer was said to run
    for layer, load in zip(data["layers"], data["load"], strict=True):
        assert all(0 <= share <= 1 for share in load["share_E"])
        if layer["experts_mean"] is not None:
            assert sum(load["share_E"]) == pytest.approx(layer["experts_mean"], rel=0.1)
    matrix = data["coactivation"][0]["matrix"]
    assert len(matrix) == len(matrix[0]) == 48 and max(map(max, matrix)) == 1


def test_hostile_names_are_escaped(made: Path, run_cli: Runner) -> None:
    hostile = made.with_name("<script>alert(1)<")
    made.rename(hostile)
    run_cli.ok("report", hostile)
    page = read_page(hostile / "report")
    assert "script" not in page.tags
    assert "<script>alert(1)<" in page.text


def test_what_is_not_there_is_named(made: Path, run_cli: Runner, tmp_path: Path) -> None:
    shutil.rmtree(made / "eval")
    shutil.rmtree(made / "graph")
    run_cli.ok("report", made)
    page = read_page(made / "report")
    assert "moefication eval" in page.text and "moefication build-graph" in page.text
    shutil.rmtree(made / "model")
    run_cli.ok("report", made)
    assert "moefication apply" in read_page(made / "report").text
    assert run_cli("report", tmp_path / "nothing").code == 3
    (made.with_name("train.txt")).write_text("changed")
    assert run_cli("report", made, "--force").code == 0  # no text can be coloured then, all else is there


def test_several_runs_side_by_side(made: Path, run_cli: Runner, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made, other)
    assert run_cli("report", made, other).code == 2  # where to?
    run_cli.ok("report", made, other, "--out", tmp_path / "both")
    page = read_page(tmp_path / "both")
    assert "2 conversions side by side" in page.text
    assert page.text.count("Expert load") == 2
    duplicates = {
        i for i in page.ids if page.ids.count(i) > 1 and not i.startswith(("figure", "axes", "patch", "text"))
    }
    references = {r[1:] for r in page.references if r.startswith("#")}
    assert not duplicates & references  # a chart never shows the shapes of another one


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to look at the page")
def test_a_browser_shows_it(made: Path, run_cli: Runner, tmp_path: Path) -> None:
    run_cli.ok("report", made)
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--enable-logging=stderr",
             f"--screenshot={picture}", (made / "report" / "report.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert picture.stat().st_size > 20_000
        assert "CONSOLE" not in done.stderr  # script errors, and references that are not there
