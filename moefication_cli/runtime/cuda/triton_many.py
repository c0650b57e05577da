"""One layer for many tokens on CUDA: the first projections of each expert over the tokens that selected it, then a dense product.

Tokens are sorted by expert on the GPU, into tiles of one expert each, so that the up and gate projections cost what was
selected. The down-projection reads all activations, zeros where a token did not select: adding up the outputs of a token's
experts instead, one row of d_model for each, took longer than the product saves (tests/benchmarks/cuda.md). Nothing waits
for the GPU, and the same call gives the same bytes. Kernels and axes: `triton_many_kernels`.
Source of sorting tokens into padded tiles of one expert: vLLM, `fused_moe` (https://github.com/vllm-project/vllm).
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.nn import functional

from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Rule, Threshold, TopK
from moefication_cli.runtime.cuda import triton_many_kernels as kernels
from moefication_cli.runtime.cuda.triton_kernels import select
from moefication_cli.runtime.reference import compensation, sum_dtype

LEAST_ROWS = 16  # of a product on tensor cores
LEAST_SHARED = 96 << 10  # bytes of shared memory a program may have on any GPU that Triton compiles for


@dataclass(frozen=True)
class Sizes:
    """Of the piece that one program computes: tokens, rows of weights, columns of a step; and how Triton compiles it."""

    tokens: int
    rows: int
    block: int
    warps: int
    stages: int


# The fastest of those tried on an H200, for 16-bit weights: tests/benchmarks/cuda.md
HIDDEN = Sizes(128, 128, 64, warps=8, stages=4)
SCORE = Sizes(64, 64, 32, warps=4, stages=3)


def group_size(weights: ExpertWeights) -> int | None:
    """How many neighbouring experts are computed together so that they fill a product; None where no number fits."""
    E, N = weights.num_experts, weights.expert_size
    return next((number for number in range(1, E + 1) if E % number == 0 and number * N >= LEAST_ROWS), None)


def how_selected(rule: Rule | None) -> tuple[str, int, float]:
    """(RULE, k, threshold) of the kernel `select`."""
    if isinstance(rule, TopK):
        return "top_k", rule.top_k, 0.0
    return "threshold", 0, rule.threshold if isinstance(rule, Threshold) else 0.0


def selection(x_TD: Tensor, router: TwoLayerRouter, rule: Rule | None) -> Tensor:
    """mask_TE (int8) of the experts that the rule, top_k or threshold, selects by the router's float32 scores."""
    z_TR = _scores(x_TD, router.w_in_RD, router.b_in_R, router.activation, router.normalise)
    scores_TE = z_TR
    if router.w_out_ER is not None:
        scores_TE = _scores(z_TR, router.w_out_ER, router.b_out_E, "identity", False)
    T, E = scores_TE.shape
    mask_TE = scores_TE.new_empty(T, E, dtype=torch.int8)
    how, k, threshold = how_selected(rule)
    counts_T = scores_TE.new_empty(T, dtype=torch.int32)
    select[(T,)](
        scores_TE, mask_TE, counts_T, counts_T, T, E, k, E, threshold, 0,
        RULE=how, LIST=False, BLOCK=triton.next_power_of_2(E),
    )  # fmt: skip
    return mask_TE


def _scores(x_TD: Tensor, w_RD: Tensor, b_R: Tensor | None, activation: str, normalise: bool) -> Tensor:
    (T, D), R = x_TD.shape, len(w_RD)
    z_TR = x_TD.new_empty(T, R, dtype=torch.float32)
    rows = min(SCORE.rows, max(LEAST_ROWS, triton.next_power_of_2(R)))
    kernels.score[(triton.cdiv(T, SCORE.tokens), triton.cdiv(R, rows))](
        x_TD, w_RD, x_TD if b_R is None else b_R, z_TR, T, D, R,
        ACT=activation, NORMALISE=normalise, BIAS=b_R is not None, TILE=SCORE.tokens, ROWS=rows, BLOCK=SCORE.block,
        num_warps=SCORE.warps, num_stages=SCORE.stages,
    )  # fmt: skip
    return z_TR


def compute(x_TD: Tensor, mask_TE: Tensor, weights: ExpertWeights, together: int, most_experts: int) -> Tensor:
    """y_TD of the experts selected by mask_TE (int8 or bool), of which no token has more than `most_experts`.

    `together` is the `group_size` of the weights.
    """
    ffn, S = weights.ffn, weights.num_shared
    h_TF = x_TD.new_zeros(len(x_TD), ffn.num_neurons, dtype=ffn.w_down_FD.dtype)
    if S:
        h_TF[:, :S] = ffn.rows(0, S).hidden(x_TD)
    _fill(h_TF, x_TD, mask_TE, weights, together, most_experts)
    y_TD = functional.linear(h_TF, ffn.w_down_FD.t(), ffn.b_down_D)
    extra_TD = None if weights.compensation is None else compensation(x_TD, mask_TE.bool(), weights)
    return (y_TD if extra_TD is None else y_TD.to(sum_dtype(y_TD.dtype)) + extra_TD).to(x_TD.dtype)


def _fitting(sizes: Sizes, ffn: FFNWeights) -> Sizes:
    """`sizes` with steps as long in bytes for other dtypes, and as many of them on the way at once as this GPU has memory for."""
    width, device = ffn.w_up_FD.element_size(), ffn.w_up_FD.device
    block = max(LEAST_ROWS, sizes.block * 2 // width)
    shared = LEAST_SHARED
    if device.type == "cuda":
        shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST_SHARED)
    step = (sizes.tokens + sizes.rows * (2 if ffn.gated else 1)) * block * width
    return replace(sizes, block=block, stages=max(1, min(sizes.stages, shared // step)))


def _fill(
    h_TF: Tensor, x_TD: Tensor, mask_TE: Tensor, weights: ExpertWeights, together: int, most_experts: int
) -> None:
    """Sets h_TF where a token selected the neuron's expert."""
    ffn = weights.ffn
    sizes = _fitting(HIDDEN, ffn)
    (T, D), F, E, N = x_TD.shape, ffn.num_neurons, weights.num_experts, weights.expert_size
    G, wide, tile = E // together, N * together, sizes.tokens
    most = triton.cdiv(T * min(G, most_experts), tile) + G  # tiles there can be
    token, owner, count_G, tiles = x_TD.new_empty(most * tile + most + G + 1, dtype=torch.int32).split(
        [most * tile, most, G, 1]
    )
    block = min(1024, triton.next_power_of_2(T))
    kernels.tally[(G,)](mask_TE, count_G, T, E, TOGETHER=together, BLOCK=block)
    kernels.place[(G,)](
        mask_TE, count_G, token, owner, tiles, T, E, G,
        TOGETHER=together, TILE=tile, BLOCK=block, GROUPS=triton.next_power_of_2(G),
    )  # fmt: skip
    rows = min(sizes.rows, max(LEAST_ROWS, triton.next_power_of_2(wide)))
    depth = min(sizes.block, max(LEAST_ROWS, triton.next_power_of_2(D)))
    none = x_TD  # stands for tensors that are not there: never read
    kernels.hidden[(most * triton.cdiv(wide, rows),)](
        x_TD, mask_TE, token, owner, tiles, ffn.w_up_FD, none if ffn.w_gate_FD is None else ffn.w_gate_FD,
        none if ffn.b_up_F is None else ffn.b_up_F, none if ffn.b_gate_F is None else ffn.b_gate_F, h_TF,
        T, D, F, weights.num_shared, N, E,
        ACT=ffn.activation, GATED=ffn.gated, BIAS_UP=ffn.b_up_F is not None, BIAS_GATE=ffn.b_gate_F is not None,
        TOGETHER=together, EVEN=D % depth == 0, TILE=tile, ROWS=rows, BLOCK=depth,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
