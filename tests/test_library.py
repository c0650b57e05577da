"""The package as a library: what the commands do, as functions; a model in memory; names that cost nothing to import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from test_stages import WORDS, write_data
from tiny_models import save_tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import moefication_cli
from moefication_cli import (
    RunDir,
    apply_experts,
    collect_activations,
    convert,
    evaluate,
    load,
    split_neurons,
    train_router,
)
from moefication_cli.config import ApplyConfig, CollectConfig, EvalConfig, RouterConfig, SplitConfig
from moefication_cli.errors import ConfigError

HALF = {"router": "similarity", "expert_size": 4, "fraction_of": "neurons", "fraction": 0.5}


def written(run: Path) -> dict[str, bytes]:
    files = [*run.rglob("*.safetensors"), run / "model" / "moefication" / "moefication.json"]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(files)}


def test_convert_is_run(tmp_path: Path, run_cli: Runner) -> None:
    model, data = tmp_path / "bert", write_data(tmp_path / "train", "classification", 120, 0)
    save_tiny("bert", model)
    made = convert(model, data=data, out=tmp_path / "library", **HALF)
    assert made.path == tmp_path / "library" / "model" and not made.up_to_date
    words = [f"--{name.replace('_', '-')}={value}" for name, value in HALF.items()]
    run_cli.ok("run", tmp_path / "command", "--model", model, "--data", data, *words)
    assert written(tmp_path / "library") == written(tmp_path / "command")
    assert convert(model, data=data, out=tmp_path / "library", **HALF).up_to_date
    other = convert(model, data=data, out=tmp_path / "library", **HALF | {"fraction": 0.25})
    assert not other.up_to_date and written(tmp_path / "library") != written(tmp_path / "command")


def test_a_model_in_memory(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    texts = [f"{word} w1 {word} w2" for word in WORDS * 3]
    made = convert(model, tokenizer=tokenizer, texts=texts, out=tmp_path / "run", **HALF)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        dense, moe = model(ids).logits, load(made.path, fraction=1.0)(ids).logits
        half = load(made.path)(ids).logits
    assert torch.allclose(dense, moe, atol=1e-4) and not torch.allclose(dense, half, atol=0.05)
    assert convert(model, tokenizer=tokenizer, texts=texts, out=tmp_path / "run", **HALF).up_to_date
    assert not convert(model, tokenizer=tokenizer, texts=texts[1:], out=tmp_path / "run", **HALF).up_to_date


def test_stages_one_by_one(tmp_path: Path) -> None:
    model, data = tmp_path / "bert", write_data(tmp_path / "train", "classification", 120, 0)
    save_tiny("bert", model)
    run = RunDir(tmp_path / "run")
    collect_activations(run, CollectConfig(model=str(model), data=str(data)))
    split_neurons(run, SplitConfig(expert_size=4))
    train_router(run, RouterConfig(router="similarity"))
    made = apply_experts(run, ApplyConfig(fraction=0.5, fraction_of="neurons"))
    assert load(made.path, task="classification") is not None
    rows = evaluate(run, EvalConfig(data=str(data), fraction_of="neurons")).rows
    assert {row["selection"] for row in rows} >= {"dense", "similarity", "random"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractoin": 0.2}, "fractoin"),
        ({"fraction": 7.0}, "--fraction"),
        ({"texts": ["a"], "data": "b.txt"}, "exclude"),
        ({}, "calibrate"),
    ],
)
def test_mistakes_in_convert(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    with pytest.raises(ConfigError, match=message) as caught:
        convert(tmp_path / "bert", out=tmp_path / "run", **arguments)
    assert "fraction" in caught.value.hint or "fractoin" not in arguments


def test_mistakes_in_load(tmp_path: Path) -> None:
    for path, options in ((None, {}), (tmp_path, {"fraction": "0.5"}), (tmp_path, {"fraction": 2})):
        with pytest.raises(ConfigError):
            load(path, **options)
    with pytest.raises(ConfigError, match="tokenizer"):
        convert(torch.nn.Linear(2, 2), texts=["a"], out=tmp_path / "run")


def test_names_are_lazy_and_no_module_hides_a_function() -> None:
    code = (
        "import sys, moefication_cli; assert 'torch' not in sys.modules; from moefication_cli import convert; "
        "import moefication_cli.stages.evaluate, moefication_cli.stages.convert; "
        "assert callable(moefication_cli.evaluate) and callable(moefication_cli.convert)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in moefication_cli.__all__:
        assert getattr(moefication_cli, name).__doc__ and name in dir(moefication_cli)
    with pytest.raises(AttributeError, match="nonsense"):
        moefication_cli.nonsense  # noqa: B018
    assert (Path(moefication_cli.__file__).parent / "py.typed").is_file()
