"""Train one layer's routers from its tokens: targets, the kinds of `ROUTERS`, the calibration curve, what is captured.

Axes: T tokens, D model width, E experts. Pure tensors; saves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import RouterConfig, Score
from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.calibrate import calibration_curve
from moefication_cli.routing.router import Router
from moefication_cli.routing.routers import router_kind, router_settings
from moefication_cli.routing.scores import captured_share, oracle_scores, overlap
from moefication_cli.routing.tokens import Tokens
from moefication_cli.routing.training import RouterKind, RouterSample, TrainedRouter


@dataclass(frozen=True)
class TrainedLayer:
    """What is stored of one layer: the tensors of its routers and of its curve, JSON settings, and metrics."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    metrics: dict[str, Any]


def train_layer(
    config: RouterConfig,
    weights: ExpertWeights,
    train: Tokens,
    heldout: Tokens,
    fractions: Sequence[float],
    seed: int,
) -> TrainedLayer:
    """Routers of one layer for budgets to choose from, its calibration curve, and what the last of them captures.

    Raises ConfigError for too few tokens or an unknown kind, NonFiniteError when scores or the loss are not finite.
    """
    device, kind = weights.ffn.w_up_FD.device, router_kind(config.router)
    train, heldout = train.to(device), heldout.to(device)
    needed = 4 * weights.num_experts
    if kind.learns and len(train) < needed:
        raise ConfigError(
            f"{len(train)} tokens are too few to train a router over {weights.num_experts} experts; "
            f"at least {needed} are needed",
            "collect more with collect-activations --max-tokens, or use fewer experts",
        )
    found, metrics = _train_kind(kind, config, weights, train, heldout, fractions, seed)
    settings: dict[str, Any] = {
        "kind": config.router,
        "score": score_of(config),
        "num_experts": weights.num_experts,
        "num_shared": weights.num_shared,
        "routers": [router_settings(trained.router) for trained in found],
    }
    tensors: dict[str, Tensor] = {}
    for number, trained in enumerate(found):
        tensors |= {f"{number}.{name}": tensor.float() for name, tensor in trained.router.tensors().items()}
    if kind.calibrated:
        fit, judge = (part.sample(config.calibration_tokens, seed) for part in (train, heldout))
        curve = calibration_curve(weights, [trained.router for trained in found], fit, judge)
        tensors |= {f"curve.{name}": value for name, value in vars(curve).items()}
    return TrainedLayer(tensors, settings, metrics)


def score_of(config: RouterConfig) -> Score:
    """The score a router predicts: the one asked for, or its kind's."""
    return config.score or router_kind(config.router).score


def captured(
    router: Router, weights: ExpertWeights, sample: RouterSample, fractions: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """Per fraction of the experts: the held-out share of activation mass (the paper's measure) that this router, the
    oracle and random experts capture, and the router's overlap with the oracle of its own targets.
    """
    x_TD = sample.heldout_x_TD
    mass_TE = oracle_scores(x_TD, weights, "activation")
    random_TE = torch.rand(mass_TE.shape, generator=torch.Generator().manual_seed(seed)).to(mass_TE)
    with torch.inference_mode():
        scores_TE = router.scores(x_TD)
    rows = []
    for fraction in fractions:
        top_k = max(1, round(fraction * weights.num_experts))
        rows.append(
            {
                "fraction": fraction,
                "top_k": top_k,
                "router": captured_share(scores_TE, mass_TE, top_k),
                "oracle": captured_share(mass_TE, mass_TE, top_k),
                "random": captured_share(random_TE, mass_TE, top_k),
                "overlap": overlap(scores_TE, sample.heldout_target_TE, top_k),
            }
        )
    return rows


def _train_kind(
    kind: RouterKind,
    config: RouterConfig,
    weights: ExpertWeights,
    train: Tokens,
    heldout: Tokens,
    fractions: Sequence[float],
    seed: int,
) -> tuple[list[TrainedRouter], dict[str, Any]]:
    """The routers to choose from, the dearest first, and the metrics of the last; their targets are gone afterwards."""
    score = score_of(config)
    scale = train.weight_T.mean().clamp_min(1e-30)

    def targets(part: Tokens) -> Tensor:
        scores_TE = oracle_scores(part.x_TD, weights, score)
        # A contribution router ranks (token, expert) pairs against one threshold: tokens that matter score higher.
        return scores_TE * (part.weight_T / scale).sqrt().unsqueeze(1) if kind.calibrated else scores_TE

    sample = RouterSample(train.x_TD, targets(train), heldout.x_TD, targets(heldout))
    found = kind.train(weights, sample, kind.training(config, seed))
    last = found[-1]
    rows = captured(last.router, weights, sample, fractions, seed)
    metrics = {"captured": rows, "heldout_tokens": len(heldout), "epochs": len(last.history) - 1}
    return found, metrics | {"best_epoch": last.best_epoch, "score": score}
