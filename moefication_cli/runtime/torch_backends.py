"""Backends in plain torch: `dense` (every neuron), `torch` (a loop over experts) and `grouped` (one grouped matmul per projection).

All work on any device; `torch` and `dense` in any dtype and with autograd. They save arithmetic, not overhead: `torch`
launches a few kernels per expert, `grouped` needs rows that are multiples of 16 bytes (torch 2.13: float32, bfloat16, float16).
Shapes and meaning of `selected`: `runtime.reference`. Source of the grouped form: Hugging Face `integrations/moe.py`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.errors import UnavailableError
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights
from moefication_cli.runtime.reference import compensation, selection_mask, sum_dtype

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDE_BYTES = 16  # grouped_mm: "strides should be multiple of 16 bytes"


def dense(x_TD: Tensor, selected: Tensor | None, weights: ExpertWeights) -> Tensor:
    """y_TD of the whole FFN, whatever is selected; every expert counts as on, so no compensation."""
    ffn = weights.ffn.dequantised()
    h_TF = ffn.hidden(x_TD).to(ffn.w_down_FD.dtype)
    return functional.linear(h_TF, ffn.w_down_FD.t(), ffn.b_down_D).to(x_TD.dtype)


def always_on(x_TD: Tensor, mask_TE: Tensor, weights: ExpertWeights) -> Tensor:
    """y_TD of the parts that no selection touches: bias, shared neurons, compensation; float32 for half-precision weights."""
    ffn = weights.ffn
    y_TD = torch.zeros(
        x_TD.shape, dtype=sum_dtype(torch.float32 if ffn.quantised else ffn.w_down_FD.dtype), device=x_TD.device
    )
    if ffn.b_down_D is not None:
        y_TD = y_TD + ffn.b_down_D
    if weights.num_shared:
        shared = ffn.rows(0, weights.num_shared).dequantised()
        y_TD = y_TD + shared.hidden(x_TD).to(shared.w_down_FD.dtype) @ shared.w_down_FD
    extra_TD = compensation(x_TD, mask_TE, weights)
    return y_TD if extra_TD is None else y_TD + extra_TD


def by_expert(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """The `torch` backend: for each expert in turn, two or three matmuls over the tokens that selected it. Gives y_TD."""
    ffn, size = weights.ffn, weights.expert_size
    mask_TE = selection_mask(selected, x_TD.shape[0], weights.num_experts)
    y_TD = always_on(x_TD, mask_TE, weights)
    token_P = mask_TE.t().nonzero()[:, 1]  # (expert, token) pairs in expert order
    begin = 0
    for expert, count in enumerate(mask_TE.sum(dim=0).tolist()):
        if count == 0:
            continue
        tokens_P = token_P[begin : begin + count]
        begin += count
        first = weights.num_shared + expert * size
        own = ffn.rows(first, first + size).dequantised()
        h_PN = own.hidden(x_TD[tokens_P]).to(own.w_down_FD.dtype)
        y_TD.index_add_(0, tokens_P, (h_PN @ own.w_down_FD).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def grouped_obstacle(weights: ExpertWeights) -> str | None:
    """Why `grouped` cannot run on these weights, or None."""
    ffn = weights.ffn
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if ffn.w_up_FD.dtype not in GROUPED_DTYPES or ffn.w_down_FD.dtype != ffn.w_up_FD.dtype:
        return f"grouped_mm takes one dtype of float32, bfloat16, float16; the layer has {ffn.w_up_FD.dtype}"
    width = ffn.w_up_FD.element_size()
    rule = f"grouped_mm needs rows of a multiple of {STRIDE_BYTES} bytes in {ffn.w_up_FD.dtype}"
    if ffn.d_model * width % STRIDE_BYTES:
        return f"{rule}; d_model {ffn.d_model} is not"
    if weights.num_experts % experts_together(weights):
        return f"{rule}; experts of {weights.expert_size} cannot be joined to such: {weights.num_experts} of them are too odd a number"
    if not (ffn.w_up_FD.is_contiguous() and ffn.w_down_FD.is_contiguous()):
        return "grouped_mm needs neuron-major, contiguous projections"
    return None


def experts_together(weights: ExpertWeights) -> int:
    """How many neighbouring experts make a row of hidden activations that is a multiple of STRIDE_BYTES long."""
    row = weights.expert_size * weights.ffn.w_up_FD.element_size()
    return STRIDE_BYTES // math.gcd(STRIDE_BYTES, row)


def grouped(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """The `grouped` backend: tokens sorted by expert, one grouped matmul per projection. Gives y_TD.

    Experts whose rows are shorter than STRIDE_BYTES are computed with their neighbours, whose neurons are masked. Every
    token's outputs are added up in the order of its experts, so that the same call gives the same bytes on CUDA too.
    Raises UnavailableError where the stride rules of `grouped_mm` do not hold.
    """
    obstacle = grouped_obstacle(weights)
    if obstacle is not None:
        raise UnavailableError(obstacle, "use --backend torch")
    ffn, together = weights.ffn, experts_together(weights)
    E, N = weights.num_experts // together, weights.expert_size * together
    single_TE = selection_mask(selected, x_TD.shape[0], weights.num_experts)
    y_TD = always_on(x_TD, single_TE, weights)
    mask_TE = single_TE if together == 1 else single_TE.unflatten(1, (E, together)).any(-1)
    expert_P, token_P = mask_TE.t().nonzero().unbind(1)
    if token_P.numel() == 0:
        return y_TD.to(x_TD.dtype)
    offs_E = mask_TE.sum(dim=0).cumsum(0, dtype=torch.int32)
    x_PD = x_TD[token_P]

    def project(w_FD: Tensor, b_F: Tensor | None) -> Tensor:
        w_EDN = w_FD[weights.num_shared :].view(E, N, ffn.d_model).transpose(1, 2)
        out_PN = functional.grouped_mm(x_PD, w_EDN, offs=offs_E)
        return out_PN if b_F is None else out_PN + b_F[weights.num_shared :].view(E, N)[expert_P]

    up_PN = project(ffn.w_up_FD, ffn.b_up_F)
    act = ACTIVATIONS[ffn.activation]
    h_PN = act(up_PN) if ffn.w_gate_FD is None else act(project(ffn.w_gate_FD, ffn.b_gate_F)) * up_PN
    if together > 1:
        on_PG = single_TE.unflatten(1, (E, together))[token_P, expert_P]
        h_PN = h_PN * on_PG.repeat_interleave(weights.expert_size, dim=1)
    out_PD = functional.grouped_mm(h_PN, ffn.w_down_FD[weights.num_shared :].view(E, N, ffn.d_model), offs=offs_E)
    order_P = token_P.argsort(stable=True)
    added_TD = torch.segment_reduce(out_PD[order_P].to(y_TD.dtype), "sum", lengths=mask_TE.sum(dim=1), initial=0)
    return (y_TD + added_TD).to(x_TD.dtype)
