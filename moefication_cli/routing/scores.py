"""What a router is asked to predict: how much each expert matters for each token, computed from all activations.

Kinds of score, for hidden activations h and an expert's neurons S_e:

    activation     sum of |h_n|                         MoEfication, section 3.2 (ReLU: |h| = h)
    contribution   sum of |h_n| * ||w_down_n||          what each neuron writes, cancellation ignored
    norm           || sum of h_n w_down_n ||            what the expert writes: D2DMoE (arXiv 2310.04361), section 3.2

Axes: T tokens, D model width, F neurons, S shared, E experts, N neurons per expert. Pure tensors.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from moefication_cli.errors import NonFiniteError
from moefication_cli.ffn import ExpertWeights

ScoreKind = Literal["activation", "contribution", "norm"]

_CHUNK_BYTES = 256 * 2**20  # bounds the hidden activations held at once
_CACHE_BYTES = 8 * 2**20  # on a CPU, activations that are read again should still be in its cache


def token_chunks(num_tokens: int, num_neurons: int, num_bytes: int = _CHUNK_BYTES) -> Iterator[slice]:
    """Slices of tokens whose float32 activations of `num_neurons` fit in `num_bytes`."""
    size = max(1, num_bytes // (4 * num_neurons))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def expert_scores(h_TF: Tensor, weights: ExpertWeights, kind: ScoreKind) -> Tensor:
    """scores_TE (float32) of the routed experts from hidden activations in expert order; shared neurons are left out."""
    h_TEN = h_TF[:, weights.num_shared :].float().unflatten(1, (weights.num_experts, weights.expert_size))
    if kind == "activation":
        return h_TEN.abs().sum(-1)
    w_END = weights.ffn.w_down_FD[weights.num_shared :].float().unflatten(0, (weights.num_experts, weights.expert_size))
    if kind == "contribution":
        return torch.einsum("ten,en->te", h_TEN.abs(), w_END.norm(dim=-1))
    gram_ENN = w_END @ w_END.transpose(1, 2)
    squared_TE = (torch.einsum("ten,enm->tem", h_TEN, gram_ENN) * h_TEN).sum(-1)
    return squared_TE.clamp_min(0).sqrt()


def oracle_scores(x_TD: Tensor, weights: ExpertWeights, kind: ScoreKind) -> Tensor:
    """scores_TE computed from the FFN's input by running every neuron, in bounded memory.

    Raises NonFiniteError when an activation is NaN or infinite.
    """
    out_TE = torch.empty(x_TD.shape[0], weights.num_experts, dtype=torch.float32, device=x_TD.device)
    num_bytes = _CHUNK_BYTES if x_TD.is_cuda else _CACHE_BYTES
    for part in token_chunks(x_TD.shape[0], weights.ffn.num_neurons, num_bytes):
        h_TF = weights.ffn.hidden(x_TD[part])
        out_TE[part] = expert_scores(h_TF, weights, kind)
    if not torch.isfinite(out_TE).all():
        raise NonFiniteError(
            "expert scores contain NaN or infinity", "look for overflow in the model's weights or inputs"
        )
    return out_TE


def captured_share(scores_TE: Tensor, mass_TE: Tensor, top_k: int) -> float:
    """Mean over tokens of the share of `mass_TE` held by the `top_k` experts that `scores_TE` ranks highest.

    Tokens without any mass are left out.
    """
    chosen_TK = scores_TE.topk(top_k, dim=-1, sorted=False).indices
    held_T = mass_TE.gather(1, chosen_TK).sum(-1)
    total_T = mass_TE.sum(-1)
    alive = total_T > 0
    return float((held_T[alive] / total_T[alive]).mean()) if bool(alive.any()) else 1.0


def overlap(scores_TE: Tensor, oracle_TE: Tensor, top_k: int) -> float:
    """Mean share of the oracle's `top_k` experts that `scores_TE` picks too."""
    pick = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(top_k, dim=-1).indices, True)
    return float(pick.gather(1, oracle_TE.topk(top_k, dim=-1).indices).float().mean())
