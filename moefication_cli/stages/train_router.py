"""train-router: make each layer's router from its collected inputs. Reads `activations`, `split` and the model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import RouterConfig, Score
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.calibrate import calibration_curve
from moefication_cli.routing.fit import (
    RouterSample,
    RouterTraining,
    TrainedRouter,
    linear_router,
    mlp_router,
    regression_router,
    similarity_router,
)
from moefication_cli.routing.router import Router
from moefication_cli.routing.scores import captured_share, oracle_scores, overlap
from moefication_cli.runs.control import Control, Result, parse_fractions
from moefication_cli.runs.estimate import estimate, ffn_bytes, total_ffn_flops
from moefication_cli.runs.inputs import (
    RunModel,
    Tokens,
    expert_weights,
    layer_options,
    layer_seed,
    layered_result,
    open_model,
    read_partition,
    read_tokens,
)
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

# The published training (github.com/thunlp/MoEfication), its defects mended as routing/fit.py says.
_PAPER = {"epochs": 30, "batch_size": 512, "learning_rate": 1e-2, "patience": 30, "published": True}
_TOKEN_BYTES = 768 * 2**20  # so that a layer of a 7B model fits beside its weights in a few GiB
_CANDIDATES = 65  # of a calibration curve with three routers
# Routers that predict contributions: calibrated thresholds, budgets and compensation go with them.
CALIBRATED = ("regression", "quadratic", "linear")


def train_router(run: RunDir, config: RouterConfig, control: Control) -> Result:
    """Fit one router per layer; keeps the held-out captured share of router, oracle and random at each fraction.

    Writes RUN/router/<name>/layer_NNN.safetensors. Raises MissingArtifactError, StaleArtifactError, NonFiniteError.
    """
    model = open_model(run, None, control)
    fractions = parse_fractions(config.fractions)
    activations, split = run.require("activations"), run.require("split")
    if control.dry_run:
        d_model, neurons = (max(getattr(site, name) for site in model.sites) for name in ("d_model", "num_neurons"))
        experts = max(layer["num_experts"] for layer in split.metrics["layers"])
        collected = max(layer["tokens"] for layer in activations.metrics["layers"])
        tokens = min(collected, config.max_tokens or tokens_in_memory(d_model, experts))
        width = config.width or d_model // 8
        # Every candidate of the calibration curve: what it drops, and a regression on the FFN's inputs
        calibrating = 2.0 * _CANDIDATES * config.calibration_tokens * d_model * (d_model + neurons)
        return estimate(
            "train-router",
            run,
            model,
            writes=run.path(f"router/{config.router}"),
            num_bytes=4.0 * width * (d_model + experts) * len(model.sites),
            flops=total_ffn_flops(model, tokens)
            + 6.0 * tokens * width * (d_model + experts) * (config.epochs or 6) * len(model.sites)
            + (calibrating * len(model.sites) if config.router in CALIBRATED else 0.0),
            memory=2 * ffn_bytes(model) + 8.0 * tokens * (d_model + experts),
            reads={"activations": activations, "split": split},
        )
    options = layer_options(config, control, model, {"activations": activations, "split": split})
    with control.ranks.begin(run, f"router/{config.router}", **options) as work:
        for index in control.track(work.pending(), "train-router", len(model.sites)):
            record = _train_index(model, activations, split, index, config, fractions, control)
            work.save(index, record.tensors, record.settings, metrics=record.metrics)
        manifest = control.ranks.finish(work)
    return layered_result("train-router", work, manifest)


def _train_index(
    model: RunModel,
    activations: Artifact,
    split: Artifact,
    index: int,
    config: RouterConfig,
    fractions: list[float],
    control: Control,
) -> "Record":
    """Reads one layer and trains its routers; a function of its own, so that the layer is gone before the next is read."""
    where, seed = f"layer {index} ({model.names[index]})", layer_seed(control.seed, index)
    weights = expert_weights(model.read_ffn(index), read_partition(split, index))
    train, heldout = training_tokens(config, weights, activations, index, seed)
    used = len(train) + len(heldout)
    if config.max_tokens is None and used < activations.metrics["layers"][index]["tokens"]:
        control.say(f"{where}: trains on {used} tokens, which is what memory is meant for (--max-tokens)")
    try:
        record = train_layer(config, weights, train, heldout, fractions, seed)
    except (ConfigError, NonFiniteError) as error:
        raise type(error)(f"{where}: {error.message}", error.hint) from None
    if any(row["router"] <= row["random"] for row in record.metrics["captured"] if row["fraction"] < 1):
        control.say(f"warning: {where}: the router is no better than random")
    return record


def tokens_in_memory(d_model: int, num_experts: int) -> int:
    """Tokens whose inputs and targets, and one copy of both, fit the working memory: 131,072 up to D + E = 768."""
    return _TOKEN_BYTES // (2 * 4 * (d_model + num_experts))


def training_tokens(
    config: RouterConfig, weights: ExpertWeights, activations: Artifact, index: int, seed: int
) -> tuple[Tokens, Tokens]:
    """(training, held-out) tokens of one layer: `max_tokens` of them, or what fits the working memory."""
    count = config.max_tokens or tokens_in_memory(weights.ffn.d_model, weights.num_experts)
    tokens = read_tokens(activations, index, count, seed)
    return tokens.split_heldout(config.heldout_fraction, seed)


@dataclass(frozen=True)
class Record:
    """What is stored of one trained layer."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    metrics: dict[str, Any]


def train_layer(
    config: RouterConfig, weights: ExpertWeights, train: Tokens, heldout: Tokens, fractions: list[float], seed: int
) -> Record:
    """Routers of one layer for budgets to choose from, its calibration curve, and what the last of them captures."""
    device = weights.ffn.w_up_FD.device
    train, heldout = train.to(device), heldout.to(device)
    needed = 4 * weights.num_experts
    if len(train) < needed and config.router not in ("random", "similarity"):
        raise ConfigError(
            f"{len(train)} tokens are too few to train a router over {weights.num_experts} experts; "
            f"at least {needed} are needed",
            "collect more with collect-activations --max-tokens, or use fewer experts",
        )
    found, metrics = _fit_all(config, weights, train, heldout, fractions, seed)
    settings: dict[str, Any] = {
        "kind": config.router,
        "score": score_kind(config),
        "num_experts": weights.num_experts,
        "num_shared": weights.num_shared,
        "routers": [{"activation": f.router.activation, "normalise": f.router.normalise} for f in found],
    }
    tensors: dict[str, Tensor] = {}
    for number, fitted in enumerate(found):
        tensors |= {f"{number}.{name}": tensor.float() for name, tensor in fitted.router.tensors().items()}
    if config.router in CALIBRATED:
        count = config.calibration_tokens
        curve = calibration_curve(
            weights,
            [fitted.router for fitted in found],
            train.sample(count, seed).calibration(),
            heldout.sample(count, seed).calibration(),
        )
        tensors |= {f"curve.{name}": value for name, value in vars(curve).items()}
    return Record(tensors, settings, metrics)


def _fit_all(
    config: RouterConfig, weights: ExpertWeights, train: Tokens, heldout: Tokens, fractions: list[float], seed: int
) -> tuple[list[TrainedRouter], dict[str, Any]]:
    """The routers to choose from, the dearest first, and the metrics of the last; their targets are gone afterwards."""
    score, calibrated = score_kind(config), config.router in CALIBRATED
    scale = train.weight_T.mean().clamp_min(1e-30)

    def targets(part: Tokens) -> Tensor:
        scores_TE = oracle_scores(part.x_TD, weights, score)
        # A contribution router ranks (token, expert) pairs against one threshold: tokens that matter score higher.
        return scores_TE * (part.weight_T / scale).sqrt().unsqueeze(1) if calibrated else scores_TE

    sample = RouterSample(train.x_TD, targets(train), heldout.x_TD, targets(heldout))
    found = [fit(config, weights, sample, seed, width) for width in router_widths(config, weights)]
    if config.router == "regression" and config.width is None:
        found.insert(0, linear_router(sample))  # dearer, and better where a narrow network cannot tell experts apart
    metrics = measure(found[-1].router, weights, sample, fractions, seed)
    return found, metrics | {"epochs": len(found[-1].history) - 1, "best_epoch": found[-1].best_epoch, "score": score}


def router_widths(config: RouterConfig, weights: ExpertWeights) -> list[int]:
    """Hidden widths to train: the one asked for, or a narrow and a wide one that budgets choose between."""
    if config.router not in ("regression", "quadratic"):
        return [0]
    if config.width is not None:
        return [config.width]
    d_model = weights.ffn.d_model
    return [max(4, min(64, d_model // 24)), max(12, min(256, d_model // 8))]


def score_kind(config: RouterConfig) -> Score:
    """The score a router predicts: the paper's sum of activations for its own routers, contribution norm otherwise."""
    return config.score or ("norm" if config.router in CALIBRATED else "activation")


def fit(config: RouterConfig, weights: ExpertWeights, sample: RouterSample, seed: int, width: int) -> TrainedRouter:
    """The router of one layer, of the kind the config names."""
    mlp = config.router == "mlp"
    options: dict[str, Any] = {"batch_size": config.batch_size or (2048 if mlp else 1024), "patience": config.patience}
    options["epochs"] = config.epochs or (4 if mlp else 6)
    options["learning_rate"] = config.learning_rate or (4e-2 if mlp else 1e-2)
    if config.recipe == "paper":
        options |= _PAPER
    training = RouterTraining(**options, seed=seed)
    if config.router == "similarity":
        return TrainedRouter(similarity_router(weights))
    if config.router == "linear":
        return linear_router(sample)
    if mlp:
        return mlp_router(weights, sample, training)
    if config.router == "random":
        generator = torch.Generator().manual_seed(seed)
        w_in_RD = torch.randn(weights.num_experts, weights.ffn.d_model, generator=generator)
        return TrainedRouter(Router(w_in_RD=w_in_RD.to(sample.x_TD)))
    return regression_router(sample, width, training, "square" if config.router == "quadratic" else "relu")


def measure(
    router: Router, weights: ExpertWeights, sample: RouterSample, fractions: list[float], seed: int
) -> dict[str, Any]:
    """Held-out captured share of activation mass (the paper's measure) and overlap with the oracle, per fraction."""
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
    return {"captured": rows, "heldout_tokens": len(x_TD)}
