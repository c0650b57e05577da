"""Recovery: train a converted model with its selection in the loop against the original dense model, at its budget.

Selection is straight-through and compute has a price (`conversion.refine`), but for a fixed k, which always costs the same;
what learns is said by `--train`. Afterwards the weights are rounded to the checkpoint's dtype and the thresholds settled
anew, so that what is judged is what will be written.
Kept only if the KL to the dense model fell on sequences that were not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import ApplyConfig, FinetuneConfig
from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.plan import LayerPlan, in_flops
from moefication_cli.conversion.plan_files import budget_of
from moefication_cli.conversion.search import PlanInputs, WholeModel
from moefication_cli.conversion.settle import SPEND, settle
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.runs.data import load_whole
from moefication_cli.training.lora import Adapters
from moefication_cli.training.trained import Learner, rates, selection_tensors, weight_tensors
from moefication_cli.training.trainer import Schedule, train


@dataclass(frozen=True)
class Finetuned:
    """The plans and the changed weights, by their names in the model, in the checkpoint's dtypes and order of neurons.

    Where it was not kept, the plans are those it began with and there are no weights.
    """

    plans: list[LayerPlan]
    weights: dict[str, Tensor]
    metrics: dict[str, Any]


def finetune_model(
    inputs: PlanInputs,
    plans: Sequence[LayerPlan],
    like: ApplyConfig,
    config: FinetuneConfig,
    scratch: Path,
) -> Finetuned:
    """Train the conversion that `plans` describe, made with the options `like`; checkpoints go to `scratch`.

    Raises ConfigError (too little data, nothing to train), NonFiniteError.
    """
    control, model = inputs.control, inputs.model
    wanted = config.steps * config.accumulate
    whole = WholeModel(inputs, wanted, config.tokens, "task" in config.loss, "float32")
    if (passes := wanted / len(whole.train)) > 4:
        control.say(f"the calibration data is short: {len(whole.train)} batches are used {passes:.0f} times each")
    teacher = load_whole(inputs.run, model)
    teacher.model.requires_grad_(False)
    budget = in_flops(budget_of(like), plans)
    conversion = Conversion(whole.loaded, plans, budget, whole.mask, teacher)
    if not conversion.layers:
        raise ConfigError(
            "this conversion leaves every FFN dense: there is nothing to recover",
            "apply a smaller --fraction or --top-k",
        )
    conversion.install()
    began = settle(conversion, whole.heldout)
    before = began.kl
    control.say(f"KL to the dense model on held-out calibration data before: {before:.4g}")

    names = dict(whole.loaded.model.named_parameters(remove_duplicate=False))
    rate = rates(conversion, config, whole.train[0])
    adapters = Adapters(conversion, config.lora_rank, control.seed) if config.train == "lora" else None
    weights = {} if adapters is None else adapters.tensors(rate.weights)
    weights |= weight_tensors(conversion, config.train, rate.weights)
    trained = selection_tensors(conversion, rate.selection) | weights
    if not trained:
        raise ConfigError("this conversion has no routers or corrections to train", "use --train ffn")
    target = budget.fraction * SPEND[1]
    priced = any(layer.shifts for layer in conversion.layers.values())
    price = config.price * max(before, 1e-6) / target if priced else 0.0
    learner = Learner(conversion, trained, whole.examples, config, target, price)
    optimizer = torch.optim.Adam([entry.group() for entry in trained.values()], betas=(0.9, 0.98))
    schedule = Schedule(config.steps, config.accumulate, config.warmup, config.save_steps, config.autocast)
    batches = [whole.train[number % len(whole.train)] for number in range(wanted)]  # one epoch
    resumed = train(learner, optimizer, batches, schedule, scratch / "trainer", model.device, control)
    if resumed:
        control.say(f"went on from step {resumed}")

    changed = set(weights) if adapters is None else adapters.merge()
    whole.loaded.model.requires_grad_(False)
    stored = _stored(inputs, {name: p for name, p in names.items() if _changes(name, p, names, changed)})
    ended = settle(conversion, whole.heldout)
    shares, after = ended.shares, ended.kl
    kept = after < before
    metrics = {
        "kl_before": before,
        "kl_after": after,
        "kept": kept,
        "train": config.train,
        "steps": config.steps,
        "tokens": sum(whole.train[n % len(whole.train)].num_tokens for n in range(wanted)),
        "ffn_flops_fraction_before": _overall(conversion, began.shares),
        "ffn_flops_fraction": _overall(conversion, shares),
        "weights": sum(tensor.numel() for tensor in stored.values()),
    }
    if not all(torch.isfinite(torch.tensor(value)) for value in (before, after)):
        raise NonFiniteError("the fine-tuned model's output is not finite", "use a smaller --learning-rate")
    if not kept:
        return Finetuned(list(plans), {}, metrics)
    return Finetuned(conversion.finished(shares), _in_checkpoint_order(whole, stored), metrics)


def _changes(name: str, parameter: Tensor, names: dict[str, Any], changed: set[str]) -> bool:
    """Whether a parameter is one of those named, perhaps under the name of another that it is tied to."""
    return name in changed or any(names[other] is parameter for other in changed)


@torch.no_grad()
def _stored(inputs: PlanInputs, parameters: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters as the checkpoint will hold them; those in memory are rounded to that as well."""
    checkpoint = inputs.model.checkpoint
    found = {}
    for name, parameter in parameters.items():
        if checkpoint.stores(name):
            rounded = parameter.detach().to(checkpoint.stored_dtype(name))
            parameter.copy_(rounded)
            found[name] = rounded
    return found


def _in_checkpoint_order(whole: WholeModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their neurons in the order the checkpoint has, on the CPU."""
    orders: dict[str, tuple[int, Tensor]] = {}
    for layer in whole.layers:
        orders |= layer.site.parameter_orders(layer.partition.order_F().argsort())
    found = {}
    for name, tensor in stored.items():
        tensor = tensor.cpu()
        axis, order = orders.get(name, (0, None))
        found[name] = tensor.clone() if order is None else tensor.index_select(axis, order)
    return found


def _overall(conversion: Conversion, shares: Sequence[float]) -> float:
    work = conversion.dense_macs()
    return sum(w * share for w, share in zip(work, shares, strict=True)) / sum(work)
