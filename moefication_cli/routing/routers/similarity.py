"""`similarity`: no training; experts are ranked by how near the token is to the mean of their rows.

The distance of the published code (github.com/thunlp/MoEfication). Axes: D model width, E experts.
"""

from torch import Tensor
from torch.nn import functional

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.training import RouterKind, RouterSample, RouterTraining, TrainedRouter


def expert_centroids(weights: ExpertWeights) -> Tensor:
    """centroids_ED: mean of each expert's L2-normalised rows (gate rows where gated: they decide what fires)."""
    rows_FD = weights.ffn.w_up_FD if weights.ffn.w_gate_FD is None else weights.ffn.w_gate_FD
    rows_FD = functional.normalize(rows_FD[weights.num_shared :].float(), dim=1)
    return rows_FD.unflatten(0, (weights.num_experts, weights.expert_size)).mean(1)


def similarity_router(weights: ExpertWeights) -> TwoLayerRouter:
    """Rank experts by -||x/||x|| - c_e||, the distance of the published code, as a linear form with a bias."""
    centroids_ED = expert_centroids(weights)
    return TwoLayerRouter(w_in_RD=2 * centroids_ED, b_in_R=-centroids_ED.square().sum(1), normalise=True)


def _train(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    return [TrainedRouter(similarity_router(weights))]


SIMILARITY = RouterKind(_train, learns=False)
