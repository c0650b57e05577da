"""Make a router from an FFN's inputs and the scores its experts really had. Pure tensors; saves nothing.

    similarity   no training: mean of the experts' normalised rows; the distance the published code uses
    linear       closed-form ridge regression of the scores
    mlp          MoEfication, section 3.2 (arXiv 2110.01786), published defects mended: targets are normalised per token
                 and not by the maximum of a mini-batch, the best epoch is kept, training stops when it stops helping.
                 Starts from the ridge solution and not from the experts' centroids: four epochs then do what thirty did
    regression   low-rank ReLU network that predicts the scores: D2DMoE (arXiv 2310.04361), section 3.2
    quadratic    the same with squared features, for gated FFNs, whose experts depend on products of projections

Axes: T tokens, D model width, E experts, R router width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.errors import NonFiniteError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import ROUTER_ACTIVATIONS, Router
from moefication_cli.routing.scores import captured_share

Loss = Callable[[Tensor, Tensor], Tensor]

_START_TOKENS = 20000  # enough for the closed-form start


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained; `published`: from centroids, with the paper's optimiser."""

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 3e-3
    patience: int = 3
    seed: int = 0
    published: bool = False
    watch_fraction: float = 0.2  # captured share at this active fraction decides the best epoch


@dataclass(frozen=True)
class RouterSample:
    """Tokens of one layer: FFN inputs x_TD and expert scores target_TE, for training and held out by sequence."""

    x_TD: Tensor
    target_TE: Tensor
    heldout_x_TD: Tensor
    heldout_target_TE: Tensor


@dataclass(frozen=True)
class TrainedRouter:
    """A router and its held-out measure after each epoch (0 = before training): captured share, or squared error."""

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


def linear_router(sample: RouterSample, *, damping: float = 1e-3) -> TrainedRouter:
    """Ridge regression of the scores on the inputs, in closed form; `damping` is relative to the mean variance."""
    w_ED, b_E = _ridge(sample.x_TD, sample.target_TE, damping)
    router = Router(w_in_RD=w_ED, b_in_R=b_E)
    return TrainedRouter(router, [_watch(router, sample, RouterTraining.watch_fraction)])


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
        start = Router(w_in_RD=expert_centroids(weights), w_out_ER=eye_EE, activation="tanh", normalise=True)
    else:
        mean_E = target_TE[:_START_TOKENS].mean(0)
        w_ED, b_E = _ridge(x_TD[:_START_TOKENS], target_TE[:_START_TOKENS], 1e-3)
        # logit(p) is about 4 (p - 1/2)
        start = Router(w_ED, b_E - mean_E, 4 * eye_EE, 4 * (mean_E - 0.5), activation="tanh", normalise=True)
    return _train(start, x_TD, target_TE, sample, training)


def regression_router(
    sample: RouterSample, width: int, training: RouterTraining, activation: str = "relu"
) -> TrainedRouter:
    """A d -> R -> E network that predicts the scores, least squares.

    Starts from the leading directions of the ridge solution with the output layer refitted, then AdamW with a one-cycle
    schedule on standardised inputs; the standardisation is folded into the weights. Keeps the best of start and end by
    held-out error.
    """
    generator = torch.Generator().manual_seed(training.seed)
    mean_D, spread_D = sample.x_TD.mean(0), sample.x_TD.std(0).clamp_min(1e-6)
    scale = sample.target_TE.mean().clamp_min(1e-12)
    z_TD, target_TE = (sample.x_TD - mean_D) / spread_D, sample.target_TE / scale
    start = _ridge_start(z_TD[:_START_TOKENS], target_TE[:_START_TOKENS], width, activation, generator)
    held_z_TD, held_TE = (sample.heldout_x_TD - mean_D) / spread_D, sample.heldout_target_TE / scale

    def error(router: Router) -> float:
        with torch.inference_mode():
            return float((router.scores(held_z_TD) - held_TE).square().mean())

    parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items()}
    steps = training.epochs * max(1, len(z_TD) // training.batch_size)
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    history = [error(start)]
    for _ in range(training.epochs):
        order_T = torch.randperm(len(z_TD), generator=generator).to(z_TD.device)
        batches = order_T.split(training.batch_size)[: max(1, len(z_TD) // training.batch_size)]
        _pass(parameters, start, z_TD, target_TE, batches, functional.mse_loss, optimizer, scheduler)
        history.append(error(_with(start, parameters)))
    best_epoch = len(history) - 1 if history[-1] <= history[0] else 0
    best = _with(start, parameters) if best_epoch else start
    assert best.b_in_R is not None
    w_in_RD = best.w_in_RD / spread_D
    return TrainedRouter(replace(best, w_in_RD=w_in_RD, b_in_R=best.b_in_R - w_in_RD @ mean_D), history, best_epoch)


def _ridge_start(z_TD: Tensor, target_TE: Tensor, width: int, activation: str, generator: torch.Generator) -> Router:
    w_ED = _ridge(z_TD, target_TE, 1e-2)[0]
    # Directions of the input that the linear prediction varies along most.
    left_ER = torch.linalg.svd(w_ED @ _covariance_root(z_TD), full_matrices=False).U[:, :width]
    directions_RD = left_ER.T @ w_ED
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
    w_out_ER, b_out_E = _ridge(hidden_TR, target_TE, 1e-3)
    return Router(directions_RD.contiguous(), b_in_R, w_out_ER, b_out_E, activation=activation)


def _covariance_root(x_TD: Tensor) -> Tensor:
    """[D, D] lower triangular; a function of its own, so that the centred inputs are gone before anything else is made."""
    centred_TD = x_TD - x_TD.mean(0)
    covariance_DD = centred_TD.T @ centred_TD / len(x_TD)
    covariance_DD.diagonal().add_(1e-4 * covariance_DD.diagonal().mean() + 1e-9)
    return torch.linalg.cholesky(covariance_DD)


def _ridge(x_TD: Tensor, y_TE: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(w_ED, b_E) of the ridge regression; `damping` is relative to the inputs' mean variance."""
    x_mean_D, y_mean_E = x_TD.mean(0), y_TE.mean(0)
    centred_TD = x_TD - x_mean_D
    gram_DD = centred_TD.T @ centred_TD
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean() + 1e-6)
    w_DE = torch.linalg.solve(gram_DD, centred_TD.T @ (y_TE - y_mean_E))
    return w_DE.T.contiguous(), y_mean_E - x_mean_D @ w_DE


def _with(like: Router, parameters: dict[str, Tensor]) -> Router:
    """The router of these trained parameters."""
    trained: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    return replace(like, **trained)


def _train(
    start: Router, x_TD: Tensor, target_TE: Tensor, sample: RouterSample, training: RouterTraining
) -> TrainedRouter:
    """Adam on the cross-entropy of mixed tokens; keeps the epoch with the highest captured share on held-out tokens.

    Tokens come normalised and in random order. Published: mixed anew in every epoch, the rate falling along a cosine;
    else batches are contiguous (nothing is copied) and visited in random order, the rate rising before it falls.
    Raises NonFiniteError when the loss stops being finite.
    """
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items()}
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
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    best, history, best_epoch = start, [_watch(start, sample, training.watch_fraction)], 0
    for epoch in range(1, training.epochs + 1):
        batches: Sequence[Tensor | slice]
        if training.published:
            batches = torch.randperm(num_tokens, generator=generator).to(x_TD.device).split(size)
        else:
            mixed = starts[torch.randperm(len(starts), generator=generator)].tolist()
            batches = [slice(first, first + size) for first in mixed]
        _pass(
            parameters,
            start,
            x_TD,
            target_TE,
            batches,
            functional.binary_cross_entropy_with_logits,
            optimizer,
            scheduler,
        )
        now = _with(start, parameters)
        history.append(_watch(now, sample, training.watch_fraction))
        if history[-1] > history[best_epoch]:
            best, best_epoch = now, epoch
        elif epoch - best_epoch >= training.patience:
            break
    return TrainedRouter(best, history, best_epoch)


def _pass(
    parameters: dict[str, Tensor],
    like: Router,
    x_TD: Tensor,
    target_TE: Tensor,
    batches: Sequence[Tensor | slice],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One pass over the tokens, a step per batch of indices. Raises NonFiniteError when the last loss is not finite."""
    for index_B in batches:
        value = loss(_raw_scores(parameters, like, x_TD[index_B]), target_TE[index_B])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        scheduler.step()
    if not torch.isfinite(value):
        raise NonFiniteError("the router's loss is not finite", "lower --learning-rate or check the activations")


def _raw_scores(parameters: dict[str, Tensor], like: Router, x_TD: Tensor) -> Tensor:
    z_TR = functional.linear(x_TD, parameters["w_in_RD"], parameters.get("b_in_R"))
    z_TR = ROUTER_ACTIVATIONS[like.activation](z_TR)
    if "w_out_ER" not in parameters:
        return z_TR
    return functional.linear(z_TR, parameters["w_out_ER"], parameters.get("b_out_E"))


def _watch(router: Router, sample: RouterSample, fraction: float) -> float:
    top_k = max(1, round(fraction * router.num_experts))
    with torch.inference_mode():
        return captured_share(router.scores(sample.heldout_x_TD), sample.heldout_target_TE, top_k)
