"""Every backend against the masked reference.

CPU backends run here; CUDA ones have a class of their own. Tolerances: relative to the largest output, because backends sum in
other orders: 2e-6 in float32, 2e-2 in bfloat16 (judged by the reference in float32 on the same rounded weights).
"""

import dataclasses

import pytest
import torch
from experts import SPARSE, error, float32, ids, judge, make, some, tokens

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ACTIVATIONS
from moefication_cli.runtime import backends, torch_backends
from moefication_cli.runtime.backends import ALL_ON_TOKENS, BACKENDS, available, choose
from moefication_cli.runtime.reference import masked


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_backends_equal_the_reference(name: str, dtype: torch.dtype, gated: bool, bias: bool) -> None:
    act = "silu" if gated else "relu"
    for S, fix in ((0, False), (16, False), (0, True), (16, True)):
        w = make(S=S, gated=gated, bias=bias, act=act, fix=fix, dtype=dtype)
        for T in (1, 2, 7, 130):
            x = tokens(T, w)
            for k in (1, 5, w.num_experts):
                judge(name, w, x, ids(T, w.num_experts, k))
            judge(name, w, x, some(T, w.num_experts))


@pytest.mark.parametrize("name", SPARSE)
def test_another_selection_is_told_apart(name: str) -> None:
    w, x = make(), tokens(9, make())
    chosen = ids(9, 12, 4)
    other = chosen.clone()
    other[3, 0] = next(e for e in range(12) if e not in chosen[3].tolist())
    with torch.inference_mode():
        y, expected = BACKENDS[name].compute(x, other, w), masked(x, chosen, w)
    assert error(y, expected) > 1e-2
    same = torch.arange(9) != 3
    assert error(y[same], expected[same]) < 2e-6


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_numba_knows_every_activation(act: str, gated: bool) -> None:
    w = make(act=act, gated=gated)
    x = 4 * tokens(6, w)
    judge("numba", w, x, ids(6, 12, 5))
    other = "tanh" if act != "tanh" else "relu"
    with torch.inference_mode():
        wrong = masked(x, ids(6, 12, 5), dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, activation=other)))
        assert error(BACKENDS["numba"].compute(x, ids(6, 12, 5), w), wrong) > 1e-3


@pytest.mark.parametrize(
    ("d", "E", "N", "S"), [(64, 43, 4, 0), (36, 5, 3, 7), (20, 3, 1, 0), (300, 6, 33, 40), (1056, 4, 130, 0)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_numba_takes_any_shape(d: int, E: int, N: int, S: int, gated: bool) -> None:
    w = make(d=d, E=E, N=N, S=S, gated=gated, act="relu", fix=True)
    for T in (1, 2, 3, 4, 6, 65, 140):
        judge("numba", w, tokens(T, w), ids(T, E, max(1, E // 3)))


@pytest.mark.parametrize("name", SPARSE)
def test_experts_that_nobody_selects_and_tokens_without_experts(name: str) -> None:
    w = make(S=8, fix=True)
    x = tokens(10, w)
    judge(name, w, x, torch.full((10, 1), 7))
    judge(name, w, x, torch.zeros(10, 12, dtype=torch.bool))


@pytest.mark.parametrize("name", SPARSE)
def test_no_token_and_non_contiguous_input(name: str) -> None:
    w = make()
    with torch.inference_mode():
        assert BACKENDS[name].compute(tokens(0, w), ids(0, 12, 3), w).shape == (0, 32)
    wide = torch.randn(6, 64)
    judge(name, w, wide[:, ::2], ids(6, 12, 3))
    judge(name, w, torch.randn(32, 6).t(), ids(12, 12, 3)[::2])
    judge(name, w, tokens(6, w), some(12, 6).t())


@pytest.mark.parametrize("name", ["reference", *SPARSE])
def test_bad_selections_are_errors(name: str) -> None:
    w, x = make(), tokens(4, make())
    run = BACKENDS[name].compute
    with torch.inference_mode():
        for wrong in (12, -1, 10**9):
            bad = ids(4, 12, 3).clone()
            bad[2, 1] = wrong
            with pytest.raises(ConfigError, match=f"{wrong}|out of range"):
                run(x, bad, w)
        with pytest.raises(ConfigError, match="selection"):
            run(x, ids(5, 12, 3), w)
        with pytest.raises(ConfigError, match="11 experts"):
            run(x, torch.ones(4, 11, dtype=torch.bool), w)
        with pytest.raises(ConfigError, match="float"):
            run(x, torch.ones(4, 12), w)


@pytest.mark.parametrize("name", SPARSE)
def test_an_expert_named_twice_counts_once(name: str) -> None:
    w, x = make(fix=True), tokens(5, make())
    twice = torch.cat([ids(5, 12, 3), ids(5, 12, 3)[:, :1]], dim=1)
    judge(name, w, x, twice)
    with torch.inference_mode():
        assert error(BACKENDS[name].compute(x, twice, w), masked(x, ids(5, 12, 3), w)) < 2e-6


def test_gradients() -> None:
    w, chosen = make(fix=True), ids(5, 12, 4)
    x = tokens(5, w).requires_grad_()
    (expected,) = torch.autograd.grad(masked(x, chosen, w).square().sum(), x)
    for name in ("torch", "grouped"):
        (got,) = torch.autograd.grad(BACKENDS[name].compute(x, chosen, w).square().sum(), x)
        assert error(got, expected) < 1e-5
    with pytest.raises(ConfigError, match="gradients"):
        BACKENDS["numba"].compute(x, chosen, w)
    w.ffn.w_up_FD.requires_grad_()
    with pytest.raises(ConfigError, match="gradients"):
        BACKENDS["numba"].compute(x.detach(), chosen, w)
    with torch.no_grad():
        assert error(BACKENDS["numba"].compute(x, chosen, w), masked(x, chosen, w)) < 2e-6


def test_bfloat16_conversion_keeps_nan_and_rounds_to_even() -> None:
    w = make(E=2, N=8, bias=False, act="identity", dtype=torch.bfloat16)
    eye = torch.zeros(16, 32, dtype=torch.bfloat16)
    eye[:, :16] = torch.eye(16)
    w = dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, w_up_FD=eye, w_down_FD=eye))
    x = tokens(3, w)
    x[1, 3] = float("nan")
    x[2, 5] = float("inf")
    with torch.inference_mode():
        y = BACKENDS["numba"].compute(x, torch.ones(3, 2, dtype=torch.bool), w)
    assert torch.equal(y[0, :16], x[0, :16]) and y[1].isnan().any() and not y[0].isnan().any()
    halves = make(E=2, N=8, bias=False, act="identity", dtype=torch.bfloat16)
    with torch.inference_mode():
        y = BACKENDS["numba"].compute(x[:1], torch.ones(1, 2, dtype=torch.bool), halves)
        exact = masked(x[:1].float(), torch.ones(1, 2, dtype=torch.bool), float32(halves))
    assert (y.float() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("S", [0, 16])
def test_half_precision_is_added_up_in_float32(name: str, S: int) -> None:
    """A hundred experts a token: every sum in bfloat16 rounds, in float32 only the result does."""
    w = make(E=256, N=4 if name == "grouped" else 8, S=S, dtype=torch.bfloat16)  # experts of 4: rows of 8 bytes
    x, mask_TE = tokens(40, w), some(40, 256)
    with torch.inference_mode():
        y, exact = BACKENDS[name].compute(x, mask_TE, w), masked(x.float(), mask_TE, float32(w))
        other = masked(x.float(), ~mask_TE, float32(w))
        in_half = torch.zeros_like(x)
        for e in range(256):
            alone = torch.zeros_like(mask_TE)
            alone[:, e] = mask_TE[:, e]
            in_half += masked(x, alone, dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, b_down_D=None)))
    assert y.dtype == torch.bfloat16
    lost, lost_in_half = (float((found.float() - exact).std()) for found in (y, in_half + w.ffn.b_down_D))
    assert float((other - exact).std()) > 50 * lost  # another selection would be seen
    if not S:
        assert lost < 0.6 * lost_in_half


def test_kernels_know_every_activation_and_no_other() -> None:
    from moefication_cli.ffn import ACTIVATIONS
    from moefication_cli.routing.router import ROUTER_ACTIVATIONS
    from moefication_cli.runtime.cpu.numba_backend import ACTIVATION_CODES, activation_code

    assert set(ACTIVATION_CODES) == {*ACTIVATIONS, *ROUTER_ACTIVATIONS}
    with pytest.raises(UnavailableError, match="'mish'"):
        activation_code("mish")


def test_unavailable_backends_name_what_is_missing() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UnavailableError, match="no backend 'nmuba'"):
        available("nmuba", cpu, torch.float32)
    with pytest.raises(UnavailableError, match="runs on cuda"):
        available("triton", cpu, torch.float32)
    with pytest.raises(UnavailableError, match="fmoe is not installed"):
        available("fastmoe", cuda, torch.float32)
    with pytest.raises(UnavailableError, match="float64"):
        available("numba", cpu, torch.float64)
    with pytest.raises(UnavailableError, match="experts of 6"):
        available("grouped", cpu, torch.float32, make(N=6, E=11))
    with pytest.raises(UnavailableError, match="d_model 33"):
        torch_backends.grouped(tokens(3, make(d=33)), ids(3, 12, 2), make(d=33))
    for N, E in ((4, 11), (6, 12)):
        available("grouped", cpu, torch.float32, make(N=N, E=E))


def test_auto_choices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    w, cpu, cuda = make(), torch.device("cpu"), torch.device("cuda")
    assert choose(cpu, torch.float32, 1, w, 0.2) == "numba"
    assert choose(cpu, torch.float32, 1, w, 1.0) == "numba"
    assert choose(cpu, torch.float32, ALL_ON_TOKENS, w, 1.0) == "dense"
    assert choose(cpu, torch.float32, 1, w, 1.0, needs_grad=True) == "dense"
    assert choose(cpu, torch.float32, 1, w, 0.95) == "dense"
    assert choose(cpu, torch.float32, 1, w, 0.2, needs_grad=True) == "torch"
    assert choose(cpu, torch.float64, 1000, w, 0.2) == "torch"
    assert choose(cuda, torch.bfloat16, 512, make(N=32, dtype=torch.bfloat16), 0.2) == "dense"  # as measured
    assert choose(cuda, torch.bfloat16, 1, make(N=32, dtype=torch.bfloat16), 0.2) == "dense"  # launches take longer
    # A kernel that works on addresses never gets rows it would misread
    strided = dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, w_down_FD=w.ffn.w_down_FD.t().contiguous().t()))
    assert choose(cpu, torch.float32, 1, strided, 0.2) == "torch"
    assert choose(cpu, torch.float16, 1, w, 0.2) == "torch"  # the mixture, not the dense function
    monkeypatch.setattr(backends, "installed", lambda name: True)
    monkeypatch.setattr(backends, "CUDA_LEAST_BYTES", 1 << 10)
    assert choose(cuda, torch.float32, 1, w, 0.2) == "triton"
    assert choose(cuda, torch.float32, 8, make(N=32, E=3), 0.2) == "triton"
    assert choose(cuda, torch.float32, 9, w, 0.2) == "dense"
    monkeypatch.setattr(backends, "CUDA_MANY_FLOPS", 1e6)
    gated = make(N=32, gated=True, act="silu", dtype=torch.bfloat16)
    assert choose(cuda, torch.bfloat16, 512, gated, 0.2) == "triton"
    assert choose(cuda, torch.bfloat16, 9, gated, 0.2) == "dense"  # too few to gain
    assert choose(cuda, torch.bfloat16, 512, gated, 0.5) == "dense"
    assert choose(cuda, torch.bfloat16, 512, gated, 0.0) == "dense"  # nobody knows how much is selected
    assert choose(cuda, torch.bfloat16, 512, make(N=32, dtype=torch.bfloat16), 0.2) == "dense"
    assert choose(cuda, torch.float32, 512, make(N=32, gated=True, act="silu"), 0.2) == "dense"
    monkeypatch.setattr(backends, "installed", lambda name: False)
    backends._warn_once.cache_clear()
    caplog.clear()
    assert choose(cpu, torch.float32, 1, w, 0.2) == "torch"
    assert choose(cpu, torch.float32, 512, w, 0.2) == "torch"
    assert caplog.messages == [
        "backend numba is not available: the package numba is not installed; the next best is used"
    ]
