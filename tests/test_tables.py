"""The tables of choices: their keys are the options' choices, unknown names raise, and a new entry is a file and its line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from test_stages import write_data
from tiny_models import save_tiny

from moefication_cli.config import ApplyConfig, EvalConfig, RouterConfig, SplitConfig, options_of
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.table import SELECTIONS
from moefication_cli.routing.compensation import COMPENSATIONS, compensation_kind
from moefication_cli.routing.routers import ROUTERS, read_router, router_kind, router_settings
from moefication_cli.routing.rules import RULES, rule_class
from moefication_cli.routing.training import RouterSample
from moefication_cli.split.methods import SPLITS, split_method

PACKAGE = Path(__file__).parents[1] / "moefication_cli"


def choices(config: type, option: str) -> set[str]:
    """The names an option takes: those of its Literal, None left out."""
    hint = get_type_hints(config)[option]
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    return {name for part in parts if part is not type(None) for name in get_args(part)}


@pytest.mark.parametrize(
    ("table", "config", "option"),
    [
        (ROUTERS, RouterConfig, "router"),
        (SPLITS, SplitConfig, "method"),
        (RULES, ApplyConfig, "rule"),
        (COMPENSATIONS, ApplyConfig, "compensation"),
    ],
)
def test_an_option_offers_what_its_table_has(table: dict[str, Any], config: type, option: str) -> None:
    assert choices(config, option) == set(table)


@pytest.mark.parametrize("look_up", [router_kind, split_method, rule_class, compensation_kind])
def test_an_unknown_name_raises(look_up: Any) -> None:
    with pytest.raises(ConfigError, match="'knn'"):
        look_up("knn")


def test_selections_are_those_of_the_help() -> None:
    help_text = next(entry for entry in options_of(EvalConfig) if entry.name == "selection").metadata["help"]
    assert set(SELECTIONS) == {"groundtruth", "neuron", "random", "static", "paper", "teal", "cmoe"}
    assert all(name in help_text for name in SELECTIONS)
    assert not set(SELECTIONS) & set(ROUTERS) - {"random"}


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_is_read_back_as_it_was_stored(name: str) -> None:
    from test_calibration import D, E, layer, rand

    weights, kind = layer(), router_kind(name)
    sample = RouterSample(
        rand(200, D, seed=0), rand(200, E, seed=1).abs(), rand(50, D, seed=2), rand(50, E, seed=3).abs()
    )
    for trained in kind.train(weights, sample, kind.training(RouterConfig(router=name, epochs=1), 0)):
        router = trained.router
        again = read_router(router.tensors(), router_settings(router), E)
        x_TD = rand(9, D, seed=4)
        assert torch.equal(again.scores(x_TD), router.scores(x_TD)) and again.scores(x_TD).shape == (9, E)
        with pytest.raises(ConfigError):
            read_router(router.tensors(), router_settings(router), E + 1)


TOY_ROUTER = '''"""`nearest`: the nearest of several centroids per expert, with a temperature."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moefication_cli.errors import ConfigError
from moefication_cli.routing.training import RouterKind, TrainedRouter


@dataclass(frozen=True)
class NearestRouter:
    centroids_ECD: torch.Tensor
    temperature: float
    form: ClassVar[str] = "nearest"
    fused_by: ClassVar[frozenset[str]] = frozenset()

    num_experts = property(lambda self: self.centroids_ECD.shape[0])
    d_model = property(lambda self: self.centroids_ECD.shape[2])
    width = property(lambda self: self.centroids_ECD.shape[1])
    flops = property(lambda self: self.centroids_ECD.numel())

    def scores(self, x_TD):
        distance_TEC = torch.cdist(x_TD.float(), self.centroids_ECD.flatten(0, 1)).unflatten(1, self.centroids_ECD.shape[:2])
        return self.temperature * torch.logsumexp(-distance_TEC / self.temperature, dim=-1)

    def tensors(self):
        return {"centroids_ECD": self.centroids_ECD}

    def settings(self):
        return {"temperature": self.temperature}

    @classmethod
    def read(cls, tensors, settings, num_experts):
        if len(tensors["centroids_ECD"]) != num_experts:
            raise ConfigError("other experts")
        return cls(tensors["centroids_ECD"], settings["temperature"])

    def with_tensors(self, tensors):
        return replace(self, **tensors)

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        return replace(self, centroids_ECD=self.centroids_ECD.to(*args, **kwargs))


def _train(weights, sample, training):
    best_TE = sample.target_TE.topk(min(32, len(sample.target_TE)), dim=0).indices
    centroids = [sample.x_TD[best_T].unflatten(0, (4, -1)).mean(1) for best_T in best_TE.T]
    return [TrainedRouter(NearestRouter(torch.stack(centroids), 0.5))]


NEAREST = RouterKind(_train, form=NearestRouter)
'''
TOY_RULE = '''"""`margin`: every expert whose score is within a margin of the token's best."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Margin:
    margin: float
    name: ClassVar[str] = "margin"
    fused_by: ClassVar[frozenset[str]] = frozenset()
    needs_calibrated: ClassVar[bool] = True
    refinable: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    value = property(lambda self: self.margin)

    def select(self, scores_TE):
        return scores_TE >= scores_TE.amax(-1, keepdim=True) - self.margin

    def check(self, num_experts):
        pass

    @classmethod
    def calibrate(cls, scores_TE, experts_per_token):
        gap_TE = scores_TE.amax(-1, keepdim=True) - scores_TE
        return cls(float(gap_TE.flatten().quantile(experts_per_token / scores_TE.shape[1])))
'''
DRIVER = """
import json, sys
from moefication_cli.cli.app import exit_code
from moefication_cli.cli.console import Console
for words in json.loads(sys.argv[1]):
    code = exit_code(Console(json_mode=True), [*words, "--json"])
    if code:
        sys.exit(code)
"""


def add(package: Path, place: str, name: str, text: str, table: str, line: str) -> None:
    """A new file, and its import and line in a table."""
    (package / place).write_text(text)
    path = package / table
    source = path.read_text()
    assert source.count(": dict[str, ") == 1
    module = f"moefication_cli.{place.removesuffix('.py').replace('/', '.')}"
    head, _, rest = source.partition(": dict[str, ")
    kind, _, rows = rest.partition("{\n")
    start = head.rpartition("\n")[0]
    imported = f"{start}\nfrom {module} import {name}\n{head.rpartition(chr(10))[2]}"
    path.write_text(f"{imported}: dict[str, {kind}{{\n    {line}\n{rows}")


def test_a_router_and_a_rule_are_each_a_file_and_a_line(tmp_path: Path) -> None:
    package = tmp_path / "moefication_cli"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    add(
        package,
        "routing/routers/nearest.py",
        "NEAREST",
        TOY_ROUTER,
        "routing/routers/__init__.py",
        '"nearest": NEAREST,',
    )
    add(package, "routing/margin.py", "Margin", TOY_RULE, "routing/rules.py", '"margin": Margin,')
    for config in (package / "config").glob("*.py") if (package / "config").is_dir() else [package / "config.py"]:
        text = config.read_text().replace('Literal["regression",', 'Literal["nearest", "regression",')
        config.write_text(text.replace('Literal["threshold",', 'Literal["margin", "threshold",'))
    save_tiny("opt", tmp_path / "opt")
    data = write_data(tmp_path / "train", "lm", 200, 0)
    run = str(tmp_path / "run")
    lm = ["--documents", "line", "--max-length", "16"]
    commands = [
        ["collect-activations", run, "--model", str(tmp_path / "opt"), "--data", str(data), *lm, "--no-sensitivity"],
        ["split", run, "--method", "random", "--expert-size", "4"],
        ["train-router", run, "--router", "nearest"],
        ["apply", run, "--router", "nearest", "--fraction", "0.5", "--fraction-of", "neurons"],
        ["eval", run, "--data", str(data), *lm[:2], "--fraction-of", "neurons", "--backend", "torch"],
        ["train-router", run, "--router", "linear"],
        ["apply", run, "--router", "linear", "--rule", "margin", "--fraction", "0.5", "--fraction-of", "neurons"],
    ]
    made = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    results = [json.loads(line) for line in made.stdout.splitlines()]
    (row,) = [row for row in results[4]["rows"] if row["selection"] == "nearest"]
    chance = next(row for row in results[4]["rows"] if row["selection"] == "random")
    assert row["applied"] and row["active_fraction"] == pytest.approx(0.5, abs=0.01)
    assert row["kl"] < chance["kl"]  # it has learnt something
    assert {layer["rule"] for layer in results[6]["rows"]} == {"margin"}
    assert all(0.2 < layer["ffn_flops_fraction"] for layer in results[6]["rows"])
