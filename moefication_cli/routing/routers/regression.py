"""`regression` and `quadratic`: low-rank networks that predict each expert's score, least squares.

    regression   d -> R -> E with ReLU: D2DMoE (arXiv 2310.04361), section 3.2
    quadratic    the same with squared features, for gated FFNs, whose experts depend on products of projections

Axes: T tokens, D model width, E experts, R router width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.ridge import ridge
from moefication_cli.routing.router import ROUTER_ACTIVATIONS, Router, TwoLayerRouter
from moefication_cli.routing.routers.linear import linear_router
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
)


@dataclass(frozen=True)
class _Standardised:
    """A sample in units in which every input varies alike and scores are about 1, and where its routers start.

    `directions_RD` are those of the inputs that the best linear prediction varies along, most first.
    """

    sample: RouterSample
    mean_D: Tensor
    spread_D: Tensor
    directions_RD: Tensor

    @classmethod
    def of(cls, sample: RouterSample) -> "_Standardised":
        mean_D = sample.x_TD.mean(0)
        z_TD = sample.x_TD - mean_D
        # As `std`, which takes three times as long over the first axis
        spread_D = (z_TD.square().sum(0) / max(1, len(z_TD) - 1)).sqrt().clamp_min(1e-6)
        z_TD /= spread_D
        scale = sample.target_TE.mean().clamp_min(1e-12)
        standard = RouterSample(
            z_TD,
            sample.target_TE / scale,
            (sample.heldout_x_TD - mean_D) / spread_D,
            sample.heldout_target_TE / scale,
        )
        first_TD = z_TD[:START_TOKENS]
        w_ED = ridge(first_TD, standard.target_TE[:START_TOKENS], 1e-2)[0]
        left_ER = torch.linalg.svd(w_ED @ _covariance_root(first_TD), full_matrices=False).U
        return cls(standard, mean_D, spread_D, left_ER.T @ w_ED)


def _regression_router(
    standard: _Standardised, width: int, training: RouterTraining, activation: str = "relu"
) -> TrainedRouter:
    """A d -> R -> E network that predicts the scores, least squares.

    Starts from the leading directions of the ridge solution with the output layer refitted, then AdamW with a one-cycle
    schedule on standardised inputs; the standardisation is folded into the weights. Keeps the best of start and end by
    held-out error.
    """
    generator = torch.Generator().manual_seed(training.seed)
    sample = standard.sample
    z_TD, target_TE = sample.x_TD, sample.target_TE
    start = _start(standard, width, activation, generator)

    def error(router: Router) -> float:
        with torch.inference_mode():
            return float((router.scores(sample.heldout_x_TD) - sample.heldout_target_TE).square().mean())

    parameters = parameters_of(start)
    steps = training.epochs * max(1, len(z_TD) // training.batch_size)
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=1e-3, fused=True)
    scheduler = one_cycle(optimizer, training.learning_rate, steps)
    history = [error(start)]
    for _ in range(training.epochs):
        order_T = torch.randperm(len(z_TD), generator=generator).to(z_TD.device)
        batches = order_T.split(training.batch_size)[: max(1, len(z_TD) // training.batch_size)]
        step_through(parameters, start, z_TD, target_TE, batches, functional.mse_loss, optimizer, scheduler)
        history.append(error(trained_copy(start, parameters)))
    best_epoch = len(history) - 1 if history[-1] <= history[0] else 0
    best = trained_copy(start, parameters) if best_epoch else start
    assert best.b_in_R is not None
    w_in_RD = best.w_in_RD / standard.spread_D
    router = replace(best, w_in_RD=w_in_RD, b_in_R=best.b_in_R - w_in_RD @ standard.mean_D)
    return TrainedRouter(router, history, best_epoch)


def _start(standard: _Standardised, width: int, activation: str, generator: torch.Generator) -> TwoLayerRouter:
    z_TD, target_TE = standard.sample.x_TD[:START_TOKENS], standard.sample.target_TE[:START_TOKENS]
    directions_RD = standard.directions_RD[:width]
    noise_RD = torch.randn(width, z_TD.shape[1], generator=generator).to(z_TD)
    if len(directions_RD) < width:
        more = noise_RD[len(directions_RD) :] * directions_RD.std()
        directions_RD = torch.cat([directions_RD, more])
    directions_RD = directions_RD / (z_TD @ directions_RD.T).std(0).clamp_min(1e-9).unsqueeze(1)
    b_in_R = -(directions_RD @ z_TD.mean(0))
    if activation == "relu":
        sign_R1 = torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0).to(z_TD).unsqueeze(1)
        directions_RD = directions_RD * sign_R1 + noise_RD * (0.3 / z_TD.shape[1] ** 0.5)
        b_in_R = -(directions_RD @ z_TD.mean(0)) + 0.5 * torch.randn(width, generator=generator).to(z_TD)
    hidden_TR = ROUTER_ACTIVATIONS[activation](functional.linear(z_TD, directions_RD, b_in_R))
    w_out_ER, b_out_E = ridge(hidden_TR, target_TE, 1e-3)
    return TwoLayerRouter(directions_RD.contiguous(), b_in_R, w_out_ER, b_out_E, activation=activation)


def _covariance_root(x_TD: Tensor) -> Tensor:
    """[D, D] lower triangular; a function of its own, so that the centred inputs are gone before anything else is made."""
    centred_TD = x_TD - x_TD.mean(0)
    covariance_DD = centred_TD.T @ centred_TD / len(x_TD)
    covariance_DD.diagonal().add_(1e-4 * covariance_DD.diagonal().mean() + 1e-9)
    return torch.linalg.cholesky(covariance_DD)


def _widths(weights: ExpertWeights, training: RouterTraining) -> list[int]:
    """The width asked for, or a narrow and a wide one that budgets choose between."""
    if training.width is not None:
        return [training.width]
    d_model = weights.ffn.d_model
    return [max(4, min(64, d_model // 24)), max(12, min(256, d_model // 8))]


def _train_regression(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    found = _train_widths(weights, sample, training, "relu")
    if training.width is None:
        found.insert(0, linear_router(sample))  # dearer, and better where a narrow network cannot tell experts apart
    return found


def _train_quadratic(weights: ExpertWeights, sample: RouterSample, training: RouterTraining) -> list[TrainedRouter]:
    return _train_widths(weights, sample, training, "square")


def _train_widths(
    weights: ExpertWeights, sample: RouterSample, training: RouterTraining, activation: str
) -> list[TrainedRouter]:
    standard = _Standardised.of(sample)
    return [_regression_router(standard, width, training, activation) for width in _widths(weights, training)]


REGRESSION = RouterKind(_train_regression, calibrated=True, score="norm")
QUADRATIC = RouterKind(_train_quadratic, calibrated=True, score="norm")
