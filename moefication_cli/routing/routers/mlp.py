"""`mlp`: the paper's two-layer router on normalised inputs (MoEfication, section 3.2, arXiv 2110.01786).

Published defects mended: targets are normalised per token and not by the maximum of a mini-batch, the best epoch is
kept, training stops when it stops helping. Starts from the ridge solution and not from the experts' centroids: four
epochs then do what thirty did. `--recipe paper` keeps the published start, schedule and number of epochs.

Axes: T tokens, D model width, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.ridge import ridge
from moefication_cli.routing.router import Router, TwoLayerRouter
from moefication_cli.routing.routers.similarity import expert_centroids
from moefication_cli.routing.training import (
    START_TOKENS,
    RouterKind,
    RouterSample,
    RouterTraining,
    TrainedRouter,
    one_cycle,
    parameters_of,
    step_through,
    trained_copy,
    watched_share,
)


def mlp_router(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> TrainedRouter:
    """The paper's two-layer router on normalised inputs: tanh, then a square matrix.

    Starts from the experts' centroids and the identity where `training` is the published one; else from the ridge
    solution of the targets, which tanh hardly bends, with biases.
    """
    order_T = torch.randperm(len(sample.x_TD), generator=torch.Generator().manual_seed(training.seed))
    order_T = order_T.to(sample.x_TD.device)
    x_TD, target_TE = sample.x_TD.index_select(0, order_T), sample.target_TE.index_select(0, order_T)
    functional.normalize(x_TD, dim=1, out=x_TD)
    target_TE /= target_TE.amax(1, keepdim=True).clamp_min(1e-12)
    eye_EE = torch.eye(weights.num_experts, device=x_TD.device)
    if training.published:
        start = TwoLayerRouter(w_in_RD=expert_centroids(weights), w_out_ER=eye_EE, activation="tanh", normalise=True)
    else:
        mean_E = target_TE[:START_TOKENS].mean(0)
        w_ED, b_E = ridge(x_TD[:START_TOKENS], target_TE[:START_TOKENS], 1e-3)
        # logit(p) is about 4 (p - 1/2)
        start = TwoLayerRouter(w_ED, b_E - mean_E, 4 * eye_EE, 4 * (mean_E - 0.5), activation="tanh", normalise=True)
    return _fit(start, x_TD, target_TE, sample, training)


def _fit(
    start: TwoLayerRouter, x_TD: Tensor, target_TE: Tensor, sample: RouterSample, training: RouterTraining
) -> TrainedRouter:
    """Adam on the cross-entropy of mixed tokens; keeps the epoch with the highest captured share on held-out tokens.

    Tokens come normalised and in random order. Published: mixed anew in every epoch, the rate falling along a cosine;
    else batches are contiguous (nothing is copied) and visited in random order, the rate rising before it falls.
    Raises NonFiniteError when the loss stops being finite.
    """
    parameters = parameters_of(start)
    generator = torch.Generator().manual_seed(training.seed)
    num_tokens, rate, size = len(x_TD), training.learning_rate, training.batch_size
    starts = torch.arange(0, num_tokens, size)
    betas = (0.9, 0.999 if training.published else 0.99)
    optimizer = torch.optim.Adam(parameters.values(), lr=rate, betas=betas, fused=True)
    steps = len(starts) * training.epochs
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if training.published:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate * 0.05)
    else:
        scheduler = one_cycle(optimizer, rate, steps)
    best: Router = start
    history, best_epoch = [watched_share(start, sample)], 0
    for epoch in range(1, training.epochs + 1):
        batches: Sequence[Tensor | slice]
        if training.published:
            batches = torch.randperm(num_tokens, generator=generator).to(x_TD.device).split(size)
        else:
            mixed = starts[torch.randperm(len(starts), generator=generator)].tolist()
            batches = [slice(first, first + size) for first in mixed]
        step_through(
            parameters,
            start,
            x_TD,
            target_TE,
            batches,
            functional.binary_cross_entropy_with_logits,
            optimizer,
            scheduler,
        )
        now = trained_copy(start, parameters)
        history.append(watched_share(now, sample))
        if history[-1] > history[best_epoch]:
            best, best_epoch = now, epoch
        elif epoch - best_epoch >= training.patience:
            break
    return TrainedRouter(best, history, best_epoch)


def _train(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    return [mlp_router(weights, sample, training)]


MLP = RouterKind(_train, defaults=RouterTraining(batch_size=2048, learning_rate=4e-2))
