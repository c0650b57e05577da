"""How much each token's FFN output matters for what the model says: squared gradients of a sampled log-likelihood.

With labels drawn from the model's own distribution, E ||d log p / d y_t||^2 is the trace of the Fisher information of
token t's FFN output y_t: to second order, an output error e_t costs about ||g_t||^2 ||e_t||^2 / (2 D) of KL divergence.
A few tokens carry most of it (only the first one in the last layer of a BERT classifier), so compute can go there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite

_RIDGE = 0.03  # of the mean variance
_CHUNK_BYTES = 64 * 2**20  # of float32 predictions handled at a time
_CHUNK = 2048  # tokens converted to float32 at a time: blocks this small are reused by the allocator

Deliver = Callable[[FFNSite, Tensor], None]


@contextmanager
def gradient_norms(
    model: nn.Module, sites: Sequence[FFNSite], deliver: Deliver, token_mask: TokenMask
) -> Iterator[None]:
    """While open, a backward pass delivers ||g_t||^2 [T] (float32, CPU) of every FFN's real tokens, once per site.

    The parameters need no gradients: the first FFN's output starts the graph.
    """

    def listen(site: FFNSite) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                # A copy, because autograd forbids adding to a leaf in place, which Falcon does with the FFN's output
                output = output.requires_grad_().clone()
            real_T = token_mask.mask_for(site.stack, output.shape[:-1])

            def receive(gradient: Tensor) -> None:
                norm_T = gradient.detach().float().square().sum(-1).flatten()
                deliver(site, (norm_T if real_T is None else norm_T[real_T.to(norm_T.device)]).cpu())

            output.register_hook(receive)
            return output

        return hook

    handles = [model.get_submodule(site.down).register_forward_hook(listen(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_sampled(logits: Tensor, real: Tensor | None, seed: int) -> float:
    """Draw one label per prediction from the model's own distribution and run the backward pass of their log-likelihood.

    Returns its sum. logits [..., C]; `real` (bool, of the leading shape) leaves padding out. The gradient, which is
    (1 at the label) - softmax, is written down directly, in chunks: one copy of the logits in all, where autograd would
    keep four in float32.
    """
    flat_PC = logits.detach().flatten(0, -2)
    rows_P = torch.arange(len(flat_PC), device=flat_PC.device)
    if real is not None:
        rows_P = rows_P[real.flatten().to(flat_PC.device)]
    gradient_PC, total = torch.zeros_like(flat_PC), 0.0
    generator = torch.Generator(flat_PC.device).manual_seed(seed)
    for part in rows_P.split(max(1, _CHUNK_BYTES // (4 * flat_PC.shape[1]))):
        log_PC = flat_PC[part].float().log_softmax(-1)
        noise_PC = torch.rand(log_PC.shape, generator=generator, device=log_PC.device)
        noise_PC.clamp_(1e-9, 1 - 1e-7).log_().neg_().log_().neg_()  # Gumbel's trick
        drawn_P1 = noise_PC.add_(log_PC).argmax(-1, keepdim=True)
        total += float(log_PC.gather(-1, drawn_P1).sum())
        step_PC = log_PC.exp_().neg_()
        step_PC.scatter_add_(-1, drawn_P1, torch.ones_like(step_PC[:, :1]))
        gradient_PC[part] = step_PC.to(gradient_PC.dtype)
    logits.backward(gradient_PC.view_as(logits))  # type: ignore[no-untyped-call]
    return total


def backward_embeddings(embedding_RD: Tensor, seed: int) -> None:
    """The same for embeddings, whose unit vectors count as means of normal distributions of variance 1.

    Their KL is half the squared distance, 1 - cosine; the gradient of a sample's log-likelihood is standard normal noise.
    """
    unit_RD = nn.functional.normalize(embedding_RD.float(), dim=-1)
    generator = torch.Generator(unit_RD.device).manual_seed(seed)
    unit_RD.backward(torch.randn(unit_RD.shape, generator=generator, device=unit_RD.device))  # type: ignore[no-untyped-call]


def token_weights(norm_T: Tensor, sequence_T: Tensor) -> Tensor:
    """weight_T: gradients normalised within each sequence, times the layer's mean.

    One drawn label per sequence makes raw gradients heavy-tailed between sequences; within a sequence they say which
    tokens matter, and the mean over all tokens says how much the layer does. Mean of the result: mean of `norm_T`.
    """
    _, index_T = torch.unique(sequence_T, return_inverse=True)
    count_S = torch.bincount(index_T).double()
    total_S = torch.zeros_like(count_S).index_add_(0, index_T, norm_T.double())
    within_T = norm_T.double() * (count_S / total_S.clamp_min(1e-300))[index_T]
    return (within_T * norm_T.double().mean()).float()


def predicted_weights(x_TD: Tensor, weight_S: Tensor, sample_S: Tensor) -> Tensor:
    """weight_T of all tokens from those of a sample: ridge regression of sqrt(weight) on the FFN's standardised input.

    `sample_S` are the indices of the tokens whose `weight_S` was measured. A backward pass costs as much as a forward one,
    so it runs on few sequences; and the expectation over drawn labels, which the fit is closer to than one draw, is
    what is wanted. The mean of the result is that of the sample.
    """
    known_SD = x_TD[sample_S].float()
    mean_D, spread_D = known_SD.mean(0), known_SD.std(0).clamp_min(1e-6)
    z_SD, root_S = (known_SD - mean_D) / spread_D, weight_S.sqrt()
    gram_DD = z_SD.T @ z_SD
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-6)
    slope_D = torch.linalg.solve(gram_DD, z_SD.T @ (root_S - root_S.mean()))
    offset = root_S.mean() - (mean_D / spread_D) @ slope_D
    root_T = torch.cat([part.float() @ (slope_D / spread_D) + offset for part in x_TD.split(_CHUNK)])
    weight_T = root_T.clamp_min(0).square()
    return weight_T * (weight_S.mean() / weight_T[sample_S].mean().clamp_min(1e-30))
