"""Triton in its interpreter, the FastMoE adapter on a stand-in, and both on a GPU where there is one."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from experts import error, float32, ids, judge, make, some, tokens
from torch import Tensor, nn

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Cumulative, Threshold, TopK
from moefication_cli.runtime import reference
from moefication_cli.runtime.backends import BACKENDS, available
from moefication_cli.runtime.reference import masked


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton's kernels run: on the GPU, or without one on the CPU in Triton's interpreter, if triton is installed."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed (it comes with CUDA builds of torch)")
    try:
        int(np.array([1]))
    except TypeError:  # numpy 2.4 and later
        pytest.skip("Triton's interpreter (3.6) turns arrays into numbers as numpy before 2.4 allowed")
    return "cpu"


def moved(w: ExpertWeights, device: str) -> ExpertWeights:
    return dataclasses.replace(
        w, ffn=w.ffn.to(device), compensation=None if w.compensation is None else w.compensation.to(device)
    )


@pytest.mark.cuda
def test_triton_kernels_equal_the_reference(device: str) -> None:
    for gated, act, S, d in (
        (False, "relu", 0, 32),
        (True, "silu", 8, 200),
        (False, "gelu", 0, 36),
        (False, "tanh", 4, 64),
    ):
        w = moved(make(d=d, gated=gated, act=act, S=S, N=6, fix=bool(S)), device)
        for T in (1, 3, 17):
            judge("triton", w, tokens(T, w).to(device), ids(T, 12, 5).to(device))
        judge("triton", w, tokens(4, w).to(device), some(4, 12).to(device))
        judge("triton", w, tokens(2, w).to(device), torch.tensor([[3, 3, 7], [1, 2, 1]], device=device))
        judge("triton", w, tokens(2, w).to(device), torch.zeros(2, 12, dtype=torch.bool, device=device))
        judge("triton", w, tokens(2, w).to(device), torch.ones(2, 12, dtype=torch.bool, device=device))
        assert BACKENDS["triton"].compute(tokens(0, w).to(device), ids(0, 12, 5).to(device), w).shape == (0, d)


def router_of(kind: str, D: int, E: int, device: str) -> TwoLayerRouter:
    g = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    if kind == "linear":
        return TwoLayerRouter(rand(E, D))
    if kind == "similarity":
        return TwoLayerRouter(rand(E, D), rand(E), normalise=True)
    activation = {"mlp": "tanh", "regression": "relu", "quadratic": "square"}[kind]
    biases = (rand(7), rand(E)) if kind != "mlp" else (None, None)
    return TwoLayerRouter(rand(7, D), biases[0], rand(E, 7), biases[1], activation, normalise=kind == "mlp")


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["linear", "similarity", "mlp", "regression", "quadratic"])
def test_triton_selects_as_the_router_and_its_rule(device: str, kind: str) -> None:
    from moefication_cli.runtime.cuda.triton_layer import TritonLayer

    for gated, S, N, d, E in ((False, 0, 4, 40, 33), (True, 5, 20, 300, 12)):
        w = moved(make(d=d, E=E, N=N, S=S, gated=gated, act="silu" if gated else "relu", fix=gated), device)
        router = router_of(kind, d, E, device)
        for T in (1, 5, 18):
            x = tokens(T, w).to(device)
            scores_TE = router.scores(x)
            for rule in (TopK(1), TopK(5), Threshold(float(scores_TE.flatten().sort().values[-T * 4]) - 1e-3)):
                chosen = rule.select(scores_TE)
                other = TopK(7).select(-scores_TE)
                with torch.inference_mode():
                    y = TritonLayer(w, router, rule)(x)
                assert error(y, masked(x, chosen, w)) < 1e-5
                assert error(y, masked(x, other, w)) > 5e-2


@pytest.mark.cuda
def test_triton_says_what_it_cannot_select_by(device: str) -> None:
    from moefication_cli.runtime.cuda.triton_layer import TritonLayer

    with pytest.raises(UnavailableError, match="cumulative"):
        TritonLayer(make(), router_of("linear", 32, 12, "cpu"), Cumulative(0.5))


@pytest.mark.cuda
def test_triton_breaks_ties_and_orders_negative_scores(device: str) -> None:
    from moefication_cli.runtime.cuda import triton_kernels as kernels

    scores_TE = torch.tensor([[0.0, -1.0, 0.0, 0.0, -0.5], [-3.0, -1.0, -2.0, float("inf"), -1e-30]], device=device)
    mask_TE, list_E = (
        torch.empty(2, 5, dtype=torch.int8, device=device),
        torch.zeros(5, dtype=torch.int32, device=device),
    )
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    kernels.select[(2,)](scores_TE, mask_TE, list_E, counts, 2, 5, 2, 5, 0.0, 0, RULE="top_k", LIST=True, BLOCK=8)
    assert mask_TE.tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert counts.tolist() == [2, 2, 2, 4] and list_E.tolist()[:4] == [0, 2, 3, 4]


MANY = 140  # tokens: sorted by expert, in more than one tile of them


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings",
    [
        {},  # experts of 8, two together
        {"N": 4, "gated": True, "act": "silu", "d": 40},
        {"N": 32, "E": 6, "S": 8, "fix": True},
        {"N": 80, "E": 4, "gated": True, "act": "gelu", "S": 4, "fix": True, "d": 200},
    ],
)
def test_triton_computes_many_tokens_sorted_by_expert(device: str, settings: dict[str, object]) -> None:
    w = moved(make(**settings), device)  # type: ignore[arg-type]
    x, E = tokens(MANY, w).to(device), w.num_experts
    for chosen in (
        ids(MANY, E, 3),
        some(MANY, E),
        torch.zeros(MANY, E, dtype=torch.bool),
        torch.ones(MANY, E, dtype=torch.bool),
    ):
        judge("triton", w, x, chosen.to(device))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["similarity", "mlp", "regression", "quadratic"])
def test_triton_selects_for_many_tokens_as_the_router_and_its_rule(device: str, kind: str) -> None:
    from moefication_cli.runtime.cuda.triton_layer import TritonLayer

    w = moved(make(d=72, E=33, N=16, gated=True, act="silu"), device)
    router = router_of(kind, 72, 33, device)
    x = tokens(MANY, w).to(device)
    scores_TE = router.scores(x)
    between = scores_TE.flatten().sort().values[-MANY * 4 - 1 : -MANY * 4 + 1]
    for rule in (TopK(5), Threshold(float(between.mean()))):
        with torch.inference_mode():
            y = TritonLayer(w, router, rule)(x)
        assert error(y, masked(x, rule.select(scores_TE), w)) < 1e-4
        assert error(y, masked(x, TopK(7).select(-scores_TE), w)) > 5e-2


class _StubOfFourFunctions:
    """A stub, in plain torch, of the four single-worker functions of `fmoe_cuda`. It is not FastMoE."""

    @staticmethod
    def expert_count(gate: Tensor, count: Tensor) -> None:
        count += torch.bincount(gate, minlength=count.shape[0]).int()

    @staticmethod
    def assign_pos(ends: Tensor, gate: Tensor, pos: Tensor) -> None:
        for i, expert in enumerate(gate.tolist()):  # as the atomics do: any order within an expert, `ends` counted down
            ends[expert] -= 1
            pos[int(ends[expert])] = i

    @staticmethod
    def linear_forward(x: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = x.split(count.tolist())
        return torch.cat(
            [nn.functional.linear(p, weight[e], None if bias is None else bias[e]) for e, p in enumerate(parts)]
        )

    @staticmethod
    def linear_backward(*args: Tensor) -> None:
        raise NotImplementedError


class TestFastMoEAdapter:
    """The adapter against the stub above: what it passes and how it reads the answer, not that FastMoE works."""

    def use(self, monkeypatch: pytest.MonkeyPatch, functions: object) -> None:
        monkeypatch.setitem(sys.modules, "fmoe", types.ModuleType("fmoe"))
        monkeypatch.setitem(sys.modules, "fmoe_cuda", functions)  # type: ignore[arg-type]
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(reference.torch, "_assert_async", lambda ok, text: None)

    def test_equals_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, _StubOfFourFunctions)
        for gated, bias, S, fix in ((False, True, 0, False), (True, False, 8, True), (True, True, 0, False)):
            w = make(gated=gated, bias=bias, S=S, fix=fix, act="silu" if gated else "relu")
            judge("fastmoe", w, tokens(7, w), ids(7, 12, 4))
            judge("fastmoe", w, tokens(7, w), some(7, 12))
            judge("fastmoe", w, tokens(7, w), torch.zeros(7, 12, dtype=torch.bool))

    def test_adds_up_in_float32_and_answers_in_the_dtype_of_the_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, _StubOfFourFunctions)
        w = make(dtype=torch.bfloat16, S=8)
        judge("fastmoe", w, tokens(7, w), ids(7, 12, 4))
        judge("fastmoe", w, tokens(7, w), torch.zeros(7, 12, dtype=torch.bool))

    def test_a_wrong_answer_fails_the_self_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Zero(_StubOfFourFunctions):
            @staticmethod
            def linear_forward(x: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return torch.zeros(x.shape[0], weight.shape[1])  # what version 1.0.2 did in bfloat16

        self.use(monkeypatch, Zero)
        with pytest.raises(UnavailableError, match="self-check"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())

    def test_is_not_used_where_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UnavailableError, match="cuda"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setitem(sys.modules, "fmoe", None)  # importing it fails, also where it is installed
        with pytest.raises(UnavailableError, match="fmoe"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    """Every CUDA backend against the reference on the CPU."""

    @pytest.mark.parametrize("name", ["torch", "grouped", "triton", "fastmoe"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gated", [False, True])
    def test_equals_the_reference(self, name: str, dtype: torch.dtype, gated: bool) -> None:
        cpu = make(d=64, E=16, N=16, S=16, gated=gated, act="silu" if gated else "relu", fix=True, dtype=dtype)
        fix = cpu.compensation
        assert fix is not None and fix.constant_D is not None
        w = moved(cpu, "cuda")
        try:
            available(name, torch.device("cuda"), dtype, w)
        except UnavailableError as missing:
            pytest.skip(missing.message)
        for T in (1, 8, 300):
            x = tokens(T, cpu)
            for chosen in (ids(T, 16, 3), some(T, 16)):
                with torch.inference_mode():
                    y = BACKENDS[name].compute(x.cuda(), chosen.cuda(), w).cpu()
                    expected = masked(x.float(), chosen, float32(cpu))
                    wrong = masked(x.float(), ids(T, 16, 3, seed=9), float32(cpu))
                assert error(y, expected) < (5e-3 if dtype == torch.float32 else 3e-2)  # TF32 may be on
                assert error(y, wrong) > 5e-2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_many_tokens_through_large_experts(self, dtype: torch.dtype) -> None:
        """Pieces of the size that a large layer gets, which must fit in the GPU's shared memory; the same bytes twice."""
        w = moved(make(d=512, E=8, N=160, gated=True, act="silu", bias=False, dtype=dtype), "cuda")
        x, chosen = tokens(1000, w).cuda(), some(1000, 8).cuda()
        with torch.inference_mode():
            y, again = BACKENDS["triton"].compute(x, chosen, w), BACKENDS["triton"].compute(x, chosen, w)
            expected = masked(x.float(), chosen, float32(w))
        assert torch.equal(y, again)
        assert error(y, expected) < (5e-3 if dtype == torch.float32 else 3e-2)
        assert error(y, expected.roll(1, 0)) > 5e-2
