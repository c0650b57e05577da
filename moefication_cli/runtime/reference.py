"""The masked reference: the dense FFN with the neurons of unselected experts set to zero. The judge of every backend.

Source: MoEfication (arXiv 2110.01786), section 3.3: the outputs of the selected experts are summed with weight 1, so
masking the hidden layer of the dense FFN is the same function. No time is saved here, by design.

`selected` is, here and in every backend, either ids_TK (any integer dtype, the K experts of each token; naming an
expert twice counts once) or mask_TE (bool). Shared neurons are always on, `down.bias` is added once per token.
Axes as in `ffn`. Supports autograd, every device and every dtype.
"""

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.rules import as_mask


def check_form(selected: Tensor, num_tokens: int, num_experts: int) -> None:
    """Raises ConfigError unless dtype and shape of `selected` suit [num_tokens] tokens and `num_experts` experts."""
    if selected.is_floating_point() or selected.is_complex():
        raise ConfigError(f"selected experts are {selected.dtype}", "pass integer ids_TK or a bool mask_TE")
    if selected.dim() != 2 or selected.shape[0] != num_tokens:
        raise ConfigError(
            f"selection of shape {tuple(selected.shape)} for {num_tokens} tokens", "pass [tokens, K] or [tokens, E]"
        )
    if selected.dtype == torch.bool and selected.shape[1] != num_experts:
        raise ConfigError(f"selection mask over {selected.shape[1]} experts, the layer has {num_experts} experts")


def check_selection(selected: Tensor, num_tokens: int, num_experts: int) -> None:
    """`check_form`, and every id is an expert."""
    check_form(selected, num_tokens, num_experts)
    if selected.dtype == torch.bool or selected.numel() == 0:
        return
    if selected.is_cuda:  # no host round trip; a device-side assert is still an error and not a wrong read
        torch._assert_async(((selected >= 0) & (selected < num_experts)).all(), "selected expert id out of range")
        return
    low, high = int(selected.min()), int(selected.max())
    if low < 0 or high >= num_experts:
        raise ConfigError(
            f"selected expert id {low if low < 0 else high} out of range: the layer has {num_experts} experts"
        )


def selection_mask(selected: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """mask_TE (bool) of a checked selection; ids are scattered, masks returned as they are."""
    check_selection(selected, num_tokens, num_experts)
    return as_mask(selected.long() if selected.dtype != torch.bool else selected, num_experts)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which experts' outputs are added up: float32 for half precision, whose sums would lose a percent."""
    return torch.promote_types(dtype, torch.float32)


def compensation(x_TD: Tensor, mask_TE: Tensor, weights: ExpertWeights) -> Tensor | None:
    """What stands in for the dropped experts, [T, D] (see ffn.Compensation); zero for tokens with every expert on."""
    parts = weights.compensation
    if parts is None:
        return None
    wide_TD = x_TD.to(sum_dtype(x_TD.dtype))
    y_TD = parts.to(wide_TD).output(wide_TD).expand(len(x_TD), -1)
    return y_TD.masked_fill(mask_TE.all(dim=1, keepdim=True), 0.0)


def unrouted(x: Tensor, weights: ExpertWeights) -> Tensor:
    """y of the shape of x [..., D] of an FFN without a router: its shared neurons, and what stands in for the others."""
    ffn, extra = weights.ffn, weights.compensation
    head = ffn.rows(0, weights.num_shared).dequantised()
    y = head.hidden(x).to(head.w_down_FD.dtype) @ head.w_down_FD
    y = y.to(sum_dtype(y.dtype))
    if extra is not None:
        wide = x.to(y.dtype)
        y = y + extra.to(wide).output(wide)
    return (y if ffn.b_down_D is None else y + ffn.b_down_D).to(x.dtype)


def masked(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """y_TD of the dense FFN whose neurons in unselected experts are zeroed. Raises ConfigError for a bad selection."""
    ffn = weights.ffn.dequantised()
    mask_TE = selection_mask(selected, x_TD.shape[0], weights.num_experts)
    h_TF = ffn.hidden(x_TD)
    keep_TF = torch.ones_like(h_TF, dtype=torch.bool)
    keep_TF[:, weights.num_shared :] = mask_TE.repeat_interleave(weights.expert_size, dim=1)
    # T5 keeps its down-projection in float32 under float16: follow the weight's dtype, answer in the input's.
    y_TD = h_TF.masked_fill(~keep_TF, 0.0).to(ffn.w_down_FD.dtype) @ ffn.w_down_FD
    y_TD = y_TD.to(sum_dtype(y_TD.dtype))
    if ffn.b_down_D is not None:
        y_TD = y_TD + ffn.b_down_D
    extra_TD = compensation(x_TD, mask_TE, weights)
    return (y_TD if extra_TD is None else y_TD + extra_TD).to(x_TD.dtype)
