"""What each neuron does over many tokens: one pass over the activations for all its sums.

Four sums with torch take ten passes over memory, a tenth of the time of a small model's forward pass. On a GPU, where
memory is fast, torch computes them. Axes: T tokens, F neurons.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefication_cli.ffn import FFNWeights
from moefication_cli.split.kmeans_cpu import compiled

Array = np.ndarray[Any, Any]
_BLOCK = 512
PATTERN_SHARE = 0.2  # of the neurons that a token keeps in its pattern


@compiled
def _add_rows(h_TF: Array, sums_4F: Array) -> None:
    """float32, rows contiguous. In blocks of neurons whose sums stay in the nearest cache; slices, so that it vectorises."""
    tokens, neurons = h_TF.shape
    for first in range(0, neurons, _BLOCK):
        last = min(first + _BLOCK, neurons)
        active_B, sum_B = sums_4F[0, first:last], sums_4F[1, first:last]
        square_B, absolute_B = sums_4F[2, first:last], sums_4F[3, first:last]
        for t in range(tokens):
            h_B = h_TF[t, first:last]
            for f in range(last - first):
                active_B[f] += np.float32(1) if h_B[f] > 0 else np.float32(0)
                sum_B[f] += h_B[f]
                square_B[f] += h_B[f] * h_B[f]
                absolute_B[f] += abs(h_B[f])


def neuron_sums(h_TF: Tensor) -> Tensor:
    """[4, F] float64 on the CPU, over the tokens: how many activations are positive, their sum, squares, magnitudes."""
    h_TF = h_TF.float()
    if h_TF.is_cpu:
        sums_4F = torch.zeros(4, h_TF.shape[1])
        _add_rows(h_TF.contiguous().numpy(), sums_4F.numpy())
    else:
        sums_4F = torch.stack([(h_TF > 0).sum(0), h_TF.sum(0), h_TF.square().sum(0), h_TF.abs().sum(0)])
    return sums_4F.double().cpu()


def contribution_profile(weights: FFNWeights, x_TD: Tensor, weight_T: Tensor) -> Tensor:
    """profile_FT: |h_n| * ||w_down_n|| of every neuron at every token, times the root of how much the token matters."""
    h_TF = weights.hidden(x_TD.to(weights.w_up_FD.device))
    root_T1 = (weight_T / weight_T.mean().clamp_min(1e-30)).sqrt().unsqueeze(1).to(h_TF)
    return (h_TF.abs() * weights.w_down_FD.norm(dim=1) * root_T1).T.contiguous()


def keep_pattern(profile_FT: Tensor) -> Tensor:
    """pattern_FT: 1 where the neuron is among the PATTERN_SHARE that contribute most at a token, else 0.

    Source: keep patterns as CMoE (arXiv 2502.04416) clusters them, by contribution and not by activation.
    """
    count = max(1, round(PATTERN_SHARE * len(profile_FT)))
    return (profile_FT >= profile_FT.topk(count, dim=0).values[-1]).to(profile_FT)


def by_importance(expert_F: Tensor, importance_F: Tensor) -> Tensor:
    """The same experts, numbered from the most important one down; importance is summed over an expert's neurons."""
    total_E = torch.zeros(int(expert_F.max()) + 1, dtype=torch.float64)
    total_E.index_add_(0, expert_F.cpu(), importance_F.double().cpu())
    number_E = torch.empty_like(total_E, dtype=torch.int64)
    number_E[total_E.argsort(descending=True, stable=True)] = torch.arange(len(total_E))
    return number_E[expert_F.cpu()]
