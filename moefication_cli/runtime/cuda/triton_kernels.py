"""The `triton` backend: CUDA gather kernels for decode, a handful of tokens that each read only their own experts' weights.

Two launches: h[t, k, n] = act(x_t . w_up) for the neurons of the token's k-th expert, then y_t += sum over k, n of h w_down, split over
experts so that one token fills the card, added in float32. Shared neurons, bias and compensation are plain torch matmuls.
Block sizes are fixed, not tuned: written without a GPU at hand, checked with Triton's interpreter only. For many tokens
`grouped` is the better backend: here a weight is read once per token that wants it. Shapes: `runtime.reference`.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.runtime.reference import check_selection
from moefication_cli.runtime.torch_backends import always_on

BLOCK_D = 128  # columns of a weight row per step
ROWS = 32  # neurons per program of the first launch
EXPERTS = 4  # experts per program of the second


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, as in torch
    elif ACT == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACT == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        return x


@triton.jit
def _hidden(
    x_ptr, ids_ptr, up_ptr, gate_ptr, b_up_ptr, b_gate_ptr, h_ptr, D, N, S, K,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS_UP: tl.constexpr, BIAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (t * K + k, block of neurons): h of one expert's neurons for one token; zero for the id -1."""
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(ids_ptr + pair)
    n = tl.where(expert >= 0, n, N)  # out of range: nothing is read, zero is written below
    live = n < N
    row = S + expert * N + n
    up = tl.zeros((ROWS,), tl.float32)
    gate = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (pair // K) * D + d, mask=d < D, other=0.0).to(tl.float32)
        at = row[:, None] * D + d[None, :]
        inside = live[:, None] & (d < D)[None, :]
        up += tl.sum(tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32) * x[None, :], axis=1)
        if GATED:
            gate += tl.sum(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32) * x[None, :], axis=1)
    if BIAS_UP:
        up += tl.load(b_up_ptr + row, mask=live, other=0.0).to(tl.float32)
    if BIAS_GATE:
        gate += tl.load(b_gate_ptr + row, mask=live, other=0.0).to(tl.float32)
    h = _activate(gate, ACT) * up if GATED else _activate(up, ACT)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(h_ptr + pair * N + n, tl.where(live, h, 0.0), mask=n < N)


@triton.jit
def _output(
    h_ptr, ids_ptr, down_ptr, y_ptr, D, N, S, K,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Program (t, block of columns, group of experts): adds the group's part of y_t[columns], in float32."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(EXPERTS):
        k = tl.program_id(2) * EXPERTS + i
        expert = tl.load(ids_ptr + token * K + k)
        for start in range(0, N, ROWS):
            n = start + tl.arange(0, ROWS)
            h = tl.load(h_ptr + (token * K + k) * N + n, mask=n < N, other=0.0)
            # A neuron that ReLU switched off, or that belongs to no expert, contributes nothing: its row is not read.
            inside = (h != 0.0)[:, None] & (d < D)[None, :]
            w = tl.load(down_ptr + (S + expert * N + n)[:, None] * D + d[None, :], mask=inside, other=0.0)
            total += tl.sum(w.to(tl.float32) * h[:, None], axis=0)
    tl.atomic_add(y_ptr + token * D + d, total, mask=d < D)


def _ids(selected: Tensor, num_experts: int) -> Tensor:
    """ids_TK (int64), K a multiple of EXPERTS, -1 for no expert: repeats are dropped, a mask gives its fullest token's count."""
    if selected.dtype == torch.bool:
        most = int(selected.sum(dim=1).max()) if selected.numel() else 0
        on_TK, ids_TK = selected.to(torch.int8).topk(max(1, most), dim=1)
        return pad(ids_TK.masked_fill(on_TK == 0, -1), (0, -ids_TK.shape[1] % EXPERTS), value=-1)
    ids_TK = selected.long().sort(dim=1).values
    again_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    again_TK[:, 1:] = ids_TK[:, 1:] == ids_TK[:, :-1]
    return pad(ids_TK.masked_fill(again_TK, -1), (0, -ids_TK.shape[1] % EXPERTS), value=-1)


def compute(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """y_TD (see `runtime.reference`). Raises ConfigError for a bad selection and where gradients are asked for."""
    ffn, num_tokens = weights.ffn, x_TD.shape[0]
    if torch.is_grad_enabled() and (x_TD.requires_grad or ffn.w_up_FD.requires_grad):
        raise ConfigError("backend triton computes no gradients", "call it under torch.inference_mode()")
    check_selection(selected, num_tokens, weights.num_experts)
    ids_TK = _ids(selected, weights.num_experts).contiguous()
    mask_TE = torch.zeros(num_tokens, weights.num_experts + 1, dtype=torch.bool, device=x_TD.device)
    mask_TE = mask_TE.scatter_(1, ids_TK % (weights.num_experts + 1), True)[:, :-1]  # -1 lands in the last column
    y_TD = always_on(x_TD, mask_TE, weights).float().contiguous()
    K, N, D = ids_TK.shape[1], weights.expert_size, ffn.d_model
    if num_tokens == 0 or K == 0:
        return y_TD.to(x_TD.dtype)
    x_TD = x_TD.contiguous()
    h_TKN = torch.empty(num_tokens, K, N, dtype=torch.float32, device=x_TD.device)
    rows = max(1, min(ROWS, triton.next_power_of_2(N)))
    gate_FD = ffn.w_up_FD if ffn.w_gate_FD is None else ffn.w_gate_FD
    b_up_F = x_TD if ffn.b_up_F is None else ffn.b_up_F
    b_gate_F = x_TD if ffn.b_gate_F is None else ffn.b_gate_F
    # Triton launches on the current device, whatever the tensors are on
    with torch.cuda.device(x_TD.device) if x_TD.is_cuda else nullcontext():
        _hidden[(num_tokens * K, triton.cdiv(N, rows))](
            x_TD, ids_TK, ffn.w_up_FD, gate_FD, b_up_F, b_gate_F, h_TKN, D, N, weights.num_shared, K,
            ACT=ffn.activation, GATED=ffn.gated, BIAS_UP=ffn.b_up_F is not None, BIAS_GATE=ffn.b_gate_F is not None,
            BLOCK=BLOCK_D, ROWS=rows,
        )  # fmt: skip
        _output[(num_tokens, triton.cdiv(D, BLOCK_D), triton.cdiv(K, EXPERTS))](
            h_TKN, ids_TK, ffn.w_down_FD, y_TD, D, N, weights.num_shared, K, BLOCK=BLOCK_D, ROWS=rows, EXPERTS=EXPERTS
        )
    return y_TD.to(x_TD.dtype)
