"""Options check themselves in Python as on the command line; lists are tuples; what earlier versions recorded is read."""

import dataclasses
import math
import random
import string
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner

from moefication_cli import config as configs
from moefication_cli.config import ApplyConfig, BenchConfig, CollectConfig, ControlConfig, RouterConfig, options_of
from moefication_cli.config.option import Options, option_types, parse_list
from moefication_cli.errors import ConfigError
from moefication_cli.store.manifest import Manifest, differences

ALL = [
    kind
    for kind in vars(configs).values()
    if isinstance(kind, type) and issubclass(kind, Options) and kind is not Options
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ApplyConfig(fraction=7.0), r"--fraction 7\.0 is above 1"),
        (lambda: ApplyConfig(fraction=math.nan), "--fraction nan is not a finite number"),
        (lambda: ApplyConfig(fraction="0.5"), "--fraction '0.5' is not of type float"),
        (lambda: ApplyConfig(rule="nonsense"), "--rule 'nonsense' is not one of threshold, top_k"),
        (lambda: ApplyConfig(top_k=True), "--top-k True is not of type int"),
        (lambda: RouterConfig(router="knn"), "--router 'knn' is not one of regression"),
        (lambda: RouterConfig(fractions="0.1,0.2"), "--fractions takes a tuple in Python"),
        (lambda: RouterConfig(fractions=(0.1, 0.0)), r"--fractions 0\.0 is not above 0"),
        (lambda: RouterConfig(fractions=()), "--fractions is an empty list"),
        (lambda: RouterConfig(patience=0), "--patience 0 is below 1"),
        (lambda: BenchConfig(tokens=(1, 0)), "--tokens 0 is below 1"),
        (lambda: CollectConfig(storage_dtype=None), "--storage-dtype None is not of type str"),
    ],
)
def test_a_config_checks_itself(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_numbers_and_lists_of_the_right_kind_pass() -> None:
    assert ApplyConfig(fraction=1).fraction == 1.0
    assert RouterConfig(fractions=[0.1, 1]).fractions == (0.1, 1.0)
    assert dataclasses.replace(ApplyConfig(), keep_dense=(0, 11)).keep_dense == (0, 11)
    assert CollectConfig(data=Path("a.txt")).data == "a.txt"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_defaults_pass_their_own_checks_and_are_recorded_and_read(kind: Any) -> None:
    made = kind()
    recorded = {entry.name: getattr(made, entry.name) for entry in options_of(made)}
    assert kind.recorded({**recorded, "an_option_of_another_version": 3}) == made
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in recorded.items()}
    assert kind.recorded(as_json) == made


def test_lists_that_earlier_versions_recorded_as_text_are_read_and_compared() -> None:
    assert RouterConfig.recorded({"fractions": "0.05,0.1"}).fractions == (0.05, 0.1)
    assert ApplyConfig.recorded({"keep_dense": "0,2-3"}).keep_dense == (0, 2, 3)
    entry = {"value": "0.05,0.10", "source": "default", "compared": True}
    made = Manifest(
        schema="moefication/split@1", stage="split", config={"fractions": entry}, inputs={}, files={}, layers=(),
        metrics={}, seconds=0.0, environment={}, digest="0" * 64,
    )  # fmt: skip
    assert differences(made, {"fractions": (0.05, 0.1)}, {}) is None
    assert "`fractions`" in str(differences(made, {"fractions": (0.05, 0.2)}, {}))


def test_layer_numbers_are_parsed_without_counting_to_the_end() -> None:
    kind = option_types(ControlConfig)["layers"]
    assert parse_list("0,3-5, 4", "--layers", kind) == (0, 3, 4, 5)
    for text in ("0-99999999999", "²", "3-", "-1", "a", "5-3", "0-1-2", "999999"):
        with pytest.raises(ConfigError, match="--layers"):
            parse_list(text, "--layers", kind)


def test_lists_come_from_toml_arrays_too(run_cli: Runner, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[bench]\nshape = "t5-base"\ntokens = [3, 5]\nfractions = [0.12345678]\nmode = ["ffn"]\n')
    found = run_cli.ok("bench", "--config", path, "--dry-run")
    assert (found["rows"][0]["tokens"], found["rows"][0]["fractions"]) == ([3, 5], [0.12345678])


def words(rng: random.Random, tmp_path: Path) -> list[str]:
    """A command line that is wrong somewhere: odd options, values of the wrong kind, files that are none."""
    commands = [
        "collect-activations", "build-graph", "split", "train-router", "apply", "eval", "inspect", "run", "bench", "tune",
        "demo", "splti", "",
    ]  # fmt: skip
    odd = [
        "",
        "²",
        "-1",
        "nan",
        "1e999",
        "0,3-",
        "a,b",
        "~nouser/x",
        "/dev/null",
        "\x1b[31m",
        "x" * 300,
        "'",
        "0.5.5",
        "[]",
    ]
    names = [entry.name.replace("_", "-") for kind in ALL for entry in options_of(kind)] + ["no-such", "h", "-"]
    line = [rng.choice(commands), str(tmp_path / f"run{rng.randrange(3)}")]
    for _ in range(rng.randrange(1, 4)):
        line += [f"--{rng.choice(names)}", rng.choice([*odd, rng.choice(string.printable) * 3])]
    return line + rng.choice(
        [[], ["--layers", "9-1"], ["extra"], ["--config", rng.choice(["/", "/dev/zero", "none.toml"])]]
    )


def bad_file(rng: random.Random, path: Path) -> Path:
    """A configuration file that is wrong somewhere, or whose values are."""
    lines = [
        "[split]",
        "method = 3",
        "[apply",
        'fraction = "x"',
        "= 3",
        "num_experts = [1, {a = 2}]",
        "x = 1979-05-27",
        "[bench]",
    ]
    data = "\n".join(rng.sample(lines, rng.randrange(1, 5))).encode()
    path.write_bytes(data + bytes(rng.randrange(256) for _ in range(rng.randrange(3))))
    return path


def check_mistakes(run: Any, folder: Path, seed: int, count: int) -> None:
    """Runs generated mistakes; `run` takes the words of a command line and returns an Outcome."""
    rng = random.Random(seed)
    for number in range(count):
        line = words(rng, folder)
        if number % 4 == 0:
            command = rng.choice(["split", "apply", "bench"])
            line = [command, str(folder / "run"), "--config", str(bad_file(rng, folder / "c.toml"))]
        outcome = run(*line, "--dry-run", "--json")
        assert "Traceback" not in outcome.err, (line, outcome.err)
        assert outcome.code in (0, 1, 2, 3, 4, 5), (line, outcome.code)
        assert outcome.json["ok"] is (outcome.code == 0), line
        if outcome.code:
            assert outcome.json["error"]["message"], line


@pytest.mark.parametrize("seed", range(3))
def test_generated_mistakes_are_messages(
    seed: int, run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_mistakes(run_cli, tmp_path, seed, 100)
