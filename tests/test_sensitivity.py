"""How much each token's FFN output matters: against autograd and finite changes computed directly on tiny models."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn

from moefication_cli.models import sensitivity
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sensitivity import backward_sampled, gradient_norms, token_weights
from moefication_cli.models.sites import find_sites
from moefication_cli.tasks.examples import Batch


def add_to_outputs(model: nn.Module, deltas: dict[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """y + delta for the outputs of the named modules."""

    def hook(delta: Tensor):
        return lambda module, args, output: output + delta.view(output.shape)

    return [model.get_submodule(name).register_forward_hook(hook(delta)) for name, delta in deltas.items()]


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2", "opt", "falcon", "bart-classifier"])
def test_norms_equal_autograd(name: str) -> None:
    model = tiny_model(name).eval()
    model.requires_grad_(False)
    sites, inputs = find_sites(model), tiny_inputs(name)
    mask = TokenMask(model)
    found: dict[int, Tensor] = {}
    with gradient_norms(model, sites, lambda site, norm_T: found.setdefault(site.index, norm_T), mask):
        logits = model(**inputs).logits
        backward_sampled(logits, None, 0)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(logits.flatten(0, -2).shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
        drawn = (logits.detach().flatten(0, -2) - (-noise.log()).log()).argmax(-1)
    mask.remove()

    # Directly: a zero is added to every FFN's output and differentiated.
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    sides = {"encoder": ids, "decoder": inputs.get("decoder_input_ids", ids)}
    masks = {"encoder": real, "decoder": inputs.get("decoder_attention_mask", real)}
    deltas = {site.down: torch.zeros(*sides[site.stack].shape, site.d_model, requires_grad=True) for site in sites}
    handles = add_to_outputs(model, deltas)
    value = model(**inputs).logits.flatten(0, -2).log_softmax(-1).gather(-1, drawn.unsqueeze(1)).sum()
    gradients = torch.autograd.grad(value, list(deltas.values()))
    for handle in handles:
        handle.remove()
    for site, gradient in zip(sites, gradients, strict=True):
        expected = gradient.square().sum(-1)
        real = masks[site.stack]
        expected_T = expected.flatten() if real is None else expected[real.bool()]
        assert expected_T.max() > 0
        assert torch.allclose(found[site.index], expected_T, rtol=1e-3, atol=1e-6 * float(expected_T.max()))
        assert not torch.allclose(found[site.index], expected_T.flip(0), rtol=1e-2)  # negative control


def test_the_likelihood_is_of_draws_from_the_model_itself() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).log_softmax(-1)
    many = logits.expand(20000, 3).unsqueeze(0).clone().requires_grad_()
    # The mean log-likelihood of the model's own draws is minus its entropy.
    mean = backward_sampled(many, None, 0) / 20000
    entropy = -float((logits.exp() * logits).sum())
    assert mean == pytest.approx(-entropy, abs=0.02)
    assert abs(mean + torch.tensor(3.0).log()) > 0.1  # negative control: uniform draws would give another mean
    real = torch.zeros(1, 20000, dtype=torch.bool)
    real[0, :5] = True
    assert backward_sampled(many, real, 1) > 5 * float(logits.min()) - 1e-3


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_the_gradient_is_that_of_autograd_in_chunks_of_any_size(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_CHUNK_BYTES", chunk_rows * 4 * 5)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    backward_sampled(logits, real, 7)
    found, logits.grad = logits.grad, None
    noise = torch.rand(6, 5, generator=torch.Generator().manual_seed(7))  # the same draws, whatever the chunks
    flat = logits.flatten(0, 1)[real.flatten()]
    drawn = (flat.detach() - (-noise.log()).log()).argmax(-1, keepdim=True)
    (flat.gather(-1, drawn).squeeze(-1) - flat.logsumexp(-1)).sum().backward()
    assert torch.allclose(found, logits.grad, atol=1e-6) and float(found[1, 2:].abs().max()) == 0
    assert not torch.allclose(found, logits.grad.roll(1, -1), atol=1e-2)  # negative control


def test_a_batch_in_pieces_keeps_its_rows() -> None:
    ids = torch.arange(40).view(8, 5)
    mask = (torch.arange(5) < torch.arange(1, 9).clamp_max(5).unsqueeze(1)).long()
    batch = Batch({"input_ids": ids, "attention_mask": mask}, np.arange(8), int(mask.sum()))
    pieces = list(batch.pieces(15))
    assert [len(piece.inputs["input_ids"]) for piece in pieces] == [3, 3, 2]
    assert torch.equal(torch.cat([piece.inputs["input_ids"] for piece in pieces]), ids)
    assert sum(piece.num_tokens for piece in pieces) == batch.num_tokens
    assert len(list(batch.pieces(1))) == 8 and len(list(batch.pieces(1000))) == 1


def test_weights_say_what_an_error_costs() -> None:
    """Half of weight * squared error / D, summed over tokens, is the KL divergence that a small error causes."""
    model = tiny_model("bert").double().eval()
    model.requires_grad_(False)
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # a model with an opinion
    site = find_sites(model)[0]
    ids = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(1)).expand(400, 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mask, norms = TokenMask(model), []
    with gradient_norms(model, [site], lambda _, norm_T: norms.append(norm_T), mask):
        logits = model(**batch).logits
        backward_sampled(logits, None, 2)
    mask.remove()
    weight_T = norms[0].view(400, 7).mean(0)  # expected over the labels that were drawn

    noise = 0.02 * torch.randn(400, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for scale_T in (torch.ones(7), torch.eye(7)[weight_T.argmax()], torch.eye(7)[weight_T.argmin()]):
        error = noise * scale_T.view(1, 7, 1)
        handles = add_to_outputs(model, {site.down: error})
        with torch.no_grad():
            other = model(**batch).logits.log_softmax(-1)
        for handle in handles:
            handle.remove()
        dense = logits.detach().log_softmax(-1)
        kl = float((dense.exp() * (dense - other)).sum(-1).mean())
        expected = float((weight_T * error.square().sum(-1)).sum(-1).mean()) / (2 * 16)
        assert kl == pytest.approx(expected, rel=0.3)


def test_token_weights_by_hand() -> None:
    norm_T, sequence_T = torch.tensor([1.0, 3.0, 30.0, 10.0, 0.0]), torch.tensor([4, 4, 9, 9, 9])
    # Within a sequence: gradient over the sequence's mean (2 and 40/3); then times the mean over all tokens (44/5).
    expected = torch.tensor([0.5, 1.5, 2.25, 0.75, 0.0]) * 8.8
    assert torch.allclose(token_weights(norm_T, sequence_T), expected)
    assert float(token_weights(norm_T, sequence_T).mean()) == pytest.approx(8.8)
    assert torch.isfinite(token_weights(torch.zeros(3), torch.zeros(3, dtype=torch.int32))).all()


def test_hooks_leave_the_model_as_it_was() -> None:
    model = tiny_model("bert").eval()
    before = copy.deepcopy(dict(model.named_parameters()))
    sites, mask = find_sites(model), TokenMask(model)
    with gradient_norms(model, sites, lambda *_: None, mask):
        pass
    mask.remove()
    assert all(not model.get_submodule(site.down)._forward_hooks for site in sites)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
