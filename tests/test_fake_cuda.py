"""Tensors on a GPU that is not there (`FakeTensorMode`): shapes are computed, and mixed devices raise, as on a real one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.straight_through import StraightThroughMoEFFN
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import MaxRatio, Threshold, TopK
from moefication_cli.routing.scores import expert_scores
from moefication_cli.runtime import torch_backends

T, D, F, E = 6, 16, 48, 12


class _Indexing(TorchFunctionMode):
    """x[...] as operators: torch's own indexing asks for the driver, which a build for CPUs has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return part_of(*args)
        if func is Tensor.__setitem__:
            return part_of(*args[:2]).copy_(args[2])
        return func(*args, **(kwargs or {}))


def part_of(x: Tensor, index: Any) -> Tensor:
    axis = 0
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            x = torch.ops.aten.slice.Tensor(x, axis, item.start, item.stop)
        else:
            assert isinstance(item, int)
            x, axis = x.select(axis, item), axis - 1
        axis += 1
    return x


@contextmanager
def gpu() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=False), _Indexing():
        yield


def weights(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> ExpertWeights:
    def make(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    ffn = FFNWeights(make(F, D), make(F, D), make(F, D), make(F), make(F), make(D), "silu")
    wide = torch.empty(3, D, device=device)
    return ExpertWeights(ffn, E, 0, Compensation(torch.empty(D, device=device), wide, wide))


def tokens(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(T, D, dtype=dtype, device="cuda")


def router() -> TwoLayerRouter:
    made = {"w_in_RD": (5, D), "b_in_R": (5,), "w_out_ER": (E, 5), "b_out_E": (E,)}
    return TwoLayerRouter(**{name: torch.empty(*shape, device="cuda") for name, shape in made.items()})


def selected() -> Tensor:
    return torch.empty(T, E, dtype=torch.bool, device="cuda")


def without_autograd(layer: StraightThroughMoEFFN) -> StraightThroughMoEFFN:
    """A build of torch for CPUs aborts where autograd asks for a GPU's streams: values only."""
    layer.parameters = {name: tensor.detach() for name, tensor in layer.parameters.items()}
    return layer


def straight_through(router: TwoLayerRouter | None, shared: int) -> Tensor:
    layer = without_autograd(StraightThroughMoEFFN(replace(weights(), num_shared=shared), router, Threshold(0.5)))
    layer.spread, layer._scale = 1.0, {}  # measured with float(), which fake tensors have none of
    return layer(tokens()).float().mean() + layer.active


def shares_of_all_layers() -> Tensor:
    """A layer with a router, one without and one that is dense, as `Conversion.spent` adds them up."""
    conversion = object.__new__(Conversion)
    conversion.plans, conversion.overheads = [None] * 3, {0: 0.1, 1: 0.0}  # type: ignore[list-item]
    routed = StraightThroughMoEFFN(weights(), router(), Threshold(0.5))
    routed.active = torch.empty((), device="cuda")
    conversion.layers = {0: routed, 1: StraightThroughMoEFFN(replace(weights(), num_shared=24), None, TopK(0))}
    conversion.loaded = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    return torch.stack(conversion.shares())


CASES: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: weights().ffn.forward(tokens()),
    "always on": lambda: torch_backends.always_on(tokens(), selected(), weights()),
    "scores": lambda: router().scores(tokens()),
    "norm scores": lambda: expert_scores(weights().ffn.hidden(tokens()), weights(), "norm"),
    "top k": lambda: TopK(3).select(router().scores(tokens())),
    "threshold": lambda: Threshold(0.5).select(router().scores(tokens())),
    "max ratio": lambda: MaxRatio(0.5).select(router().scores(tokens())),
    "straight through": lambda: straight_through(router(), 0),
    "shares": shares_of_all_layers,
    "straight through, no router": lambda: straight_through(None, 24),
}


@pytest.mark.parametrize("name", CASES)
def test_stays_on_the_device(name: str) -> None:
    with gpu():
        assert CASES[name]().device.type == "cuda"


def test_a_tensor_left_on_the_cpu_is_found() -> None:
    with gpu(), pytest.raises(RuntimeError, match="device"):
        router().scores(torch.empty(T, D)) + weights().ffn.forward(tokens())
