"""What users do with a loaded mixture of experts as with any model: compile, pickle, send, train with checkpointing."""

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert
from tiny_models import tiny_inputs
from torch import Tensor

from moefication_cli import load
from moefication_cli.models.capture import capture
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import installed_layers

NAMES = ["llama", "phi3", "bert", "t5", "gpt2"]


def loaded(name: str, tmp_path: Path) -> Any:
    """A MoE with a routed layer, one without a router, and compensation in both."""
    torch.manual_seed(0)
    if not (tmp_path / "moe").exists():
        convert(name, tmp_path / "moe", top_k=2, extra=True, pruned=(1,))
    return load(tmp_path / "moe", device="cpu")


def real_logits(model: Any, name: str, **options: Any) -> Tensor:
    """The logits of real tokens, [P, V], or of sequences, [B, C]."""
    inputs = tiny_inputs(name, **options)
    logits: Tensor = model(**inputs).logits
    if logits.dim() == 2 or not options.get("padded", True):
        return logits.flatten(0, -2)
    return logits[inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()]


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_model_is_the_same_mixture(name: str, how: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    with torch.no_grad():
        size = len(pickle.dumps(model))
        expected = real_logits(model, name)  # compiled kernels are prepared now, and must not be pickled
        assert abs(len(pickle.dumps(model)) - size) < 1000
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        for parameter in model.parameters():
            parameter.zero_()  # control: the copy shares nothing with the original
        assert torch.equal(real_logits(twin, name), expected)
        assert not torch.allclose(real_logits(model, name), expected, atol=1e-2)
    layers = installed_layers(twin)
    assert list(layers) == list(installed_layers(model)) and list(twin.state_dict()) == list(model.state_dict())
    first = next(iter(layers.values()))
    first.count_selections()
    real_logits(twin, name)
    assert first.num_counted == 14  # the copy has hooks of its own: its padding is not routed


def answer(model: Any, name: str, results: Any) -> None:
    """In the other process: what the model that was sent there says."""
    with torch.no_grad():
        results.put(real_logits(model, name).numpy())


def test_a_model_can_be_sent_to_a_spawned_process(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    with torch.no_grad():
        expected = real_logits(model, "llama")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=answer, args=(model, "llama", results))
    process.start()
    found = torch.from_numpy(results.get(timeout=120))
    process.join()
    assert process.exitcode == 0 and torch.equal(found, expected)
    # Sending moved the parameters into shared memory, under the views and addresses the layers had
    with torch.no_grad():
        assert torch.equal(real_logits(model, "llama"), expected)
        model.get_parameter(find_sites(model)[0].down + ".weight").zero_()
        assert not torch.allclose(real_logits(model, "llama"), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_compiled_before_its_first_call(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = loaded(name, tmp_path)
    compiled = torch.compile(loaded(name, tmp_path), backend="aot_eager")
    with torch.no_grad():
        for options in ({}, {"seed": 1}, {"padded": False}, {"seed": 2}):  # each pass has masks of its own
            expected = real_logits(model, name, **options)
            assert torch.allclose(real_logits(compiled, name, **options), expected, atol=1e-5)
    for trained in (model, compiled):
        real_logits(trained, name).square().sum().backward()
    for (key, one), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(one.grad.abs().max()) + 1e-6), key


def gradients(model: Any, name: str) -> dict[str, Tensor]:
    """Of two passes over batches with different padding and one backward pass."""
    model.zero_grad()
    torch.manual_seed(0)  # of the dropout
    loss = real_logits(model, name).square().sum() + real_logits(model, name, seed=1, padded=False).square().sum()
    loss.backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_padded_batch(name: str, reentrant: bool, tmp_path: Path) -> None:
    model = loaded(name, tmp_path).train()
    expected = gradients(model, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpoints = [
        m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")
    ]
    seen: list[int] = []
    sites = find_sites(model)
    # A second mask follows the same passes
    with capture(model, sites[:1], lambda _, x_TD: seen.append(len(x_TD)), verify=False) as second:
        assert isinstance(second, TokenMask)
        found = gradients(model, name)
    # Each pass is computed twice, and what is heard are the real tokens of the pass: 14 of the padded batch, 21 of the other
    assert sorted(seen) == [14, 14, 21, 21]
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6), key
    left = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert left == checkpoints
