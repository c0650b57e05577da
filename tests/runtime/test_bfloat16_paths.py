"""bfloat16 layers by tiles (AMX, AVX512-BF16) against a float64 reference; which path runs, and what the cache keeps apart."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.runtime import reference
from moefication_cli.runtime.cpu import bfloat16_paths, numba_backend

TENSORS = ("w_up_FD", "w_down_FD", "w_gate_FD", "b_up_F", "b_gate_F", "b_down_D")


@pytest.fixture(params=["amx", "avx512_bf16"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path by tiles, used for every number of tokens and every size of experts."""
    if request.param not in bfloat16_paths.available_paths():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(numba_backend, "TILED_LEAST_TOKENS", dict.fromkeys(bfloat16_paths.PATHS, 1))
    monkeypatch.setattr(numba_backend, "TILED_LEAST_EXPERT", 1)
    return str(request.param)


def layer(
    width: int, neurons: int, experts: int, shared: int, activation: str, gated: bool, rank: int = 0
) -> ExpertWeights:
    """Random weights in bfloat16."""
    generator = torch.Generator().manual_seed(width + neurons)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    gates = (make(neurons, width), make(neurons)) if gated else (None, None)
    ffn = FFNWeights(
        make(neurons, width), make(neurons, width), gates[0], make(neurons), gates[1], make(width), activation
    )
    fix = Compensation(make(width), make(rank, width), make(rank, width)) if rank else None
    return ExpertWeights(ffn, experts, shared, fix)


def wide(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in float64."""
    kept: dict[str, Any] = {name: getattr(weights.ffn, name) for name in TENSORS}
    doubled: dict[str, Any] = {name: None if t is None else t.double() for name, t in kept.items()}
    ffn = replace(weights.ffn, **doubled)
    fix = None if weights.compensation is None else weights.compensation.to(torch.float64)
    return ExpertWeights(ffn, weights.num_experts, weights.num_shared, fix)


def error(y_TD: Tensor, want_TD: Tensor) -> float:
    """Relative to the norm of what is wanted."""
    return float((y_TD.double() - want_TD).norm() / want_TD.norm())


CASES: dict[str, tuple[int, int, int, int, str, bool, int, int, int]] = {
    "even": (64, 128, 4, 0, "relu", False, 0, 37, 2),
    "odd width, odd experts, shared, gate, compensation": (71, 168, 5, 3, "gelu", True, 7, 37, 2),
    "more neurons than a unit, last tile partly filled": (70, 640, 2, 40, "silu", True, 0, 50, 1),
    "one expert, two rounds": (33, 64, 1, 0, "relu", False, 0, 600, 1),
    "all experts": (96, 96, 3, 0, "relu2", False, 5, 17, 3),
    "nothing selected": (96, 64, 2, 0, "relu", False, 5, 3, 0),
    "experts of 4": (64, 64, 16, 0, "relu", False, 0, 40, 5),
    "one token": (64, 64, 2, 0, "tanh", False, 0, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_rounds_no_worse_than_stock(name: str, path: str) -> None:
    width, neurons, experts, shared, activation, gated, rank, tokens, k = CASES[name]
    weights = layer(width, neurons, experts, shared, activation, gated, rank)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, weights.ffn.d_model, generator=generator).bfloat16()
    scores_TE = torch.rand(tokens, weights.num_experts, generator=generator)
    ids_TK = scores_TE.topk(k, 1).indices if k else torch.zeros(tokens, weights.num_experts, dtype=torch.bool)
    y_TD = numba_backend.CompiledLayer(weights, bfloat16_path=path)(x_TD, ids_TK)
    want_TD = reference.masked(x_TD.double(), ids_TK, wide(weights))
    stock_TD = reference.masked(x_TD, ids_TK, weights)
    assert error(y_TD, want_TD) <= 1.1 * error(stock_TD, want_TD) + 2e-4
    if 0 < k < weights.num_experts:  # negative control: one expert more for one token is seen
        mask_TE = torch.zeros(tokens, weights.num_experts, dtype=torch.bool).scatter_(1, ids_TK, True)
        assert error(numba_backend.CompiledLayer(weights, bfloat16_path=path)(x_TD, mask_TE), want_TD) < 5e-3
        mask_TE[0] = True
        other_TD = numba_backend.CompiledLayer(weights, bfloat16_path=path)(x_TD, mask_TE)
        assert error(other_TD[:1], want_TD[:1]) > 2e-2


@torch.inference_mode()
def test_padding_counts_and_bad_ids(path: str) -> None:
    weights = layer(64, 128, 4, 0, "relu", False, 7)
    x_TD, ids_TK = torch.randn(40, 64).bfloat16(), torch.randint(0, 4, (40, 1))
    real_T, counts_E = torch.rand(40) < 0.7, torch.zeros(4, dtype=torch.int64)
    compiled = numba_backend.CompiledLayer(weights, bfloat16_path=path)
    y_TD = compiled(x_TD, ids_TK, real_T, counts_E)
    assert bool((y_TD[~real_T] == 0).all())
    assert torch.equal(counts_E, ids_TK[real_T].flatten().bincount(minlength=4))
    assert torch.equal(y_TD[real_T], compiled(x_TD[real_T].contiguous(), ids_TK[real_T]))
    with pytest.raises(ConfigError, match="out of range"):
        compiled(x_TD, ids_TK + 4)


@torch.inference_mode()
def test_the_same_bytes_for_any_number_of_threads(path: str) -> None:
    weights = layer(1024, 4096, 128, 0, "relu", False)
    x_TD, ids_TK = torch.randn(64, 1024).bfloat16(), torch.rand(64, 128).topk(26, 1).indices
    compiled, before = numba_backend.CompiledLayer(weights, bfloat16_path=path), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled(x_TD, ids_TK))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_the_machine_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_paths, "available_paths", lambda: ("float32",))
    weights = layer(64, 128, 4, 0, "relu", False)
    assert numba_backend.CompiledLayer(weights).bfloat16_path == "float32"
    with pytest.raises(UnavailableError, match="does not run on this machine"):
        numba_backend.CompiledLayer(weights, bfloat16_path="amx")


def test_kernels_of_another_feature_set_are_compiled_apart() -> None:
    """numba keys its cache by the features it compiles for, and the choice of the path reads the same string."""
    code = (
        "from moefication_cli.runtime.cpu import bfloat16_paths as p; from numba.core.registry import cpu_target as t;"
        "print(p.available_paths(), t.target_context.codegen().magic_tuple()[2])"
    )

    def told(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    plain = told(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="+sse2")
    assert plain.startswith("('float32',)")
    assert plain.strip().endswith("+sse2")
    if len(bfloat16_paths.available_paths()) > 1:
        assert "avx512bf16" in told()
