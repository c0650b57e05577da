"""Uncertainty of means over examples: standard errors and the bootstrap.

A metric is a transform of sum(values)/sum(weights) over examples: accuracy has weights 1 and no transform, perplexity
is exp of summed losses over predicted tokens, with windows as examples. Source: Efron and Tibshirani, *An Introduction
to the Bootstrap* (1993), percentile intervals; Koehn (2004, W04-3250) for the paired form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
_MAX_LOG = 700.0  # exp of more is not a float


@dataclass(frozen=True)
class Interval:
    """An estimate with a central interval of the given level."""

    value: float
    low: float
    high: float
    level: float = 0.95


def perplexity(mean_loss: Values | float) -> Values:
    """exp, with losses past the range of a float held at its edge."""
    return np.asarray(np.exp(np.minimum(mean_loss, _MAX_LOG)), np.float64)


def standard_error(values: Values, weights: Values | None = None) -> float | None:
    """Standard error of sum(values)/sum(weights) over independent examples (linearised ratio); None for one example."""
    n = len(values)
    if n < 2:
        return None
    weights = np.ones(n) if weights is None else weights
    residuals = values - values.sum() / weights.sum() * weights
    return math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(weights.sum())


def spearman(a: Values, b: Values) -> tuple[float, float | None]:
    """Rank correlation of two columns, ties at their mean rank, and its standard error; 0 where a column is constant.

    Error: Bonett and Wright (2000, Psychometrika 65), of Fisher's z, by the slope of tanh; None for fewer than 4 values.
    """
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    rho = float(x @ y) / norm if norm else 0.0
    if len(a) < 4:
        return rho, None
    return rho, (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))


def _ranks(values: Values) -> Values:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place], np.float64)


def bootstrap_ci(
    values: Values,
    seed: int,
    *,
    weights: Values | None = None,
    transform: Callable[[Values], Values] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of transform(sum(values)/sum(weights)) over resampled examples [n]."""
    draws = _resampled(np.stack([values, _ones(values, weights)]), seed, resamples)
    apply = transform or (lambda x: x)
    means = apply(draws[:, 0] / draws[:, 1])
    exact = apply(np.asarray([values.sum() / _ones(values, weights).sum()]))
    return _interval(float(exact[0]), means, level)


def paired_bootstrap(
    a: Values,
    b: Values,
    seed: int,
    *,
    weights: Values | None = None,
    transform: Callable[[Values], Values] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Interval of metric(a) - metric(b), both on the same resampled examples. ValueError if the lengths differ."""
    if len(a) != len(b):
        raise ValueError(f"paired values of different lengths: {len(a)} and {len(b)}")
    apply = transform or (lambda x: x)
    w = _ones(a, weights)
    draws = _resampled(np.stack([a, b, w]), seed, resamples)
    differences = apply(draws[:, 0] / draws[:, 2]) - apply(draws[:, 1] / draws[:, 2])
    exact = apply(np.asarray([a.sum() / w.sum()])) - apply(np.asarray([b.sum() / w.sum()]))
    return _interval(float(exact[0]), differences, level)


def _ones(values: Values, weights: Values | None) -> Values:
    return np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)


def _resampled(columns: Values, seed: int, resamples: int) -> Values:
    """Sums of each column over `resamples` draws of n examples with replacement: [resamples, columns]."""
    n = columns.shape[1]
    if n == 0:
        raise ValueError("no examples to resample")
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, len(columns)))
    for i in range(resamples):
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        sums[i] = columns @ counts
    return sums


def _interval(value: float, draws: Values, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
