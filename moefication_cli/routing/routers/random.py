"""`random`: experts drawn by a random linear form; what any training must beat."""

import torch

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.training import RouterKind, RouterSample, RouterTraining, TrainedRouter


def _train(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    generator = torch.Generator().manual_seed(training.seed)
    w_in_RD = torch.randn(weights.num_experts, weights.ffn.d_model, generator=generator)
    return [TrainedRouter(TwoLayerRouter(w_in_RD=w_in_RD.to(sample.x_TD)))]


RANDOM = RouterKind(_train, learns=False)
