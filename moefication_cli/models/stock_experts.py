"""The CPU kernels as an `experts_implementation` of transformers, for stock mixtures of experts.

    from moefication_cli import register_experts
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(DIR, experts_implementation="moefication")

transformers calls `moefication_experts` in place of the forward of every experts module whose class has the decorator
`use_experts_implementation` (Mixtral, Qwen-MoE, OLMoE, what `export` writes, ...). Where the kernels cannot compute what the
module would (gradients, CUDA, other dtypes, transposed weights, biases, gates of its own), transformers' own loop over experts
(`eager`) does, and a warning says so once; it does so too for float32 prompts that give every expert many tokens, where
torch's matrix products are faster. Source of layouts and dispatch: transformers' `integrations/moe.py`.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from moefication_cli.errors import UnavailableError
from moefication_cli.models.sites import activation_name
from moefication_cli.runtime.cpu.numba_native import native_experts, native_obstacle

log = logging.getLogger(__name__)
NAME = "moefication"
EAGER = "eager"
MANY_PAIRS = (
    16  # float32 tokens per expert, on average, from which on torch's matrix products are faster than the kernels
)
_ACTIVATION = "_moefication_activation"  # in the __dict__ of an experts module: the name of what its act_fn computes


def register_experts(name: str = NAME) -> None:
    """Makes the CPU kernels known to transformers as `experts_implementation=name`, for this process.

    Raises UnavailableError where the installed transformers has no such interface.
    """
    interface = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is None:
        raise UnavailableError("the installed transformers has no experts interface", "pip install -U transformers")
    interface.register(name, moefication_experts)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def moefication_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """y [T, D] of an experts module for hidden_states [T, D], top_k_index and top_k_weights [T, K]: what its eager forward gives.

    Sums are float32 also in bfloat16, where eager rounds between the steps.
    """
    module: Any = self
    obstacle = _obstacle(self, hidden_states, top_k_weights)
    if obstacle is not None:
        _warn_once(f"experts_implementation {NAME}: {obstacle}; transformers' eager experts compute this")
    many = hidden_states.dtype == torch.float32 and top_k_index.numel() >= MANY_PAIRS * module.num_experts
    if obstacle is not None or many:
        eager = getattr(type(self).forward, "__wrapped__", moe.batched_mm_experts_forward)
        result: Tensor = eager(self, hidden_states, top_k_index, top_k_weights)
        return result
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return native_experts(hidden_states, top_k_index, top_k_weights, up, module.down_proj, self.__dict__[_ACTIVATION])


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have an `experts_implementation`, in order."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def _obstacle(module: Any, x_TD: Tensor, weights_TK: Tensor) -> str | None:
    """Why the kernels cannot stand in for this module's forward on these inputs, or None."""
    if module.is_transposed or module.has_bias or module.has_post_expert_norm or not module.is_concatenated:
        return f"{type(module).__name__} keeps its weights in another form"
    if module._is_expert_parallel:
        return "its experts are spread over processes"
    if module.has_gate and type(module)._apply_gate is not moe._default_apply_gate:
        return f"{type(module).__name__} has a gate of its own"
    up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    obstacle = native_obstacle(up, down)
    if obstacle is not None:
        return obstacle
    if x_TD.device.type != "cpu" or x_TD.dtype not in (torch.float32, torch.bfloat16):
        return f"its input is {x_TD.dtype} on {x_TD.device}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weights_TK, up, down)):
        return "gradients are asked for, which the kernels do not compute"
    if _ACTIVATION not in module.__dict__:
        name = activation_name(module.act_fn)
        if name is None:
            return f"the activation {module.act_fn} is none the kernels know"
        module.__dict__[_ACTIVATION] = name
    return None


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
