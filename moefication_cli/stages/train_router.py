"""train-router: make each layer's router from its collected inputs. Reads `activations`, `split` and the model."""

from moefication_cli.config import RouterConfig
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.routing.train import TrainedLayer, train_layer
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import router_cost
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import (
    RunModel,
    expert_weights,
    layer_options,
    layer_seed,
    layered_result,
    open_model,
    read_partition,
    training_tokens,
)
from moefication_cli.runs.room import check_room
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


def train_router(run: RunDir, config: RouterConfig = RouterConfig(), control: Control = Control()) -> Result:
    """Fit one router per layer; keeps the held-out captured share of router, oracle and random at each fraction.

        train_router(RunDir("RUN"), RouterConfig(router="linear"))

    Writes RUN/router/<name>/layer_NNN.safetensors. Raises MissingArtifactError, StaleArtifactError, NonFiniteError.
    """
    model = open_model(run, None, control)
    activations, split = run.require("activations"), run.require("split")
    experts = max(layer["num_experts"] for layer in split.metrics["layers"])
    collected = max(layer["tokens"] for layer in activations.metrics["layers"])
    cost = router_cost(model, config, collected, experts)
    if control.dry_run:
        reads = {"activations": activations, "split": split}
        return estimate("train-router", model, run.path(f"router/{config.router}"), cost, reads)
    options = layer_options(config, control, model, {"activations": activations, "split": split})
    with control.ranks.begin(run, f"router/{config.router}", options) as work:
        check_room(work, model, cost, control, "fewer --max-tokens")
        for index in control.track(work.pending(), "train-router", len(model.sites)):
            record = _train_index(model, activations, split, index, config, control)
            work.save(index, record.tensors, record.settings, metrics=record.metrics)
        manifest = control.ranks.finish(work)
    return layered_result("train-router", work, manifest)


def _train_index(
    model: RunModel,
    activations: Artifact,
    split: Artifact,
    index: int,
    config: RouterConfig,
    control: Control,
) -> TrainedLayer:
    """Reads one layer and trains its routers; a function of its own, so that the layer is gone before the next is read."""
    where, seed = f"layer {index} ({model.names[index]})", layer_seed(control.seed, index)
    weights = expert_weights(model.read_ffn(index), read_partition(split, index))
    train, heldout = training_tokens(config, weights, activations, index, seed)
    used = len(train) + len(heldout)
    if config.max_tokens is None and used < activations.metrics["layers"][index]["tokens"]:
        control.say(
            f"{where}: trains on {used} of the collected tokens, as many as fit 768 MiB; --max-tokens takes another number"
        )
    try:
        record = train_layer(config, weights, train, heldout, config.fractions, seed)
    except (ConfigError, NonFiniteError) as error:
        raise type(error)(f"{where}: {error.message}", error.hint) from None
    if any(row["router"] <= row["random"] for row in record.metrics["captured"] if row["fraction"] < 1):
        control.say(
            f"warning: {where}: the router captures no more than random experts; collect more tokens, or use another --router"
        )
    return record
