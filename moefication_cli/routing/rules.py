"""How many experts a token gets, from its scores: one class per rule, and the table of them.

    top_k        the best k
    threshold    every expert whose score reaches a constant: tokens that matter get more
    max_ratio    every expert whose score reaches this share of the token's best one (D2DMoE, arXiv 2310.04361, section 3.3)
    cumulative   the fewest experts that hold this share of the token's total score

The last two take scores below zero as zero. A new rule is a class in a file of its own and a line in `RULES`; its name
goes among the choices of `config.ApplyConfig.rule`. Axes: T tokens, E experts, K selected experts. Pure tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError

_HALVINGS = 20  # of the interval [0, 1] in which a relative rule's constant is looked for


class Rule(Protocol):
    """What the package asks of a rule. Its one field is what `moefication.json` records, under the rule's name."""

    name: ClassVar[str]
    fused_by: ClassVar[frozenset[str]]  # backends whose kernels select by it; for the others torch selects beforehand
    needs_calibrated: ClassVar[bool]  # whether scores must predict contributions (see `training.RouterKind.calibrated`)
    refinable: ClassVar[bool]  # whether end-to-end refinement can train with it
    trainable: ClassVar[bool]  # whether fine-tuning can

    @property
    def value(self) -> float:
        """The constant of this rule."""
        ...

    def select(self, scores_TE: Tensor) -> Tensor:
        """ids_TK (int64) where every token gets as many, else mask_TE (bool): what every backend accepts."""
        ...

    def check(self, num_experts: int) -> None:
        """Raises ConfigError where the constant makes no sense for a layer of that many experts."""
        ...

    @classmethod
    def calibrate(cls, scores_TE: Tensor, experts_per_token: float) -> Self:
        """The rule that selects about, and not more than, so many experts per token on these scores."""
        ...


R = TypeVar("R", bound=Rule)


@dataclass(frozen=True)
class TopK:
    """The k experts that score highest. 0 beside always-on neurons means that no expert is routed to."""

    top_k: int
    name: ClassVar[str] = "top_k"
    fused_by: ClassVar[frozenset[str]] = frozenset({"numba", "triton"})
    needs_calibrated: ClassVar[bool] = False
    refinable: ClassVar[bool] = False
    trainable: ClassVar[bool] = True

    @property
    def value(self) -> float:
        return self.top_k

    def select(self, scores_TE: Tensor) -> Tensor:
        """ids_TK of the best k."""
        return scores_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def check(self, num_experts: int) -> None:
        """Raises ConfigError unless 1 <= k <= num_experts."""
        if type(self.top_k) is not int or not 1 <= self.top_k <= num_experts:
            raise ConfigError(f"top_k {self.top_k} is not in 1..{num_experts}")

    @classmethod
    def calibrate(cls, scores_TE: Tensor, experts_per_token: float) -> "TopK":
        """As many experts as fit, at least one."""
        return cls(max(1, min(scores_TE.shape[1], math.floor(experts_per_token + 1e-9))))


@dataclass(frozen=True)
class Threshold:
    """Every expert whose score is at least `threshold`."""

    threshold: float
    name: ClassVar[str] = "threshold"
    fused_by: ClassVar[frozenset[str]] = frozenset({"numba", "triton"})
    needs_calibrated: ClassVar[bool] = True
    refinable: ClassVar[bool] = True
    trainable: ClassVar[bool] = True

    @property
    def value(self) -> float:
        return self.threshold

    def select(self, scores_TE: Tensor) -> Tensor:
        """mask_TE of the experts that reach the threshold."""
        return scores_TE >= self.threshold

    def check(self, num_experts: int) -> None:
        """Raises ConfigError unless the threshold is a finite number."""
        _check_number(self.name, self.threshold)

    @classmethod
    def calibrate(cls, scores_TE: Tensor, experts_per_token: float) -> "Threshold":
        """The quantile of the scores that the wished number of (token, expert) pairs reaches."""
        return cls(quantile(scores_TE, 1 - experts_per_token / scores_TE.shape[1]))


@dataclass(frozen=True)
class MaxRatio:
    """Every expert whose score is at least `max_ratio` times the token's highest (D2DMoE, section 3.3)."""

    max_ratio: float
    name: ClassVar[str] = "max_ratio"
    fused_by: ClassVar[frozenset[str]] = frozenset()
    needs_calibrated: ClassVar[bool] = True
    refinable: ClassVar[bool] = False
    trainable: ClassVar[bool] = False

    @property
    def value(self) -> float:
        return self.max_ratio

    def select(self, scores_TE: Tensor) -> Tensor:
        """mask_TE of the experts near the token's best."""
        scores_TE = scores_TE.clamp_min(0)
        return scores_TE >= self.max_ratio * scores_TE.amax(-1, keepdim=True)

    def check(self, num_experts: int) -> None:
        """Raises ConfigError unless the ratio is a finite number."""
        _check_number(self.name, self.max_ratio)

    @classmethod
    def calibrate(cls, scores_TE: Tensor, experts_per_token: float) -> "MaxRatio":
        """Bisection: a lower ratio selects more."""
        return _bisected(lambda share: cls(1 - share), scores_TE, experts_per_token)


@dataclass(frozen=True)
class Cumulative:
    """The fewest experts whose scores add up to `cumulative` of the token's total."""

    cumulative: float
    name: ClassVar[str] = "cumulative"
    fused_by: ClassVar[frozenset[str]] = frozenset()
    needs_calibrated: ClassVar[bool] = True
    refinable: ClassVar[bool] = False
    trainable: ClassVar[bool] = False

    @property
    def value(self) -> float:
        return self.cumulative

    def select(self, scores_TE: Tensor) -> Tensor:
        """mask_TE: experts in falling order of score until the share is reached."""
        sorted_TE, order_TE = scores_TE.clamp_min(0).sort(dim=-1, descending=True)
        before_TE = sorted_TE.cumsum(-1) - sorted_TE
        taken_TE = before_TE < self.cumulative * sorted_TE.sum(-1, keepdim=True)
        return torch.zeros_like(taken_TE).scatter_(-1, order_TE, taken_TE)

    def check(self, num_experts: int) -> None:
        """Raises ConfigError unless the share is a finite number."""
        _check_number(self.name, self.cumulative)

    @classmethod
    def calibrate(cls, scores_TE: Tensor, experts_per_token: float) -> "Cumulative":
        """Bisection: a higher share selects more."""
        return _bisected(cls, scores_TE, experts_per_token)


RULES: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "top_k": TopK,
    "max_ratio": MaxRatio,
    "cumulative": Cumulative,
}


def rule_class(name: str) -> type[Rule]:
    """The rule of that name. Raises ConfigError naming those there are."""
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}", f"use one of {', '.join(RULES)}")
    return RULES[name]


def rule_setting(rule: Rule) -> dict[str, Any]:
    """The rule as `moefication.json` records it: {name: value}."""
    return {rule.name: rule.value}


def read_rule(setting: Mapping[str, Any]) -> Rule:
    """A rule from what `rule_setting` made. Raises ConfigError for anything else; the value is not checked."""
    if len(setting) != 1:
        raise ConfigError(f"a rule is one name and its value, not {dict(setting)!r}")
    ((name, value),) = setting.items()
    make: Callable[[Any], Rule] = rule_class(name)
    return make(value)


def as_mask(selected: Tensor, num_experts: int) -> Tensor:
    """mask_TE of what a rule's `select` returned, ids or mask."""
    if selected.dtype == torch.bool:
        return selected
    empty_TE = torch.zeros(len(selected), num_experts, dtype=torch.bool, device=selected.device)
    return empty_TE.scatter_(1, selected, True)


def quantile(values: Tensor, share: float) -> float:
    """The value a share of all entries lies below (torch.quantile stops at 2**24 entries)."""
    return quantiles(values, [share])[0]


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """`quantile` at several shares from one sort: a selection for each would pass over all entries anew."""
    ordered = values.flatten().sort().values
    count = ordered.numel()
    return [float(ordered[min(max(1, round(share * count)), count) - 1]) for share in shares]


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} {value!r} is not a finite number")


def _bisected(at: Callable[[float], R], scores_TE: Tensor, experts_per_token: float) -> R:
    """The rule `at(share)` with the largest share in [0, 1] that selects at most so many experts per token."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        many = float(at(middle).select(scores_TE).float().sum(1).mean()) > experts_per_token
        low, high = (low, middle) if many else (middle, high)
    return at(low)
