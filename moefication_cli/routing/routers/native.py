"""`native`: a linear router without a bias, the one form that the MoE formats of other engines hold (see `export`)."""

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.ridge import ridge
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.training import RouterKind, RouterSample, RouterTraining, TrainedRouter, watched_share

_DAMPING = 1e-3  # relative to the inputs' mean square


def _train(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    # Ridge regression through the origin; of each token's scores only the order counts, so they are centred per token
    target_TE = sample.target_TE - sample.target_TE.mean(1, keepdim=True)
    router = TwoLayerRouter(ridge(sample.x_TD, target_TE, _DAMPING, intercept=False)[0])
    return [TrainedRouter(router, [watched_share(router, sample)])]


NATIVE = RouterKind(_train, score="norm")
