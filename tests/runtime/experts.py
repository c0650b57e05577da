"""Random experts, selections and tokens, and the judgement of a backend against the masked reference."""

import dataclasses

import torch
from torch import Tensor

from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.runtime.backends import BACKENDS
from moefication_cli.runtime.reference import masked

SPARSE = ["torch", "grouped", "numba"]


def make(
    d: int = 32,
    E: int = 12,
    N: int = 8,
    S: int = 0,
    gated: bool = False,
    bias: bool = True,
    act: str = "relu",
    fix: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    """Random weights of unit scale."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    F = S + E * N
    ffn = FFNWeights(
        rand(F, d, scale=d**-0.5),
        rand(F, d, scale=F**-0.5),
        rand(F, d, scale=d**-0.5) if gated else None,
        rand(F, scale=0.3) if bias else None,
        rand(F, scale=0.3) if bias and gated else None,
        rand(d, scale=0.3) if bias else None,
        act,
    )
    parts = Compensation(rand(d), rand(5, d, scale=d**-0.5), rand(5, d)) if fix else None
    return ExpertWeights(ffn, E, S, parts)


def ids(T: int, E: int, k: int, seed: int = 1) -> Tensor:
    """Distinct random experts of each token, [T, k]."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).topk(k, dim=1).indices


def some(T: int, E: int) -> Tensor:
    """About 0.4 of the experts of each token, [T, E] bool; another count for each token, at least one expert in all."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(T)) < 0.4


def tokens(T: int, w: ExpertWeights, seed: int = 2) -> Tensor:
    x = torch.randn(T, w.ffn.d_model, generator=torch.Generator().manual_seed(seed))
    return x.to(w.ffn.w_up_FD.dtype)


def float32(w: ExpertWeights) -> ExpertWeights:
    """The same numbers in float32."""

    def wide(record: object) -> object:
        changed = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}  # type: ignore[arg-type]
        return dataclasses.replace(record, **{k: t.float() for k, t in changed.items() if isinstance(t, Tensor)})  # type: ignore[type-var]

    return dataclasses.replace(
        w, ffn=wide(w.ffn), compensation=None if w.compensation is None else wide(w.compensation)
    )


def error(y: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected output."""
    return float((y.float() - expected.float()).abs().max() / expected.float().abs().max())


def judge(name: str, w: ExpertWeights, x: Tensor, selected: Tensor) -> None:
    """Backend `name` equals the reference on this selection, and would be told from another selection."""
    with torch.inference_mode():
        y = BACKENDS[name].compute(x, selected, w)
        expected = masked(x.float(), selected, float32(w))
    assert y.shape == x.shape and y.dtype == x.dtype
    assert error(y, expected) < (2e-6 if x.dtype == torch.float32 else 2e-2)
