"""What `load` takes besides a folder, and another budget of a loaded model at run time."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert
from tiny_models import tiny_inputs
from torch import Tensor

from moefication_cli import load
from moefication_cli.errors import ConfigError
from moefication_cli.models.surgery import installed_layers


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits.clone()


def converted(name: str, tmp_path: Path) -> Path:
    """A routed layer and one without a router, compensation in both."""
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True, pruned=(1,))
    return tmp_path / "moe"


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_a_budget_at_run_time_is_that_of_load(name: str, tmp_path: Path) -> None:
    folder = converted(name, tmp_path)
    model = load(folder, device="cpu")
    recorded, budgets = logits(model, name), [{"fraction": 0.7}, {"top_k": 1}, {"top_k": 99}, {"fraction": 1.0}]
    for budget in budgets:
        model.moefication.set(**budget)
        found = logits(model, name)
        assert torch.equal(found, logits(load(folder, device="cpu", **budget), name))
        assert not torch.allclose(found, recorded, atol=1e-3)  # the control: it is another budget
    model.moefication.set()
    assert torch.equal(logits(model, name), recorded)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_a_budget_of_its_own(how: str, tmp_path: Path) -> None:
    folder = converted("llama", tmp_path)
    model = load(folder, device="cpu")
    recorded = logits(model, "llama")
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin.moefication.set(fraction=0.7)
    assert torch.equal(logits(model, "llama"), recorded)
    assert torch.equal(logits(twin, "llama"), logits(load(folder, device="cpu", fraction=0.7), "llama"))
    first = installed_layers(twin)["layers.0"]
    first.count_selections()
    logits(twin, "llama")
    assert first.num_counted == 14  # padding is still not routed


def test_what_is_saved_is_what_is_set(tmp_path: Path) -> None:
    model = load(converted("llama", tmp_path), device="cpu")
    model.moefication.set(fraction=0.7)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", device="cpu"), "llama"), logits(model, "llama"))
    assert "moefication" not in str(list(model.state_dict()))


@pytest.mark.parametrize(
    "budget", [{"top_k": 0}, {"top_k": True}, {"top_k": 2.0}, {"fraction": 1.5}, {"fraction": 0.5, "top_k": 2}]
)
def test_bad_budgets(budget: dict[str, Any], tmp_path: Path) -> None:
    folder = converted("bert", tmp_path)
    with pytest.raises(ConfigError, match=r"top_k|fraction"):
        load(folder, device="cpu", **budget)
    model = load(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"top_k|fraction"):
        model.moefication.set(**budget)


def test_what_from_pretrained_takes(tmp_path: Path) -> None:
    folder = converted("llama", tmp_path)
    model = load(folder, device_map="cpu", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert load(folder, device="cpu").config._attn_implementation == "sdpa"
    assert len(installed_layers(model)) == 2
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder, device="cpu", attn_implementation="nonsense")


def test_a_hub_id_from_the_cache(tmp_path: Path) -> None:
    """A repository as `hf download` leaves it in the cache, read in a process that is offline."""
    folder, commit = converted("llama", tmp_path), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--converted"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    code = (
        "from moefication_cli import load\nfrom moefication_cli.errors import ConfigError\n"
        "from moefication_cli.models.surgery import installed_layers\n"
        "print(len(installed_layers(load('someone/converted', device='cpu'))))\n"
        "print(len(installed_layers(load('someone/converted', revision='v1', device='cpu'))))\n"
        "try: load('someone/converted', revision='v2', device='cpu')\n"
        "except ConfigError as error: print(error.message)\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n", 2)[:2] == ["2", "2"] and "model not found: someone/converted" in done.stdout
