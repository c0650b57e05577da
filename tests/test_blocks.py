"""FFNs that have a module of their own (`LlamaMLP`): it answers for its projections, unless somebody looks at them or it does more."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert
from tiny_models import tiny_inputs
from torch import Tensor

from moefication_cli import load
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import install, installed_layers, uninstall

ALONE = {"llama": True, "t5": True, "gpt2": True, "phi3": True, "bert": False, "opt": False}


def loaded(name: str, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True)
    return load(tmp_path / "moe", device="cpu")


def logits(model: Any, name: str, padded: bool = True) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny_inputs(name, padded=padded)).logits
    return found


def blocks(model: Any) -> list[Any]:
    return [part for part in model.modules() if type(part).__name__.startswith("Block")]


@pytest.mark.parametrize("name", ALONE)
def test_what_answers_at_once_answers_the_same(name: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    layers = installed_layers(model)
    found = blocks(model)
    assert len(found) == (len(layers) if ALONE[name] else 0)
    y = logits(model, name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(blocks(twin)) == len(found) and torch.equal(logits(twin, name), y)
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(site.up).register_forward_hook(lambda part, args, out: seen.append(out))
        for site in find_sites(model)
    ]
    assert torch.equal(logits(model, name), y) and len(seen) == len(layers)  # by way of the projections
    for hook in hooks:
        hook.remove()
    model.train()
    logits(model, name)
    assert len(seen) == len(layers)
    model.eval()
    for site in find_sites(model):
        uninstall(model, site)
    assert not blocks(model) and not torch.allclose(logits(model, name), y, atol=1e-3)


def test_a_module_that_does_more_keeps_doing_it(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    y = logits(model, "llama", padded=False)
    layers = installed_layers(model)
    for site in find_sites(model):
        uninstall(model, site)
    sites = find_sites(model)
    mlp = model.get_submodule(sites[0].up.rpartition(".")[0])

    class Doubled(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    for site in sites:
        install(model, site, layers[site.name])
    assert len(blocks(model)) == len(sites) - 1
    doubled = logits(model, "llama", padded=False)
    mlp.__class__ = Doubled.__bases__[0]  # control: what is seen is the factor
    assert not torch.allclose(doubled, y, atol=1e-3) and torch.equal(logits(model, "llama", padded=False), y)
