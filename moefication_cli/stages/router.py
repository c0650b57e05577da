"""train-router: make each layer's router from its collected inputs. Reads `activations`, `split` and the model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import RouterConfig, Score
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.routing.fit import (
    Fitted,
    Sample,
    Training,
    linear_router,
    mlp_router,
    regression_router,
    similarity_router,
)
from moefication_cli.routing.router import Router
from moefication_cli.routing.scores import captured_share, oracle_scores, overlap
from moefication_cli.runtime.weights import ExpertWeights
from moefication_cli.stages.contract import Control, Result, parse_fractions
from moefication_cli.stages.estimate import estimate, ffn_bytes, total_ffn_flops
from moefication_cli.stages.inputs import (
    Tokens,
    begin_options,
    expert_weights,
    layer_seed,
    layered_result,
    open_model,
    read_partition,
    read_tokens,
)
from moefication_cli.store.rundir import RunDir

# The published training (github.com/thunlp/MoEfication), its defects mended as routing/fit.py says.
_PAPER = {"epochs": 30, "batch_size": 512, "learning_rate": 1e-2, "patience": 30}
_LEARNING_RATES = {"mlp": 1e-2, "regression": 3e-3, "quadratic": 3e-3}
_WIDTH_SHARE = 8  # default router width is d_model / 8, at least 16
QUANTILES = 1001  # grid on which the scores' distribution is stored, for thresholds at any fraction


def train_router(run: RunDir, config: RouterConfig, control: Control) -> Result:
    """Fit one router per layer; keeps the held-out captured share of router, oracle and random at each fraction.

    Writes RUN/router/<name>/layer_NNN.safetensors. Raises MissingArtifactError, StaleArtifactError, NonFiniteError.
    """
    model = open_model(run, None, control)
    fractions = parse_fractions(config.fractions)
    activations, split = run.require("activations"), run.require("split")
    if control.dry_run:
        tokens = config.max_tokens or max(layer["tokens"] for layer in activations.metrics["layers"])
        d_model = max(site.d_model for site in model.sites)
        experts = max(layer["num_experts"] for layer in split.metrics["layers"])
        width = config.width or max(16, d_model // _WIDTH_SHARE)
        return estimate(
            "train-router",
            run,
            model,
            writes=run.path(f"router/{config.router}"),
            num_bytes=4.0 * width * (d_model + experts) * len(model.sites),
            flops=total_ffn_flops(model, tokens)
            + 6.0 * tokens * width * (d_model + experts) * config.epochs * len(model.sites),
            memory=ffn_bytes(model) + 8.0 * tokens * (d_model + experts),
            reads={"activations": activations, "split": split},
        )
    options = begin_options(config, control, model, {"activations": activations, "split": split})
    with run.begin(f"router/{config.router}", **options) as work:
        for index in control.track(work.pending(), "train-router", len(model.sites)):
            seed = layer_seed(control.seed, index)
            weights = expert_weights(model.read_ffn(index), read_partition(split, index))
            tokens = read_tokens(activations, index, config.max_tokens, seed)
            where = f"layer {index} ({model.names[index]})"
            try:
                record = train_layer(config, weights, tokens, fractions, seed)
            except (ConfigError, NonFiniteError) as error:
                raise type(error)(f"{where}: {error.message}", error.hint) from None
            if any(row["router"] <= row["random"] for row in record.metrics["captured"] if row["fraction"] < 1):
                control.say(f"warning: {where}: the router is no better than random")
            work.save(index, record.tensors, record.settings, metrics=record.metrics)
        manifest = work.finish()
    return layered_result("train-router", work, manifest)


@dataclass(frozen=True)
class _Record:
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    metrics: dict[str, Any]


def train_layer(
    config: RouterConfig, weights: ExpertWeights, tokens: Tokens, fractions: list[float], seed: int
) -> _Record:
    device, score = weights.ffn.w_up_FD.device, score_kind(config)
    train, heldout = tokens.split_heldout(config.heldout_fraction, seed)
    needed = 4 * weights.num_experts
    if len(train.x_TD) < needed and config.router not in ("random", "similarity"):
        raise ConfigError(
            f"{len(train.x_TD)} tokens are too few to train a router over {weights.num_experts} experts; "
            f"at least {needed} are needed",
            "collect more with collect-activations --max-tokens, or use fewer experts",
        )
    train_x_TD, heldout_x_TD = train.x_TD.to(device), heldout.x_TD.to(device)
    sample = Sample(
        train_x_TD,
        oracle_scores(train_x_TD, weights, score),
        heldout_x_TD,
        oracle_scores(heldout_x_TD, weights, score),
    )
    fitted = fit(config, weights, sample, seed)
    settings = {
        "kind": config.router,
        "activation": fitted.router.activation,
        "normalise": fitted.router.normalise,
        "score": score,
        "num_experts": weights.num_experts,
        "num_shared": weights.num_shared,
    }
    tensors = {name: tensor.float() for name, tensor in fitted.router.tensors().items()}
    metrics = measure(fitted.router, weights, sample, fractions, seed)
    metrics |= {"epochs": len(fitted.history) - 1, "best_epoch": fitted.best_epoch, "score": score}
    return _Record(tensors | {"quantiles_Q": score_quantiles(fitted.router, sample)}, settings, metrics)


def score_kind(config: RouterConfig) -> Score:
    """The score a router predicts: the paper's sum of activations for its own routers, contribution norm otherwise."""
    return config.score or ("activation" if config.router in ("mlp", "similarity", "random") else "norm")


def fit(config: RouterConfig, weights: ExpertWeights, sample: Sample, seed: int) -> Fitted:
    """The router of one layer, of the kind the config names."""
    options: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size, "patience": config.patience}
    options["learning_rate"] = config.learning_rate or _LEARNING_RATES.get(config.router, 3e-3)
    if config.recipe == "paper":
        options |= _PAPER
    training = Training(**options, seed=seed)
    width = config.width or max(16, weights.ffn.d_model // _WIDTH_SHARE)
    if config.router == "similarity":
        return Fitted(similarity_router(weights))
    if config.router == "linear":
        return linear_router(sample)
    if config.router == "mlp":
        return mlp_router(weights, sample, training)
    if config.router == "random":
        generator = torch.Generator().manual_seed(seed)
        w_in_RD = torch.randn(weights.num_experts, weights.ffn.d_model, generator=generator)
        return Fitted(Router(w_in_RD=w_in_RD.to(sample.x_TD)))
    return regression_router(sample, width, training, "square" if config.router == "quadratic" else "relu")


def measure(
    router: Router, weights: ExpertWeights, sample: Sample, fractions: list[float], seed: int
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


def score_quantiles(router: Router, sample: Sample) -> torch.Tensor:
    """quantiles_Q of all held-out scores: the threshold that a share q of (token, expert) pairs stays below."""
    with torch.inference_mode():
        ordered = router.scores(sample.heldout_x_TD).flatten().float().sort().values.cpu()
    grid = torch.linspace(0, len(ordered) - 1, QUANTILES).round().long()
    return ordered[grid]
