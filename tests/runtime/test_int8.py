"""int8 weights: the quantisation by hand, and the kernels, plain and in integers, against the reference on the numbers they stand for."""

import dataclasses

import pytest
import torch
from experts import error, ids, make, some
from torch import Tensor

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ExpertWeights, quantise_rows
from moefication_cli.runtime.backends import BACKENDS, available, choose
from moefication_cli.runtime.cpu.numba_backend import FEW_TOKENS, CompiledLayer
from moefication_cli.runtime.cpu.simd_int8 import has_integer_dots
from moefication_cli.runtime.reference import masked

PLAIN, INTEGER = (
    2e-6,
    2e-2,
)  # of the largest output: other orders of sums; tokens and hidden activations rounded to 1/127 of the largest
DOTS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not has_integer_dots(), reason="this CPU has no AVX-512 VNNI")),
]


def int8(w: ExpertWeights) -> ExpertWeights:
    found: dict[str, Tensor] = {}
    for part in ("up", "down", "gate"):
        w_FD = getattr(w.ffn, f"w_{part}_FD")
        if w_FD is not None:
            found[f"w_{part}_FD"], found[f"scale_{part}_F"] = quantise_rows(w_FD)
    return dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, **found))


def inputs(T: int, d: int) -> Tensor:
    return torch.randn(T, d, generator=torch.Generator().manual_seed(T))


def test_rows_are_quantised_as_by_hand() -> None:
    w_FD = torch.tensor(
        [[1.27, -0.635, 0.014, 0.015], [0.0, 0.0, 0.0, 0.0], [-2.54, 2.54, 0.03, -0.01], [1e-45, 0.0, 0.0, 0.0]]
    )
    q_FD, scale_F = quantise_rows(w_FD)
    assert q_FD.tolist()[:3] == [[127, -64, 1, 2], [0, 0, 0, 0], [-127, 127, 2, 0]]  # -63.5 and 1.5 to even
    assert torch.allclose(scale_F[:3], torch.tensor([0.01, 0.0, 0.02]))
    assert q_FD.dtype == torch.int8 and scale_F.dtype == torch.float32
    wide = int8(make(gated=True)).ffn.dequantised()
    exact = make(gated=True).ffn
    for name in ("w_up_FD", "w_gate_FD", "w_down_FD"):
        w, near = getattr(exact, name), getattr(wide, name)
        assert ((w - near).abs() <= w.abs().amax(1, keepdim=True) / 253).all() and not torch.equal(w, near)
    for bad in (float("nan"), float("inf")):
        w_FD[2, 1] = bad
        with pytest.raises(ConfigError, match="row 2"):
            quantise_rows(w_FD)


@pytest.mark.parametrize("dots", DOTS)
@pytest.mark.parametrize(("gated", "act"), [(False, "relu"), (False, "gelu"), (True, "silu"), (True, "relu")])
@pytest.mark.parametrize(
    ("d", "E", "N", "S"),
    [(32, 12, 8, 16), (64, 43, 4, 0), (36, 5, 3, 7), (20, 3, 1, 0), (300, 6, 33, 40), (1056, 4, 130, 0)],
)
def test_kernels_equal_the_reference(d: int, E: int, N: int, S: int, gated: bool, act: str, dots: bool) -> None:
    w = int8(make(d=d, E=E, N=N, S=S, gated=gated, act=act, fix=True))
    layer = CompiledLayer(w, integer_dots=dots)
    for T in (1, 2, 3, 4, 6, 65, 140):
        x = inputs(T, d)
        for selected in (
            some(T, E),
            ids(T, E, 1),
            torch.ones(T, E, dtype=torch.bool),
            torch.zeros(T, E, dtype=torch.bool),
        ):
            with torch.inference_mode():
                off = error(layer(x, selected), masked(x, selected, w))
                wrong = error(layer(x, selected), masked(x, ~some(T, E), w))
            assert off < (INTEGER if dots and T > FEW_TOKENS else PLAIN), (T, off)
            assert wrong > 3 * INTEGER or E < 6


@pytest.mark.parametrize("dots", DOTS)
def test_where_half_of_the_neurons_are_zero_only_the_others_are_read(dots: bool) -> None:
    w = make(d=96, E=8, N=32)
    for shift in (-1.5, -0.5, 0.0, 2.0):  # from few neurons above zero to all of them
        shifted = dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, b_up_F=torch.full_like(w.ffn.b_up_F, shift)))  # type: ignore[arg-type]
        ready = int8(shifted)
        with torch.inference_mode():
            off = error(
                CompiledLayer(ready, integer_dots=dots)(inputs(40, 96), some(40, 8)),
                masked(inputs(40, 96), some(40, 8), ready),
            )
        assert off < (INTEGER if dots else PLAIN)


@pytest.mark.parametrize("dots", DOTS)
def test_what_is_not_finite_stays_so_and_padding_is_zero(dots: bool) -> None:
    w = int8(make(d=96, S=8))
    x, real = inputs(9, 96), torch.arange(9) != 4
    x[2, 5], x[3, 90] = float("nan"), float("inf")
    with torch.inference_mode():
        y = CompiledLayer(w, integer_dots=dots)(x, some(9, 12), real)
        expected = masked(x, some(9, 12), w)
    assert y[2].isnan().all() and not y[3].isfinite().all() and (y[4] == 0).all()
    rest = [0, 1, 5, 6, 7, 8]
    assert error(y[rest], expected[rest]) < (INTEGER if dots else PLAIN)
    zero = torch.zeros(5, 96)
    with torch.inference_mode():
        assert error(CompiledLayer(w, integer_dots=dots)(zero, some(5, 12)), masked(zero, some(5, 12), w)) < INTEGER


def test_torch_backends_and_the_choice() -> None:
    w, x = int8(make(S=16, gated=True, act="silu")), inputs(20, 32)
    with torch.inference_mode():
        expected = masked(x, some(20, 12), w)
        assert error(BACKENDS["torch"].compute(x, some(20, 12), w), expected) < PLAIN
        every = masked(x, torch.ones(20, 12, dtype=torch.bool), w)
        assert error(BACKENDS["dense"].compute(x, x, w), every) < PLAIN and error(every, expected) > 0.05
        exact = masked(x, some(20, 12), make(S=16, gated=True, act="silu"))
    assert 1e-4 < error(expected, exact) < INTEGER
    cpu = torch.device("cpu")
    for share in (0.2, 0.95, 1.0):
        assert choose(cpu, torch.float32, 512, w, share) == "numba"
    with pytest.raises(UnavailableError, match="grouped_mm"):
        available("grouped", cpu, torch.float32, w)
    with pytest.raises(UnavailableError, match="bfloat16"):
        available("numba", cpu, torch.bfloat16, w)
