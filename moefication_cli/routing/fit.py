"""Make a router from an FFN's inputs and the scores its experts really had. Pure tensors; saves nothing.

    similarity   no training: mean of the experts' normalised rows; the distance the published code uses
    linear       closed-form ridge regression of the scores
    mlp          MoEfication, section 3.2 (arXiv 2110.01786), published defects mended: targets are normalised per token
                 and not by the maximum of a mini-batch, the best epoch is kept, training stops when it stops helping
    regression   low-rank ReLU network that predicts the scores: D2DMoE (arXiv 2310.04361), section 3.2
    quadratic    the same with squared features, for gated FFNs, whose experts depend on products of projections

Axes: T tokens, D model width, E experts, R router width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.errors import NonFiniteError
from moefication_cli.routing.router import ROUTER_ACTIVATIONS, Router
from moefication_cli.routing.scores import captured_share
from moefication_cli.runtime.weights import ExpertWeights


@dataclass(frozen=True)
class Training:
    """How a router is trained; the defaults are measured choices, `paper` holds the published ones."""

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 3e-3
    patience: int = 3
    seed: int = 0
    watch_fraction: float = 0.2  # captured share at this active fraction decides the best epoch


@dataclass(frozen=True)
class Sample:
    """Tokens of one layer: FFN inputs x_TD and expert scores target_TE, for training and held out by sequence."""

    x_TD: Tensor
    target_TE: Tensor
    heldout_x_TD: Tensor
    heldout_target_TE: Tensor


@dataclass(frozen=True)
class Fitted:
    """A router and how it came about: captured share on held-out tokens after each epoch (0 = before training)."""

    router: Router
    history: list[float] = field(default_factory=list)
    best_epoch: int = 0


def expert_centroids(weights: ExpertWeights) -> Tensor:
    """centroids_ED: mean of each expert's L2-normalised rows (gate rows where gated: they decide what fires)."""
    rows_FD = weights.ffn.w_up_FD if weights.ffn.w_gate_FD is None else weights.ffn.w_gate_FD
    rows_FD = functional.normalize(rows_FD[weights.num_shared :].float(), dim=1)
    return rows_FD.unflatten(0, (weights.num_experts, weights.expert_size)).mean(1)


def similarity_router(weights: ExpertWeights) -> Router:
    """Rank experts by -||x/||x|| - c_e||, the distance of the published code, as a linear form with a bias."""
    centroids_ED = expert_centroids(weights)
    return Router(w_in_RD=2 * centroids_ED, b_in_R=-centroids_ED.square().sum(1), normalise=True)


def linear_router(sample: Sample, *, damping: float = 1e-3) -> Fitted:
    """Ridge regression of the scores on the inputs, in closed form; `damping` is relative to the mean variance."""
    x_mean_D, y_mean_E = sample.x_TD.mean(0), sample.target_TE.mean(0)
    x_TD = sample.x_TD - x_mean_D
    gram_DD = x_TD.T @ x_TD
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean() + 1e-6)
    w_DE = torch.linalg.solve(gram_DD, x_TD.T @ (sample.target_TE - y_mean_E))
    router = Router(w_in_RD=w_DE.T.contiguous(), b_in_R=y_mean_E - x_mean_D @ w_DE)
    return Fitted(router, [_watch(router, sample, Training.watch_fraction)])


def mlp_router(weights: ExpertWeights, sample: Sample, training: Training) -> Fitted:
    """The paper's two-layer router on normalised inputs, started from the experts' centroids and the identity."""
    start = Router(
        w_in_RD=expert_centroids(weights),
        w_out_ER=torch.eye(weights.num_experts, device=sample.x_TD.device),
        activation="tanh",
        normalise=True,
    )
    peak_T1 = sample.target_TE.amax(1, keepdim=True).clamp_min(1e-12)
    return train(start, sample, sample.target_TE / peak_T1, functional.binary_cross_entropy_with_logits, training)


def regression_router(sample: Sample, width: int, training: Training, activation: str = "relu") -> Fitted:
    """A d -> R -> E network that predicts the scores, least squares; inputs are standardised inside the weights."""
    generator = torch.Generator().manual_seed(training.seed)
    d_model, num_experts = sample.x_TD.shape[1], sample.target_TE.shape[1]
    scale = sample.target_TE.mean().clamp_min(1e-12)
    spread_D = sample.x_TD.std(0).clamp_min(1e-6)
    w_in_RD = torch.randn(width, d_model, generator=generator).to(spread_D) / (spread_D * d_model**0.5)
    start = Router(
        w_in_RD=w_in_RD,
        b_in_R=-(w_in_RD @ sample.x_TD.mean(0)),
        w_out_ER=(torch.randn(num_experts, width, generator=generator) * (0.1 / width**0.5)).to(spread_D),
        b_out_E=sample.target_TE.mean(0) / scale,
        activation=activation,
    )
    return train(start, sample, sample.target_TE / scale, functional.mse_loss, training)


def train(
    start: Router, sample: Sample, target_TE: Tensor, loss: Callable[[Tensor, Tensor], Tensor], training: Training
) -> Fitted:
    """Adam over shuffled tokens; keeps the epoch with the highest captured share on held-out tokens.

    Raises NonFiniteError when the loss stops being finite.
    """
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=training.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(training.seed)
    num_tokens = sample.x_TD.shape[0]
    steps = max(1, -(-num_tokens // training.batch_size)) * training.epochs
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=training.learning_rate * 0.05)

    # Normalising all inputs once is cheaper than once per epoch.
    x_TD = functional.normalize(sample.x_TD, dim=1) if start.normalise else sample.x_TD
    best, history, best_epoch = start, [_watch(start, sample, training.watch_fraction)], 0
    for epoch in range(1, training.epochs + 1):
        for index_B in torch.randperm(num_tokens, generator=generator).to(x_TD.device).split(training.batch_size):
            value = loss(_raw_scores(parameters, start, x_TD[index_B]), target_TE[index_B])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            scheduler.step()
        if not torch.isfinite(value):
            raise NonFiniteError("the router's loss is not finite", "lower --learning-rate or check the activations")
        now = Router(
            **{name: tensor.detach().clone() for name, tensor in parameters.items()},
            activation=start.activation,
            normalise=start.normalise,
        )
        history.append(_watch(now, sample, training.watch_fraction))
        if history[-1] > history[best_epoch]:
            best, best_epoch = now, epoch
        elif epoch - best_epoch >= training.patience:
            break
    return Fitted(best, history, best_epoch)


def _raw_scores(parameters: dict[str, Tensor], like: Router, x_TD: Tensor) -> Tensor:
    z_TR = functional.linear(x_TD, parameters["w_in_RD"], parameters.get("b_in_R"))
    z_TR = ROUTER_ACTIVATIONS[like.activation](z_TR)
    if "w_out_ER" not in parameters:
        return z_TR
    return functional.linear(z_TR, parameters["w_out_ER"], parameters.get("b_out_E"))


def _watch(router: Router, sample: Sample, fraction: float) -> float:
    top_k = max(1, round(fraction * router.num_experts))
    with torch.inference_mode():
        return captured_share(router.scores(sample.heldout_x_TD), sample.heldout_target_TE, top_k)
