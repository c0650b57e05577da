"""`linear`: ridge regression of the scores on the inputs, in closed form."""

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.ridge import ridge
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.training import RouterKind, RouterSample, RouterTraining, TrainedRouter, watched_share


def linear_router(sample: RouterSample, *, damping: float = 1e-3) -> TrainedRouter:
    """One layer of E outputs; `damping` is relative to the inputs' mean variance."""
    w_ED, b_E = ridge(sample.x_TD, sample.target_TE, damping)
    router = TwoLayerRouter(w_in_RD=w_ED, b_in_R=b_E)
    return TrainedRouter(router, [watched_share(router, sample)])


def _train(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    return [linear_router(sample)]


LINEAR = RouterKind(_train, calibrated=True, score="norm")
