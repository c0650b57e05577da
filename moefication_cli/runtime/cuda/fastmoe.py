"""The `fastmoe` backend: FastMoE's single-worker CUDA functions behind our signature. Optional and experimental.

Source: laekov/fastmoe, version 1.1 (`fmoe/functions.py`, `fmoe/linear.py`): `expert_count` and `assign_pos` sort (token, expert) pairs,
`linear_forward` is its fused linear layer of all experts. A gate with unit scores is a plain sum, so none of its modules is
needed. It is used only if `import fmoe` works, the tensors are on CUDA and a self-check against the reference passes. Built
from its source without NCCL (torch 2.11, CUDA 13, H200) it equals the reference in float32; in bfloat16 it has been tested
on a stub of those functions alone. Its linear layer wants [E, out, in]: the experts'
down-projection is therefore kept a second time, transposed, which no other backend does. No gradients.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights
from moefication_cli.runtime.reference import masked, selection_mask
from moefication_cli.runtime.torch_backends import always_on

CHECK_TOKENS = 16
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest output; TF32 allowed


def _functions() -> ModuleType:
    """The compiled module of an installed fmoe. Raises UnavailableError naming what is missing."""
    try:
        importlib.import_module("fmoe")
        module = importlib.import_module("fmoe_cuda")
    except ImportError as error:
        raise UnavailableError(
            f"backend fastmoe is not available: import fmoe: {error}", "use --backend auto"
        ) from error
    for name in ("expert_count", "assign_pos", "linear_forward"):
        if not hasattr(module, name):
            raise UnavailableError(f"backend fastmoe is not available: fmoe_cuda has no {name}", "install fastmoe 1.1")
    return module


class FastMoELayer:
    """One layer's weights in FastMoE's layout, checked. Call it with x_TD and a selection (see `runtime.reference`)."""

    def __init__(self, weights: ExpertWeights) -> None:
        ffn, E, N, D = weights.ffn, weights.num_experts, weights.expert_size, weights.ffn.d_model
        if not ffn.w_up_FD.is_cuda:
            # FastMoE aborts the process on CPU tensors (its issues 73 and 194): never let one through.
            raise UnavailableError("backend fastmoe runs on cuda, the weights are on the CPU", "use --backend auto")
        if ffn.w_up_FD.dtype not in TOLERANCE or ffn.w_down_FD.dtype != ffn.w_up_FD.dtype:
            raise UnavailableError(f"backend fastmoe does not compute in {ffn.w_up_FD.dtype}", "use --backend auto")
        self._fmoe = _functions()
        self._weights = weights
        experts = slice(weights.num_shared, None)
        self._up = (ffn.w_up_FD[experts].view(E, N, D), self._bias(ffn.b_up_F))
        self._gate = None if ffn.w_gate_FD is None else (ffn.w_gate_FD[experts].view(E, N, D), self._bias(ffn.b_gate_F))
        self._down_EDN = ffn.w_down_FD[experts].view(E, N, D).transpose(1, 2).contiguous()
        self._check()

    def _bias(self, bias_F: Tensor | None) -> Tensor | None:
        weights = self._weights
        return None if bias_F is None else bias_F[weights.num_shared :].view(weights.num_experts, weights.expert_size)

    def _check(self) -> None:
        w_FD = self._weights.ffn.w_up_FD
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(CHECK_TOKENS, w_FD.shape[1], generator=generator).to(w_FD)
        mask_TE = (torch.rand(CHECK_TOKENS, self._weights.num_experts, generator=generator) < 0.5).to(w_FD.device)
        with torch.no_grad():
            expected, got = masked(x_TD, mask_TE, self._weights), self(x_TD, mask_TE)
        limit = TOLERANCE[w_FD.dtype] * float(expected.abs().max())
        if not float((got - expected).abs().max()) <= limit:
            raise UnavailableError("backend fastmoe failed its self-check against the reference", "use --backend auto")

    def __call__(self, x_TD: Tensor, selected: Tensor) -> Tensor:
        """y_TD. Raises ConfigError for a bad selection and where gradients are asked for."""
        weights, fmoe = self._weights, self._fmoe
        if torch.is_grad_enabled() and (x_TD.requires_grad or weights.ffn.w_up_FD.requires_grad):
            raise ConfigError("backend fastmoe computes no gradients here", "call it under torch.inference_mode()")
        mask_TE = selection_mask(selected, x_TD.shape[0], weights.num_experts)
        y_TD = always_on(x_TD, mask_TE, weights)
        token_P, expert_P = mask_TE.nonzero().unbind(1)
        if token_P.numel() == 0:
            return y_TD.to(x_TD.dtype)
        count_E = torch.zeros(weights.num_experts, dtype=torch.int32, device=x_TD.device)
        expert_P = expert_P.contiguous()
        fmoe.expert_count(expert_P, count_E)
        end_E = count_E.cumsum(0, dtype=torch.int32)
        order_P = torch.empty_like(expert_P)
        fmoe.assign_pos(end_E, expert_P, order_P)
        on_host_E = count_E.long().cpu()
        tokens_P = token_P[order_P]
        x_PD = x_TD[tokens_P].contiguous()
        up_PN = fmoe.linear_forward(x_PD, on_host_E, *self._up)
        act = ACTIVATIONS[weights.ffn.activation]
        h_PN = act(up_PN) if self._gate is None else act(fmoe.linear_forward(x_PD, on_host_E, *self._gate)) * up_PN
        out_PD = fmoe.linear_forward(h_PN.contiguous(), on_host_E, self._down_EDN, None)
        return y_TD.index_add(0, tokens_P, out_PD.to(y_TD.dtype)).to(x_TD.dtype)


def compute(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """The one-off form of `FastMoELayer`: prepares, checks and calls."""
    return FastMoELayer(weights)(x_TD, selected)
