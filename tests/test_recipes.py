"""Recipes: a run made by hand replayed from its printed recipe, refusals, and the examples in artifacts/recipes."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from test_stages import world, write_data  # noqa: F401  a fixture
from tiny_models import save_tiny

from moefication_cli import convert

RECIPES = Path(__file__).parents[1] / "artifacts" / "recipes"
# recipe -> (tiny model, task of its data, options beside model and data)
EXAMPLES: dict[str, tuple[str, str, list[object]]] = {
    "classifier": ("bert", "classification", []),
    "t5": ("t5", "text2text", ["--prompt", "w1 w2 {sentence}", "--label-words", "w3,w4"]),
    "relu-llm": ("opt", "lm", ["--documents", "line", "--max-length", 16]),
    "gated-llm": ("llama", "lm", ["--documents", "line", "--max-length", 16, "--finetune", 2]),
    "export-mixtral": ("llama", "lm", ["--documents", "line", "--max-length", 16, "--num-experts", 6]),
}


def model_bytes(run: Path) -> dict[str, bytes]:
    """Every file of RUN/model but its manifest, which has times."""
    files = (path for path in sorted((run / "model").rglob("*")) if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture
def by_hand(world: Any, run_cli: Runner, tmp_path: Path) -> tuple[Path, Path]:  # noqa: F811
    """(run made stage by stage with unusual options and seeds, its printed recipe)."""
    run, _, source, evaluate = world("bert", "classification")
    run_cli.ok("collect-activations", run, *source, "--max-tokens", 500, "--seed", 3)
    run_cli.ok("build-graph", run, "--neighbours", 16, "--seed", 3)
    run_cli.ok("split", run, "--method", "graph", "--expert-size", 4, "--seed", 4)
    run_cli.ok("train-router", run, "--router", "similarity")
    run_cli.ok("train-router", run, "--router", "linear", "--epochs", 2, "--max-tokens", 400, "--seed", 5)
    run_cli.ok("apply", run, "--router", "linear", "--fraction", 0.6, "--keep-dense", 0, "--seed", 6)
    run_cli.ok("eval", run, *evaluate, "--selection", "linear")
    printed = run_cli("run", run, "--print-recipe")
    assert printed.code == 0, printed.err
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(printed.out)
    return run, recipe


def test_a_printed_recipe_makes_the_same_bytes_and_another_seed_does_not(
    by_hand: tuple[Path, Path], run_cli: Runner, tmp_path: Path
) -> None:
    run, recipe = by_hand
    again, other = tmp_path / "again", tmp_path / "other"
    assert run_cli.ok("run", again, "--recipe", recipe)["metrics_path"].startswith(str(again))
    assert model_bytes(again) == model_bytes(run)
    manifest = json.loads((again / "router" / "linear" / "manifest.json").read_text())
    assert manifest["config"]["max_tokens"] == {"value": 400, "source": "recipe", "compared": True}
    rows = [
        [row["selection"] for row in json.loads((r / "eval/default/metrics.json").read_text())["rows"]]
        for r in (run, again)
    ]
    assert rows[0] == rows[1]
    assert run_cli.ok("run", again, "--recipe", recipe)["up_to_date"]
    run_cli.ok("run", other, "--recipe", recipe, "--seed", 9)
    assert model_bytes(other) != model_bytes(run)
    # What it prints of the replayed run is what it was given, but for where values came from
    printed = tomllib.loads(run_cli("run", again, "--print-recipe").out)
    assert printed == tomllib.loads(recipe.read_text())


def test_the_command_line_comes_first(by_hand: tuple[Path, Path], run_cli: Runner, tmp_path: Path) -> None:
    _, recipe = by_hand
    again = tmp_path / "again"
    run_cli.ok("run", again, "--recipe", recipe, "--fraction", 0.8, "--keep-dense", 1)
    manifest = json.loads((again / "model" / "manifest.json").read_text())["config"]
    assert (manifest["fraction"]["value"], manifest["fraction"]["source"]) == (0.8, "command line")
    assert manifest["keep_dense"]["value"] == [1]
    made = convert(tmp_path / "bert", out=tmp_path / "library", recipe=str(recipe), keep_dense=(1,), fraction=0.8)
    assert model_bytes(made.path.parent) == model_bytes(again)


def test_changed_files_are_refused_by_name(by_hand: tuple[Path, Path], run_cli: Runner, tmp_path: Path) -> None:
    run, recipe = by_hand
    table = tomllib.loads(recipe.read_text())
    data, model = Path(table["collect-activations"]["data"]), Path(table["collect-activations"]["model"])
    again = tmp_path / "again"
    whole = data.read_text()
    data.write_text(whole + "w1 w2\t1\n")
    for more in ([], ["--dry-run"]):
        refused = run_cli("run", again, "--recipe", recipe, *more, "--json")
        assert refused.code == 2, refused.err
        error = refused.json["error"]
        assert "calibration data" in error["message"] and str(data) in error["message"] and "--data" in error["hint"]
    assert not again.exists()
    named = run_cli("run", again, "--recipe", recipe, "--data", data)
    assert named.code == 0 and "note: the calibration data" in named.err
    data.write_text(whole)
    dev = Path(table["eval"]["data"])
    before = dev.read_text()
    dev.write_text(before + "w1 w2\t1\n")
    refused = run_cli("run", tmp_path / "b", "--recipe", recipe, "--json")
    assert refused.code == 2 and "evaluation data" in refused.json["error"]["message"]
    dev.write_text(before)
    moved = tmp_path / "elsewhere" / model.name
    moved.parent.mkdir()
    shutil.move(model, moved)  # the same files elsewhere are the same model
    assert run_cli("run", tmp_path / "c", "--recipe", recipe, "--dry-run").code == 2
    save_tiny("bert-bare", model)
    refused = run_cli("run", tmp_path / "c", "--recipe", recipe, "--json")
    assert refused.code == 2
    shutil.rmtree(model)
    run_cli.ok("run", tmp_path / "c", "--recipe", recipe, "--model", moved)
    assert model_bytes(tmp_path / "c") == model_bytes(run)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[splitt]\n", "did you mean split?"),
        ("[split]\nexpert-sise = 4\n", "did you mean expert_size?"),
        ('[split]\nexpert-size = "4"\n', "--expert-size '4' is not of type int"),
        ("[split]\nseed = -1\n", "--seed -1 is below 0"),
        ('[recipe]\nschema = "moefication/recipe@9"\n', "recipe@9"),
        ("[digests]\nnothing = 3\n", "nothing is not the digest"),
        ("x = 3\n", "outside a table"),
        ("[split\n", "not valid TOML"),
    ],
)
def test_mistakes_in_a_recipe_are_messages(
    text: str, said: str, run_cli: Runner, bert: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    refused = run_cli("run", tmp_path / "run", "--recipe", path, "--model", bert, "--data", data, "--json")
    assert refused.code == 2
    assert said in refused.json["error"]["message"] + refused.json["error"]["hint"]
    assert not (tmp_path / "run").exists()


def test_names_and_files(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    options = ["--model", bert, "--data", data, "--dry-run"]
    assert "neither" in run_cli("run", tmp_path / "run", "--recipe", "papr", *options).err
    assert "absent.toml" in run_cli("run", tmp_path / "run", "--recipe", "absent.toml", *options).err
    assert (
        run_cli("run", tmp_path / "run", "--recipe", "paper", *options, "--num-experts", 6).code == 2
    )  # 32 does not divide
    assert run_cli("run", tmp_path / "run", "--print-recipe").code == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_the_examples_work(name: str, run_cli: Runner, tmp_path: Path) -> None:
    kind, task, options = EXAMPLES[name]
    save_tiny(kind, tmp_path / kind)
    data = write_data(tmp_path / "train", task, 400, 0)
    words = [
        "--recipe",
        RECIPES / f"{name}.toml",
        "--model",
        tmp_path / kind,
        "--data",
        data,
        "--refine",
        2,
        "--fraction",
        0.6,
    ]
    run_cli.ok("run", tmp_path / "run", *words, *options)
    table = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    for stage, command in {"activations": "collect-activations", "split": "split", "model": "apply"}.items():
        recorded = json.loads((tmp_path / "run" / stage / "manifest.json").read_text())["config"]
        sources = {key.replace("-", "_"): recorded[key.replace("-", "_")]["source"] for key in table[command]}
        assert set(sources.values()) <= {"recipe", "command line"}
        assert "recipe" in sources.values() or command == "apply" or name == "export-mixtral"
    if name == "export-mixtral":
        run_cli.ok("export", tmp_path / "run", "--to", "mixtral", "--out", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"
    if name == "gated-llm":
        assert (tmp_path / "run" / "finetuned" / "default" / "manifest.json").exists()
