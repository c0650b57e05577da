"""Clocks: several calls in alternation, what the machine is, and how fast it multiplies and reads.

Knows nothing about models. Other programs slow a call down now and then, so calls take turns in one run and are
compared pair by pair. Times are seconds on the wall or, for one thread on a busy machine, seconds of its processor.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from moefication_cli.benchmark.bounds import Rates
from moefication_cli.compiled import processor

MIN_ROUNDS = 5
_CACHE_UNKNOWN = 32 << 20
READ_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # more than a cache, and long beside the start of a call
_PROBES = 5


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def _ready() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Call:
    """`run` is timed; `prepare` comes before it and is not."""

    run: Callable[[], object]
    prepare: Callable[[], None] = _ready


@dataclass(frozen=True)
class Paired:
    """Seconds of the same rounds of two calls."""

    dense: Sequence[float]
    moe: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """How many times faster the second call was, round by round."""
        return [a / b for a, b in zip(self.dense, self.moe, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians of both, median, quartiles and range of the ratio, ranges of both, number of rounds."""
        ratios = self.ratios
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return {
            "dense_seconds": statistics.median(self.dense),
            "moe_seconds": statistics.median(self.moe),
            "speedup": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "dense_range": [min(self.dense), max(self.dense)],
            "moe_range": [min(self.moe), max(self.moe)],
            "repeats": len(ratios),
        }


def alternate(
    calls: Sequence[Call], *, repeats: int, seconds: float, warmup: int, device: torch.device, clock: str = "wall"
) -> list[list[float]]:
    """Seconds of every call in every round; within a round each runs once, in turning order.

    `warmup` untimed rounds come first (compilation, first touch). Rounds are at most `repeats`, fewer where they would
    take longer than `seconds`, but MIN_ROUNDS at least if `repeats` allows.
    """
    for _ in range(warmup):
        for call in calls:
            _timed(call, device, clock)
    once = sum(_timed(call, device, clock) for call in calls)
    rounds = min(repeats, max(MIN_ROUNDS, int(seconds / max(once, 1e-9))))
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for position in range(len(calls)):
            turn = (number + position) % len(calls)
            taken[turn].append(_timed(calls[turn], device, clock))
    return taken


def _timed(call: Call, device: torch.device, clock: str) -> float:
    now = CLOCKS[clock]
    call.prepare()
    _finish(device)
    started = now()
    call.run()
    _finish(device)
    return now() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """That many threads inside, as many as before afterwards; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_rates(device: torch.device, dtype: torch.dtype, clock: str = "wall", integer: bool = False) -> Rates:
    """The best of a few large matrix products (P; with `integer` of int8 ones, on the CPU) and of a few reads of uncached weights
    by a vector (W).
    """
    width = 1024 if device.type == "cpu" else 8192
    x, w = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    rows = READ_BYTES[device.type] // (1024 * dtype.itemsize)
    vector = torch.ones(1, 1024, device=device, dtype=dtype)
    matrix = torch.ones(rows, 1024, device=device, dtype=dtype)
    whole = torch.ones(width, width, dtype=torch.int8)
    products = (lambda: torch._int_mm(whole, whole.t())) if integer else (lambda: functional.linear(x, w))
    multiply, read = Call(products), Call(lambda: functional.linear(vector, matrix))
    with torch.inference_mode():
        taken = alternate((multiply, read), repeats=_PROBES, seconds=9, warmup=1, device=device, clock=clock)
    best = [min(seconds) for seconds in taken]
    return Rates(2.0 * width**3 / best[0], rows * 1024 * dtype.itemsize / best[1])


def cache_bytes(device: torch.device) -> int:
    """The largest cache of the device; a guess where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=_CACHE_UNKNOWN)


def hardware(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with: processor, cores, accelerator, cache, versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
        "torch": torch.__version__,
    }
