"""How long an FFN takes on this machine: dense, as experts of one size, and masked (every neuron computed, the others' zeroed).

FLOPs do not show what small experts cost. A few points are measured per kind of FFN, size of experts and number of tokens, for the
present number of threads, and kept beside the compiled kernels: another version of the kernels has a file of its own, and so
has another machine. What is measured on a busy machine is kept as well: `bench RUN` measures anew.

Weights are random and routers choose at random, so that many tokens touch more experts together than those of a trained router.
Axes as in `ffn`.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.compiled import cache_folder, cpu_features, processor
from moefication_cli.errors import CorruptArtifactError, MoEficationError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.torch_backends import dense
from moefication_cli.store import jsonio
from moefication_cli.store.files import make_dirs

TOKENS = (1, 64, 512)  # per call, of what `bench` measures for `auto`
SHARES = (0.1, 0.5)  # of the neurons, between which time is taken as linear
CLEARLY = 0.9  # of the experts' time: masked products must take less to be preferred, because measurements vary
_SCHEMA = "moefication/ffn-times@1"
_MOST_BYTES = 512 << 20  # of weights in rotation
_SECONDS, _FEWEST, _MOST = 0.4, 5, 50  # per point: time, and rounds
_UNSTEADY = 2.0  # median over least time, from which on a measurement is doubted
_LEAST_WIDTH, _WIDTH_SHARE = 16, 8  # of routers: d_model / 8, as train-router makes them


@dataclass(frozen=True)
class FFNKind:
    """What decides the time of an FFN. `layers`: how many of them take turns in a model, and so leave the cache."""

    d_model: int
    num_neurons: int
    gated: bool
    activation: str
    dtype: str
    layers: int

    @property
    def key(self) -> str:
        """Its name in the file: `12 x 768x3072 relu float32`."""
        gate = "gated " if self.gated else ""
        return f"{self.layers} x {self.d_model}x{self.num_neurons} {gate}{self.activation} {self.dtype}"

    @property
    def num_bytes(self) -> int:
        """Weights of one FFN."""
        return self.d_model * self.num_neurons * (3 if self.gated else 2) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class FFNTimes:
    """Seconds of one call, measured in turns: `few` and `many` with SHARES of the neurons, router included, like `masked`."""

    dense: float
    masked: float
    few: float
    many: float
    router_flops: int  # multiply-adds per token of the router these were measured with

    def __post_init__(self) -> None:
        """Raises ValueError unless all are numbers that times can be."""
        seconds = (self.dense, self.masked, self.few, self.many)
        if (
            not all(type(s) is float and math.isfinite(s) and s > 0 for s in seconds)
            or type(self.router_flops) is not int
        ):
            raise ValueError(f"{seconds} are no times")

    def experts(self, share: float) -> float:
        """Seconds of the experts with this share of the neurons: a line through both points that never falls."""
        slope = max(0.0, self.many - self.few) / (SHARES[1] - SHARES[0])
        return max(min(self.few, self.many) / 2, self.few + slope * (share - SHARES[0]))


Say = Callable[[str], None]


class KernelTimes:
    """What is known of this machine at the present number of threads. `path`: the file it is kept in."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.machine = {
            "processor": processor(),
            "features": jsonio.digest(sorted(cpu_features()))[:16],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        folder = cache_folder(Path(__file__).parent / "cpu")
        self.path = folder / f"ffn-times-{jsonio.digest(self.machine)[:16]}.json"
        self._found = self._read()

    def known(self, kind: FFNKind, size: int, tokens: int) -> FFNTimes | None:
        """What was measured of experts of that many neurons, or None."""
        return self._found.get(kind.key, {}).get(str(tokens), {}).get(str(size))

    def of(self, kind: FFNKind, size: int, tokens: int, *, anew: bool = False) -> FFNTimes:
        """What is known, else what is measured now, which is then kept."""
        found = None if anew else self.known(kind, size, tokens)
        if found is None:
            self._say(
                f"measuring {kind.key}, experts of {size}, {tokens} tokens a call ({self.machine['threads']} threads)"
            )
            found, unsteady = measure(kind, size, tokens)
            if unsteady > _UNSTEADY:
                self._say(
                    f"calls took {unsteady:.1f} times their least time in the median: this machine is busy, and what is kept "
                    "may be wrong; `moefication bench RUN` measures anew"
                )
            self.keep(kind, size, tokens, found)
        return found

    def keep(self, kind: FFNKind, size: int, tokens: int, times: FFNTimes) -> None:
        """Into the file; where that cannot be written it is said, and the times are known to this object alone."""
        self._found.setdefault(kind.key, {}).setdefault(str(tokens), {})[str(size)] = times
        ffns = {
            key: {tokens: {size: asdict(times) for size, times in sizes.items()} for tokens, sizes in by_tokens.items()}
            for key, by_tokens in self._found.items()
        }
        try:
            make_dirs(self.path.parent)
            jsonio.write(self.path, jsonio.sealed({"schema": _SCHEMA, "machine": self.machine, "ffns": ffns}))
        except MoEficationError as error:
            self._say(f"times are not kept: {error.message}")

    def masked_from(self, kind: FFNKind, size: int, share: float) -> int | None:
        """The least number of tokens per call from which on masked products are clearly faster; None where that is not known."""
        least = None
        for tokens in sorted(TOKENS, reverse=True):
            found = self.known(kind, size, tokens)
            if found is None or found.masked > CLEARLY * found.experts(share):
                break
            least = tokens
        return least

    def _read(self) -> dict[str, dict[str, dict[str, FFNTimes]]]:
        if not self.path.exists():
            return {}
        try:
            content = jsonio.read_object(self.path)
            jsonio.check_seal(content, self.path)
            if (content.get("schema"), content.get("machine"), "seal" in content) != (_SCHEMA, self.machine, True):
                self._say(f"{self.path} is not of this machine: what is needed of it is measured anew")
                return {}
            return {
                key: {tokens: _parsed(sizes) for tokens, sizes in by_tokens.items()}
                for key, by_tokens in content["ffns"].items()
            }
        except (CorruptArtifactError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            self._say(f"{self.path} cannot be used ({error}): what is needed of it is measured anew")
            return {}


def _parsed(sizes: Mapping[str, Any]) -> dict[str, FFNTimes]:
    return {size: FFNTimes(**entry) for size, entry in sizes.items()}


@torch.inference_mode()
def measure(kind: FFNKind, size: int, tokens: int) -> tuple[FFNTimes, float]:
    """(least times of calls in turns, how many times as long the median of the unsteadiest took).

    Each call is on the next of several FFNs, so that weights are as cold as in the model. Other programs only add to a time, and
    much to short ones on all cores.
    """
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(max(tokens, 256), kind.d_model, generator=generator)
    count = max(1, min(kind.layers, _MOST_BYTES // kind.num_bytes))
    layers = [_ways(kind, size, x_TD, generator) for _ in range(count)]
    x_TD = x_TD[:tokens].to(getattr(torch, kind.dtype))
    for ways in layers:  # kernels are compiled and prepared by the first call
        for way in ways:
            way(x_TD)
    taken: list[list[float]] = [[], [], [], []]
    began, rounds = time.perf_counter(), 0
    while rounds < _FEWEST or (rounds < _MOST and time.perf_counter() - began < _SECONDS):
        for number, seconds in enumerate(taken):  # a quarter of the rotation apart: all ways share weights
            call = layers[(rounds + number * count // 4) % count][number]
            start = time.perf_counter()
            call(x_TD)
            seconds.append(time.perf_counter() - start)
        rounds += 1
    dense_s, masked, few, many = (min(seconds) for seconds in taken)
    unsteady = max(statistics.median(seconds) / min(seconds) for seconds in taken)
    return FFNTimes(dense_s, masked, few, many, _router_shape(kind, size)[2]), unsteady


def _router_shape(kind: FFNKind, size: int) -> tuple[int, int, int]:
    """(experts, width, multiply-adds per token)."""
    experts, width = kind.num_neurons // size, max(_LEAST_WIDTH, kind.d_model // _WIDTH_SHARE)
    return experts, width, width * (kind.d_model + experts)


def _ways(kind: FFNKind, size: int, x_TD: Tensor, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """Dense, masked, and experts with both SHARES of the neurons, of one FFN with random weights."""
    E, R, _ = _router_shape(kind, size)
    D, F = kind.d_model, kind.num_neurons

    def rows() -> Tensor:
        return (torch.randn(F, D, generator=generator) / D**0.5).to(getattr(torch, kind.dtype))

    ffn = FFNWeights(rows(), rows(), rows() if kind.gated else None, activation=kind.activation)
    weights = ExpertWeights(ffn, E, F - E * size)
    w_in_RD, w_out_ER = (torch.randn(*shape, generator=generator) / D**0.5 for shape in ((R, D), (E, R)))
    router = TwoLayerRouter(w_in_RD, torch.zeros(R), w_out_ER, torch.zeros(E))
    scores_TE = router.scores(x_TD)
    few, many = (Threshold.calibrate(scores_TE, share * E) for share in SHARES)

    def all_neurons(x_TD: Tensor) -> Tensor:
        return dense(x_TD, None, weights)

    masked = MoEFFN(weights, router, few, backend="reference")
    return [all_neurons, masked, *(MoEFFN(weights, router, rule, may_go_dense=False) for rule in (few, many))]
