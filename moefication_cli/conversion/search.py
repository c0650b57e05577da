"""A router's plans at one budget as `apply` writes and `eval` measures them: fitted to the whole model where asked for.

Refined plans are kept in RUN/refined/<router>-<fraction>, a stage like any other, because making them runs the whole
model on calibration data: a killed `apply` finds them again, and `eval` need not make them anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moefication_cli.config import ApplyConfig
from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.plan import Budget, LayerPlan, RoutedLayer, in_flops, plan_layers
from moefication_cli.conversion.plan_files import budget_of, read_plans, router_tensors, settings
from moefication_cli.conversion.refine import refine
from moefication_cli.conversion.settle import HeldOut, Settled, settle
from moefication_cli.conversion.times import timed
from moefication_cli.errors import ConfigError
from moefication_cli.models.folder.moe_folder import write_moe_settings
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.memory import total_memory
from moefication_cli.models.surgery import permute_in_place
from moefication_cli.routing.routers import router_kind
from moefication_cli.routing.rules import RULES, rule_class
from moefication_cli.runs.control import Control
from moefication_cli.runs.costs import HELDOUT_TOKENS, STEP_TOKENS, refine_memory
from moefication_cli.runs.data import calibration_data, load_whole, open_examples
from moefication_cli.runs.inputs import RunModel, begin_options
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir
from moefication_cli.tasks.examples import Batch, Examples

# Multiply-adds x 2 that refinement may cost by default, and the steps that are worth it: minutes on two cores.
_DEFAULT_FLOPS = 1e13
_FEWEST, _MOST = 60, 300
# Kinds of plans to try on the whole model: what curves choose, more correction, a router of full rank (the first one).
_SHAPES: dict[str, dict[str, Any]] = {
    "curves": {},
    "corrected": {"least_rank_cost": 0.035},
    "first router": {"least_rank_cost": 0.035, "only_router": 0},
}
_FEWEST_BATCHES = 8  # that the calibration data is cut into, however small it is
_HALVINGS = 7  # of the interval in which --target-kl looks for the fraction
_STEP_DOWN = 0.8  # from one refined fraction to the next lower one


@dataclass(frozen=True)
class PlanInputs:
    """What plans are made from: a run's model, its layers with one router, and the stages they come from.

    `stages` names every stage read, `activations` (which may be None) among them.
    """

    run: RunDir
    model: RunModel
    layers: Sequence[RoutedLayer]
    stages: Mapping[str, Artifact | None]
    control: Control

    @property
    def activations(self) -> Artifact | None:
        return self.stages["activations"]

    def budget(self, config: ApplyConfig) -> Budget:
        """What these options ask for, with the layers' times where it is time."""
        return timed(budget_of(config), config, self.layers, self.model.device, self.control)


def make_plans(inputs: PlanInputs, config: ApplyConfig) -> list[LayerPlan]:
    """Every layer as `apply` with this config converts it. Raises ConfigError."""
    run, model, layers, control, activations = (
        inputs.run, inputs.model, inputs.layers, inputs.control, inputs.activations,
    )  # fmt: skip
    if not config.refine:
        if any(layer.curve is not None for layer in layers):
            control.say("fitted layer by layer; --refine 100 fits routers and corrections to the whole model")
        return plan_layers(model, activations, layers, inputs.budget(config), control.seed)
    require_calibrated(inputs, config, "--refine")
    name = refined_stage(config)
    # What is written beside the plans, or made of them, does not change them
    config = replace(config, embed_code=False, finetuned=None)
    with run.begin(name, begin_options(config, control, model, inputs.stages)) as work:
        if not work.up_to_date:
            subject = WholeModel(inputs, config.refine or 0)
            plans, metrics = subject.refined(config)
            write_moe_settings(
                work.folder, settings(plans, str(config.router), config, run.info.ffn), router_tensors(plans)
            )
            work.finish(metrics)
    return read_plans(run.path(name), layers, model.device)


def refined_stage(config: ApplyConfig) -> str:
    """The stage in which the refined plans of `config` are kept."""
    return f"refined/{config.router}-{config.fraction:g}"


def fraction_for(inputs: PlanInputs, config: ApplyConfig) -> float:
    """The least fraction at which the converted model's KL on held-out calibration sequences is at most `target_kl`.

    Bisection over conversions with settled thresholds; with `refine` then downwards in steps, refining each. Kept in
    RUN/refined/<router>-kl<target>. Raises ConfigError where only the dense model holds the target.
    """
    run, control, target = inputs.run, inputs.control, config.target_kl
    assert target is not None
    require_calibrated(inputs, config, "--target-kl")
    name = f"refined/{config.router}-kl{target:g}"
    asked = replace(config, fraction=1.0, embed_code=False, finetuned=None)  # what a search does not depend on
    with run.begin(name, begin_options(asked, control, inputs.model, inputs.stages)) as work:
        manifest = work.manifest
        if not work.up_to_date:
            subject = WholeModel(inputs, config.refine or 0)
            trail = _bisect(lambda fraction: subject.kl(replace(config, fraction=fraction)), target, control)
            good = min(fraction for fraction, kl in trail if kl <= target)
            while config.refine and good < 1:
                lower = replace(config, fraction=_tidy(good * _STEP_DOWN))
                make_plans(inputs, lower)
                made = run.read_stage(refined_stage(lower))
                trail.append((lower.fraction, float(made.metrics["kl_after"])))
                if trail[-1][1] > target:
                    break
                good = lower.fraction
            jsonio.write(work.folder / "search.json", {"target_kl": target, "trail": [list(step) for step in trail]})
            manifest = work.finish({"fraction": good})
    assert manifest is not None
    found = float(manifest.metrics["fraction"])
    if found >= 1:
        raise ConfigError(
            f"no conversion keeps the KL at or below {target:g} on held-out calibration data: only the dense model does",
            "raise --target-kl, use smaller experts, or allow --refine",
        )
    control.say(f"--target-kl {target:g}: the least fraction that holds it is {found:g}")
    return found


def _bisect(kl_at: Callable[[float], float], target: float, control: Control) -> list[tuple[float, float]]:
    """(fraction, KL) of everything tried; the dense model holds any target."""
    trail, low, high = [(1.0, 0.0)], 0.0, 1.0
    for _ in control.track(range(_HALVINGS), "target-kl", _HALVINGS):
        middle = _tidy((low + high) / 2)
        try:
            trail.append((middle, kl_at(middle)))
        except ConfigError:  # less than the routers alone cost
            low = middle
            continue
        low, high = (low, middle) if trail[-1][1] <= target else (middle, high)
    return trail


def _tidy(fraction: float) -> float:
    return round(fraction, 4)


def require_calibrated(inputs: PlanInputs, config: ApplyConfig, option: str) -> None:
    """Raise ConfigError unless these options give plans that can be trained by gradient; `option` is what asks for it."""
    calibrated = inputs.activations is not None and all(layer.curve is not None for layer in inputs.layers)
    if not calibrated or not _refinable(config):
        raise ConfigError(
            f"{option} needs a calibrated router and the threshold rule",
            "train one with --router regression, and leave out --rule and --top-k",
        )


def require_trainable(config: ApplyConfig) -> None:
    """Raise ConfigError unless fine-tuning can train with the rule asked for."""
    if config.rule is not None and config.top_k is None and not rule_class(config.rule).trainable:
        able = ", ".join(name for name, rule in RULES.items() if rule.trainable)
        raise ConfigError(f"finetune cannot train with the rule {config.rule}", f"convert with --rule {able}")


def _refinable(config: ApplyConfig) -> bool:
    """Whether the rule asked for is one that refinement can train with; None leaves the choice and gets one."""
    return config.top_k is None and (config.rule is None or rule_class(config.rule).refinable)


def default_steps(model: RunModel, config: ApplyConfig, sequences: int | None, control: Control) -> int:
    """How many steps `run` refines a model of this size; 0, and said, where there is nothing to refine or no memory.

    `sequences`: how many there are to calibrate on, None where nothing is collected yet.
    """
    if not router_kind(str(config.router)).calibrated:
        return 0
    if not _refinable(config):
        control.say("routers are not fitted to the whole model: that needs the threshold rule")
        return 0
    if sequences is not None and sequences < _FEWEST_BATCHES:
        control.say("routers are not fitted to the whole model: there are too few sequences to calibrate on")
        return 0
    needed, there = refine_memory(model), total_memory(model.device)
    if needed > there:
        control.say(
            f"routers are not fitted to the whole model: it would take about {needed / 2**30:.1f} GiB of memory and there "
            f"are {there / 2**30:.1f} (--refine N does it anyway)"
        )
        return 0
    # Dense, converted, and its gradient; what is no FFN is about half as much again, embeddings and heads left out
    step_flops = 8.0 * STEP_TOKENS * 1.5 * model.checkpoint.describe()["ffn_parameters"]
    return max(_FEWEST, min(_MOST, round(_DEFAULT_FLOPS / step_flops)))


class WholeModel:
    """The whole model in memory, its neurons in the order of the split, with sequences to fit and to judge on.

    `steps` batches of about `step_tokens` tokens to fit on, fewer where there are not so many; `labelled` examples have
    their labels. Raises ConfigError where the calibration data is too small.
    """

    def __init__(
        self,
        inputs: PlanInputs,
        steps: int,
        step_tokens: int = STEP_TOKENS,
        labelled: bool = False,
        dtype: str | None = None,
    ) -> None:
        assert inputs.activations is not None
        run, model, layers, activations, control = (
            inputs.run, inputs.model, inputs.layers, inputs.activations, inputs.control,
        )  # fmt: skip
        self.inputs = inputs
        self.model, self.layers, self.activations, self.control = model, layers, activations, control
        self.loaded = load_whole(run, model, dtype=dtype)
        for layer in layers:
            permute_in_place(self.loaded.model, layer.site, layer.partition.order_F())
        self.mask = TokenMask(self.loaded.model)
        self.examples = open_examples(
            run,
            self.loaded,
            calibration_data(run, model, activations),
            replace(control, say=lambda message: None),
            labelled,
        )
        first = activations.metrics["layers"][0]
        size = max(1, round(step_tokens * min(1.0, first["sequences"] / first["tokens"])))
        size = min(size, max(1, first["sequences"] // _FEWEST_BATCHES))
        self.train, heldout = _batches(self.examples, steps * step_tokens, size, control.seed)
        self.heldout = HeldOut(heldout)

    def kl(self, config: ApplyConfig) -> float:
        """KL on the held-out sequences of the best plans for `config`, thresholds settled."""
        return self._settled(config)[1].kl

    def refined(self, config: ApplyConfig) -> tuple[list[LayerPlan], dict[str, Any]]:
        """The refined plans of `config`, and how they came out."""
        conversion, began, shape = self._settled(config)
        outcome, shares = refine(conversion, self.train, self.heldout, began, config.refine or 0, self.control)
        if not outcome.kept and conversion.layers:
            self.control.say(
                "refine: the plan made layer by layer is already as good on held-out data, and is what is written"
            )
        return conversion.finished(shares), vars(outcome) | {"shape": shape}

    def _settled(self, config: ApplyConfig) -> tuple[Conversion, Settled, str]:
        """The conversion of least KL among a few shapes, how it stands, and the shape's name.

        Curves rank routers and corrections by the error of one layer's output, which stands for the KL to second order
        only. At small budgets errors are large and the ranking is wrong: the KL of the whole model is measured instead.
        """
        found: list[tuple[Settled, str, Conversion]] = []
        asked = self.inputs.budget(config)
        for shape, restriction in _SHAPES.items():
            if restriction and config.compensation != "auto":
                continue
            budget = replace(asked, **restriction)
            try:
                plans = plan_layers(self.model, self.activations, self.layers, budget, self.control.seed)
            except ConfigError:
                if not restriction:
                    raise
                continue
            if any(_same(plans, other.plans) for _, _, other in found):
                continue
            conversion = Conversion(self.loaded, plans, in_flops(budget, plans), self.mask)
            found.append((settle(conversion, self.heldout), shape, conversion))
        settled, shape, best = min(found, key=lambda entry: entry[0].kl)
        best.install()
        return best, settled, shape


def _same(a: Sequence[LayerPlan], b: Sequence[LayerPlan]) -> bool:
    return all(
        (x.rule, x.always, x.router is y.router, x.flops_fraction) == (y.rule, y.always, True, y.flops_fraction)
        for x, y in zip(a, b, strict=True)
    )


def _batches(examples: Examples, tokens: int, size: int, seed: int) -> tuple[list[Batch], list[Batch]]:
    """(training, held-out) batches in random order, from other sequences than the router saw where there are enough."""
    judged = max(HELDOUT_TOKENS // 3, min(HELDOUT_TOKENS, tokens // 8)) if tokens else HELDOUT_TOKENS
    found = list(examples.calibration(tokens + judged, seed + 1, size))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    found = [found[i] for i in order]
    taken, count = 0, 0
    while count < len(found) // 2 and taken < judged:
        taken += found[count].num_tokens
        count += 1
    if count == 0:
        raise ConfigError(
            "the calibration data is too small: one part of it is needed to train the whole model on, another to judge by",
            "collect on more data, or do without --refine and finetune",
        )
    return found[count:], found[:count]
