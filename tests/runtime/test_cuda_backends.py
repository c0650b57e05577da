"""Triton in its interpreter, the FastMoE adapter on a stand-in, and both on a GPU where there is one."""

import dataclasses
import sys
import types

import pytest
import torch
from experts import error, float32, ids, judge, make, some, tokens
from torch import Tensor, nn

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.runtime import reference
from moefication_cli.runtime.backends import BACKENDS, available
from moefication_cli.runtime.reference import masked


def _triton(monkeypatch: pytest.MonkeyPatch) -> object:
    """The triton backend on the CPU, by Triton's interpreter; skips where triton is not installed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed (it comes with CUDA builds of torch)")
    from moefication_cli.runtime.cuda import triton_kernels

    return triton_kernels.compute


def test_triton_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", _triton(monkeypatch))  # type: ignore[arg-type]
    for gated, act, S, d in (
        (False, "relu", 0, 32),
        (True, "silu", 8, 200),
        (False, "gelu", 0, 36),
        (False, "tanh", 4, 64),
    ):
        w = make(d=d, gated=gated, act=act, S=S, N=6, fix=bool(S))
        for T in (0, 1, 3):
            judge("triton", w, tokens(T, w), ids(T, 12, 5)) if T else None
        judge("triton", w, tokens(4, w), some(4, 12))
        judge("triton", w, tokens(2, w), torch.tensor([[3, 3, 7], [1, 2, 1]]))
        judge("triton", w, tokens(2, w), torch.zeros(2, 12, dtype=torch.bool))


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
        moved = {f.name: getattr(cpu.ffn, f.name) for f in dataclasses.fields(cpu.ffn)}
        ffn = FFNWeights(**{k: t.cuda() if isinstance(t, Tensor) else t for k, t in moved.items()})
        fix = cpu.compensation
        assert fix is not None and fix.constant_D is not None
        parts = Compensation(*(getattr(fix, f.name).cuda() for f in dataclasses.fields(fix)))
        w = ExpertWeights(ffn, 16, 16, parts)
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
