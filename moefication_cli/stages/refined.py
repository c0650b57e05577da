"""A router's plans at one budget as `apply` writes and `eval` measures them: fitted to the whole model where asked for.

Refined plans are kept in RUN/refined/<router>-<fraction>, a stage like any other, because making them runs the whole
model on calibration data: a killed `apply` finds them again, and `eval` need not make them anew.
"""

from collections.abc import Mapping, Sequence

import torch

from moefication_cli.config import ApplyConfig, CollectConfig, options_of
from moefication_cli.errors import ConfigError
from moefication_cli.models.loading import load_model, total_memory
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.moe_folder import write_moe_settings
from moefication_cli.models.surgery import permute_in_place
from moefication_cli.stages.contract import Control
from moefication_cli.stages.examples import open_examples
from moefication_cli.stages.inputs import RunModel, begin_options
from moefication_cli.stages.plan import LayerPlan, RoutedLayer, plan_layers
from moefication_cli.stages.planned import budget_of, read_plans, router_tensors, settings
from moefication_cli.stages.refine import Conversion, refine, settle
from moefication_cli.stages.router import CALIBRATED
from moefication_cli.store.rundir import RunDir
from moefication_cli.store.stage import Stage
from moefication_cli.tasks.examples import Batch, Examples

_STEP_TOKENS = 2048
_HELDOUT_TOKENS = 12288
# Multiply-adds x 2 that refinement may cost by default, and the steps that are worth it: minutes on two cores.
_DEFAULT_FLOPS = 1.5e13
_FEWEST, _MOST = 60, 300
_FLOAT = 4


def make_plans(
    run: RunDir,
    model: RunModel,
    layers: Sequence[RoutedLayer],
    inputs: Mapping[str, Stage | None],
    config: ApplyConfig,
    control: Control,
) -> list[LayerPlan]:
    """Every layer as `apply` with this config converts it; `inputs` are the stages it reads. Raises ConfigError."""
    activations, budget = inputs["activations"], budget_of(config)
    if not config.refine:
        return plan_layers(model, activations, layers, budget, control.seed)
    if activations is None or any(layer.curve is None for layer in layers) or budget.top_k or budget.rule == "top_k":
        raise ConfigError(
            "--refine needs a calibrated router and the threshold rule",
            "train one with --router regression, or use --refine 0",
        )
    name = f"refined/{config.router}-{config.fraction:g}"
    with run.begin(name, **begin_options(config, control, model, inputs)) as work:
        if not work.up_to_date:
            plans = plan_layers(model, activations, layers, budget, control.seed)
            plans, metrics = _refined(run, model, plans, activations, config, control)
            write_moe_settings(
                work.folder, settings(plans, str(config.router), config, run.info.ffn), router_tensors(plans)
            )
            work.finish(metrics)
    return read_plans(run.path(name), layers, model.device)


def default_steps(model: RunModel, config: ApplyConfig, control: Control) -> int:
    """How many steps `run` refines a model of this size; 0, and said, where there is nothing to refine or no memory."""
    if config.router not in CALIBRATED or config.top_k is not None or config.rule == "top_k":
        return 0
    parameters = model.checkpoint.describe()["parameters"]
    needed, there = 4.0 * parameters * _FLOAT, total_memory(model.device)
    if needed > there:
        control.say(
            f"routers are not fitted to the whole model: it would take about {needed / 2**30:.1f} GiB of memory and there "
            f"are {there / 2**30:.1f} (--refine N does it anyway)"
        )
        return 0
    step_flops = 8.0 * _STEP_TOKENS * parameters  # dense, converted, and its gradient
    return max(_FEWEST, min(_MOST, round(_DEFAULT_FLOPS / step_flops)))


def _refined(
    run: RunDir,
    model: RunModel,
    plans: list[LayerPlan],
    activations: Stage,
    config: ApplyConfig,
    control: Control,
) -> tuple[list[LayerPlan], dict[str, object]]:
    assert config.refine
    loaded = load_model(
        model.checkpoint.folder,
        task=run.info.task,
        device=model.device,
        trust_remote_code=bool(run.info.trust_remote_code),
        quiet=True,
    )
    collected = activations.config
    data = CollectConfig(**{entry.name: collected[entry.name] for entry in options_of(CollectConfig)})
    examples = open_examples(run, loaded, data, control)
    per_sequence = activations.metrics["layers"][0]["tokens"] / max(1, activations.metrics["layers"][0]["sequences"])
    train, heldout = _batches(examples, config.refine, max(1, round(_STEP_TOKENS / per_sequence)), control.seed)
    for plan in plans:
        if plan.rule is not None:
            permute_in_place(loaded.model, plan.layer.site, plan.layer.partition.order_F())
    conversion = Conversion(loaded, plans, budget_of(config), TokenMask(loaded.model))
    settle(conversion, heldout)
    outcome = refine(conversion, train, heldout, config.refine, control)
    shares = settle(conversion, heldout)
    if not outcome.kept:
        control.say("refinement did not lower the KL on held-out calibration data: kept as planned")
    return conversion.finished(shares), vars(outcome)


def _batches(examples: Examples, steps: int, size: int, seed: int) -> tuple[list[Batch], list[Batch]]:
    """(training, held-out) batches in random order, from other sequences than the router saw where there are enough."""
    wanted = steps * _STEP_TOKENS + _HELDOUT_TOKENS
    found = list(examples.calibration(wanted, seed + 1, size))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    found = [found[i] for i in order]
    tokens, count = 0, 0
    while count < len(found) // 2 and tokens < _HELDOUT_TOKENS:
        tokens += found[count].num_tokens
        count += 1
    if count == 0:
        raise ConfigError("the calibration data is too small to refine on", "collect on more data, or use --refine 0")
    return found[count:], found[:count]
