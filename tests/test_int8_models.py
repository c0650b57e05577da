"""Models loaded with int8 weights: what they compute, hold, and refuse."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert
from tiny_models import tiny_inputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moefication_cli import load
from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.models import loading
from moefication_cli.models.int8 import Int8Embedding, Int8Linear, Rounded, linear_bytes, quantise_model

NAMES = ["llama", "phi3", "bert", "t5", "gpt2"]


def folder(name: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True, pruned=(1,))
    return tmp_path / "moe"


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny_inputs(name, padded=False)).logits
    return found


def off(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_an_int8_model_computes_with_rounded_weights(name: str, tmp_path: Path) -> None:
    path = folder(name, tmp_path)
    exact, model = load(path, device="cpu", fraction=1.0), load(path, device="cpu", fraction=1.0, weights="int8")
    y, expected = logits(model, name), logits(exact, name)
    assert 1e-4 < off(y, expected) < 0.05  # all experts on: no selection that rounding could change
    masked = load(path, device="cpu", fraction=1.0, weights="int8", backend="reference")
    assert off(y, logits(masked, name)) < 0.03
    exact.moefication.set()
    model.moefication.set()
    assert off(logits(model, name), logits(exact, name)) < 0.5 * off(logits(model, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_float_is_left_of_the_matrices_and_copies_are_the_same(name: str, tmp_path: Path) -> None:
    path = folder(name, tmp_path)
    exact = load(path, device="cpu")
    model = load(path, device="cpu", weights="int8")
    assert linear_bytes(model) <= 0.25 * linear_bytes(exact) + 4 * sum(
        part.weight.shape[0] + part.weight.shape[1] for part in model.modules() if isinstance(part, nn.Linear | Conv1D)
    )
    y = logits(model, name)
    kept = {p.untyped_storage().data_ptr() for one in (exact, model) for p in one.parameters()}
    parts = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D)]
    large = [part.weight for part in parts if part.weight.numel() > 64]
    shapes = {shape for weight in large for shape in (weight.shape, weight.t().shape)}
    gc.collect()
    floats = [
        value
        for value in gc.get_objects()
        # Not those without memory and numbers for sizes, which torch.compile in another test leaves behind
        if type(value) in (Tensor, nn.Parameter) and value.is_floating_point() and value.shape in shapes
    ]
    assert floats and all(value.untyped_storage().data_ptr() in kept for value in floats)
    assert all(part.weight.dtype == torch.int8 for part in model.modules() if isinstance(part, nn.Linear | Conv1D))
    assert torch.equal(logits(copy.deepcopy(model), name), y) and torch.equal(
        logits(pickle.loads(pickle.dumps(model)), name), y
    )


def test_int8_linear_by_hand() -> None:
    layer = Int8Linear(Rounded.of(torch.tensor([[1.27, -0.64], [0.0, 0.02]])), torch.tensor([1.0, 0.0]))
    # tokens become (127, -64) / 100 and (0, 127) / 50; rows (127, -64) / 100 and (0, 127) * 0.02 / 127
    y = layer(torch.tensor([[1.27, -0.64], [0.0, 2.54]]))
    assert torch.allclose(
        y, torch.tensor([[1.27 * 1.27 + 0.64 * 0.64 + 1, -0.64 * 0.02], [-0.64 * 2.54 + 1, 2.54 * 0.02]]), atol=1e-6
    )
    bad = layer(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]]))
    assert bad[:2].isnan().all() and torch.equal(bad[2], torch.tensor([1.0, 0.0]))
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 40, generator=generator), torch.randn(2, 7, 40, generator=generator)
    got = Int8Linear(Rounded.of(w), None)(x)
    assert got.shape == (2, 7, 24) and 1e-3 < off(got, x @ w.t()) < 0.02


@torch.no_grad()
def test_embeddings_by_hand_and_tied_ones_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Embedding(5, 16), nn.Embedding(5, 16)
            self.head, self.free = nn.Linear(16, 5, bias=False), nn.Linear(16, 5)
            self.head.weight = self.first.weight

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.first(ids)) + self.free(self.other(ids))
            return found

    torch.manual_seed(0)
    model = Tied()
    exact = copy.deepcopy(model)
    ids = torch.tensor([[0, 4, 2]])
    quantise_model(model, [])
    assert type(model.first) is Int8Embedding and model.first.weight is model.head.weight
    assert model.other.weight is not model.first.weight and model.free.weight is not model.head.weight
    rows = exact.first.weight.detach()[ids]
    steps = rows / rows.abs().amax(dim=-1, keepdim=True) * 127
    assert torch.allclose(model.first(ids), steps.round() / 127 * rows.abs().amax(dim=-1, keepdim=True), atol=1e-6)
    assert 1e-4 < off(model(ids), exact(ids)) < 0.02
    with pytest.raises(IndexError):
        model.first(torch.tensor([5]))
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values() if p.dtype == torch.int8) == 3 * 80


@pytest.mark.parametrize("name", NAMES)
def test_files_in_half_precision_are_widened_matrix_by_matrix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, dtype=torch.bfloat16)
    asked: list[Any] = []
    own = loading.load_model

    def noted(*args: Any, **options: Any) -> Any:
        asked.append(options["dtype"])
        return own(*args, **options)

    monkeypatch.setattr(loading, "load_model", noted)
    model = load(tmp_path / "moe", device="cpu", weights="int8")
    assert asked == ["auto"] and model.dtype == model.config.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}
    y = logits(model, name)
    monkeypatch.setattr(loading, "_has_rounded_buffers", lambda model: True)
    # As if positions had been rounded: float32 from the start
    wide = load(tmp_path / "moe", device="cpu", weights="int8")
    assert asked == ["auto", "auto", torch.float32] and torch.equal(logits(wide, name), y)
    assert off(logits(load(tmp_path / "moe", device="cpu"), name), y) > 1e-4


def test_what_int8_does_not_go_with_is_said(tmp_path: Path) -> None:
    path = folder("bert", tmp_path)
    with pytest.raises(ConfigError, match="int4"):
        load(path, device="cpu", weights="int4")
    for dtype in ("bfloat16", torch.float16):
        with pytest.raises(ConfigError, match="float32 activations"):
            load(path, device="cpu", dtype=dtype, weights="int8")
    with pytest.raises(UnavailableError, match="on the CPU"):
        load(path, device=torch.device("cuda"), weights="int8")
    model = load(path, device="cpu", weights="int8")
    with pytest.raises(ConfigError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
