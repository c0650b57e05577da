"""Native MoE formats: what each can hold, and how a converted layer is written in it. `FORMATS` is the table.

Ours sums the selected experts with weight 1; these formats weight them by router probabilities. Router weights times a small
power of two make the probabilities of all experts nearly equal without changing their order, so every selected expert gets
about 1/k (1/E where a format does not renormalise over the selected ones), which the down-projections take back.

Facts of the formats: the modeling files of transformers 5 (`models/<name>/modeling_<name>.py`), and the converters of
llama.cpp and vLLM for what their readers need beyond that. Axes: D model width, E experts, N neurons per expert, S shared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.ffn import FFNWeights

Config = Mapping[str, Any]

# Of the source's configuration, under the same names in every target
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_parameters",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)  # fmt: skip
_ROW_BYTES = 16  # torch's grouped matrix product, which transformers takes by default, wants rows of multiples of this
_GATE_EPSILON = 2.0**-20  # of a shared expert's gate: sigmoid stays 1/2; zeros are a division by zero in llama.cpp


@dataclass(frozen=True)
class Shape:
    """What every layer of an exported model has in common."""

    num_experts: int
    expert_size: int
    num_shared: int  # neurons that are always on
    top_k: int


@dataclass(frozen=True)
class Layer:
    """One converted FFN: weights in expert order, shared neurons first, and the router's weights, scaled already."""

    ffn: FFNWeights
    w_router_ED: Tensor
    shape: Shape


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    architecture   the class of transformers that reads it
    sources        model types whose attention it has
    shared         whether it has a shared expert
    config         (source's configuration, shape) -> the fields of config.json beside the common ones
    layer          the tensors of one FFN, named below the decoder layer
    head_size      whether heads may have another size than hidden_size / num_attention_heads
    sliding        whether attention may be limited to a window
    extra          tensors beside the source's, from the source's by name
    """

    architecture: str
    sources: frozenset[str]
    shared: bool
    config: Callable[[Config, Shape], dict[str, Any]]
    layer: Callable[[Layer], dict[str, Tensor]]
    head_size: bool = True
    sliding: bool = False
    zero_biases: bool = False  # of q, k and v, where the source has none
    untied: bool = False  # the output head is stored, though it is the embedding

    def refusal(self, config: Config, shape: Shape) -> str | None:
        """Why this format cannot hold a model of that configuration and shape, as the end of a sentence; None if it can."""
        kind = config["model_type"]
        if kind not in self.sources:
            return f"its attention is not that of {kind}"
        if config.get("hidden_act") != "silu":
            return f"its activation is silu, the model's {config.get('hidden_act')}"
        if config.get("mlp_bias") or (config.get("attention_bias") and kind != "qwen2"):
            return "it has no biases in attention or experts"
        if shape.num_shared and not self.shared:
            return f"it has no shared expert, and {shape.num_shared} neurons per layer are always on"
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window and window < config["max_position_embeddings"] and not self.sliding:
            return "it has no sliding window"
        multiple = _ROW_BYTES // (4 if "32" in str(config.get("dtype") or "float32") else 2)
        if shape.expert_size % multiple:
            return (
                f"transformers computes its experts only where their size is a multiple of {multiple} in this precision, "
                f"and it is {shape.expert_size}"
            )
        usual = config["hidden_size"] // config["num_attention_heads"]
        if not self.head_size and (config.get("head_dim") or usual) != usual:
            return f"its heads have hidden_size / num_attention_heads = {usual} dimensions, the model's {config['head_dim']}"
        return None

    def config_json(self, config: Config, shape: Shape) -> dict[str, Any]:
        """The whole config.json."""
        common = {name: config[name] for name in _COMMON if config.get(name) is not None}
        return common | {"architectures": [self.architecture]} | self.config(config, shape)


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _experts(layer: Layer, names: tuple[str, str, str], prefix: str, down_scale: float) -> dict[str, Tensor]:
    """gate [N, D], up [N, D] and down [D, N] of every expert under `prefix`.E.name.weight."""
    shape, found = layer.shape, {}
    for expert in range(shape.num_experts):
        start = shape.num_shared + expert * shape.expert_size
        parts = _projections(layer.ffn, start, start + shape.expert_size, down_scale)
        for name, tensor in zip(names, parts, strict=True):
            found[f"{prefix}.{expert}.{name}.weight"] = tensor
    return found


def _projections(ffn: FFNWeights, start: int, stop: int, down_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [N, D], up [N, D], down [D, N]) of neurons start <= n < stop."""
    assert ffn.w_gate_FD is not None
    down_DN = ffn.w_down_FD[start:stop].T * down_scale
    return ffn.w_gate_FD[start:stop].contiguous(), ffn.w_up_FD[start:stop].contiguous(), down_DN.contiguous()


def _shared_parts(layer: Layer, size: int, down_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """`_projections` of the shared expert, filled with zeros to `size` neurons."""
    gate, up, down = _projections(layer.ffn, 0, layer.shape.num_shared, down_scale)
    zeros_ND = gate.new_zeros(size - layer.shape.num_shared, layer.ffn.d_model)
    return torch.cat([gate, zeros_ND]), torch.cat([up, zeros_ND]), torch.cat([down, zeros_ND.T], 1).contiguous()


def _shared(layer: Layer, prefix: str, size: int, down_scale: float = 1.0) -> dict[str, Tensor]:
    parts = _shared_parts(layer, size, down_scale)
    return {f"{prefix}.{name}.weight": tensor for name, tensor in zip(_QWEN_NAMES, parts, strict=True)}


_QWEN_NAMES = ("gate_proj", "up_proj", "down_proj")


def _mixtral_config(config: Config, shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "head_dim": _head_dim(config),
        "sliding_window": config.get("sliding_window"),
        "intermediate_size": shape.expert_size,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
    }


def _mixtral_layer(layer: Layer) -> dict[str, Tensor]:
    experts = _experts(layer, ("w1", "w3", "w2"), "block_sparse_moe.experts", layer.shape.top_k)
    return experts | {"block_sparse_moe.gate.weight": layer.w_router_ED}


def _qwen_sizes(shape: Shape) -> dict[str, Any]:
    return {
        "moe_intermediate_size": shape.expert_size,
        "intermediate_size": shape.expert_size * shape.num_experts + shape.num_shared,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _qwen2_config(config: Config, shape: Shape) -> dict[str, Any]:
    # llama.cpp never renormalises over the selected experts for this format: neither does what is written
    own = {"model_type": "qwen2_moe", "norm_topk_prob": False, "qkv_bias": True, "tie_word_embeddings": False}
    return own | _qwen_sizes(shape) | {"shared_expert_intermediate_size": max(shape.num_shared, 1)}


def _qwen2_layer(layer: Layer) -> dict[str, Tensor]:
    gate_1D = torch.full((1, layer.ffn.d_model), _GATE_EPSILON, dtype=layer.ffn.w_up_FD.dtype)
    return (
        _experts(layer, _QWEN_NAMES, "mlp.experts", layer.shape.num_experts)
        | _shared(layer, "mlp.shared_expert", max(layer.shape.num_shared, 1), down_scale=2.0)  # its gate gives one half
        | {"mlp.gate.weight": layer.w_router_ED, "mlp.shared_expert_gate.weight": gate_1D}
    )


def _qwen3_config(config: Config, shape: Shape) -> dict[str, Any]:
    own = {"model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": _head_dim(config), "attention_bias": False}
    return own | _qwen_sizes(shape)


def _qwen3_layer(layer: Layer) -> dict[str, Tensor]:
    return _experts(layer, _QWEN_NAMES, "mlp.experts", layer.shape.top_k) | {"mlp.gate.weight": layer.w_router_ED}


def _granite_config(config: Config, shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "granitemoeshared",
        "intermediate_size": shape.expert_size,
        "shared_intermediate_size": max(shape.num_shared, 1),
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "attention_bias": False,
        "attention_multiplier": _head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _granite_layer(layer: Layer) -> dict[str, Tensor]:
    shape = layer.shape
    experts = [
        _projections(layer.ffn, start, start + shape.expert_size, shape.top_k)
        for start in range(shape.num_shared, layer.ffn.num_neurons, shape.expert_size)
    ]
    gate_SD, up_SD, down_DS = _shared_parts(layer, max(shape.num_shared, 1))
    return {
        "block_sparse_moe.input_linear.weight": torch.stack([torch.cat([gate, up]) for gate, up, _ in experts]),
        "block_sparse_moe.output_linear.weight": torch.stack([down for _, _, down in experts]),
        "block_sparse_moe.router.layer.weight": layer.w_router_ED,
        "shared_mlp.input_linear.weight": torch.cat([gate_SD, up_SD]),
        "shared_mlp.output_linear.weight": down_DS,
    }


def _glm_config(config: Config, shape: Shape) -> dict[str, Any]:
    rope = {**(config.get("rope_parameters") or {}), "partial_rotary_factor": 1.0}
    return {
        "model_type": "glm4_moe",
        "head_dim": _head_dim(config),
        "attention_bias": config["model_type"] == "qwen2",
        "use_qk_norm": config["model_type"] == "qwen3",
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
        "intermediate_size": shape.expert_size * shape.num_experts + shape.num_shared,
        "moe_intermediate_size": shape.expert_size,
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": _glm_shared(shape),
        "num_experts_per_tok": shape.top_k,
        "routed_scaling_factor": float(shape.top_k),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    }


def _glm_shared(shape: Shape) -> int:
    """Shared experts, in units of an expert; one at least, which engines expect."""
    return max(1, -(-shape.num_shared // shape.expert_size))


def _glm_layer(layer: Layer) -> dict[str, Tensor]:
    return (
        _experts(layer, _QWEN_NAMES, "mlp.experts", 1.0)  # routed_scaling_factor takes back the 1/k
        | _shared(layer, "mlp.shared_experts", _glm_shared(layer.shape) * layer.shape.expert_size)
        | {
            "mlp.gate.weight": layer.w_router_ED,
            "mlp.gate.e_score_correction_bias": torch.zeros(layer.shape.num_experts),
        }
    )


_LLAMAS = frozenset({"llama", "mistral"})
FORMATS: dict[str, Format] = {
    "mixtral": Format("MixtralForCausalLM", _LLAMAS, False, _mixtral_config, _mixtral_layer, sliding=True),
    "qwen2_moe": Format(
        "Qwen2MoeForCausalLM",
        _LLAMAS | {"qwen2"},
        True,
        _qwen2_config,
        _qwen2_layer,
        head_size=False,
        zero_biases=True,
        untied=True,
    ),
    "qwen3_moe": Format("Qwen3MoeForCausalLM", frozenset({"qwen3"}), False, _qwen3_config, _qwen3_layer),
    "granitemoeshared": Format(
        "GraniteMoeSharedForCausalLM", _LLAMAS, True, _granite_config, _granite_layer, head_size=False
    ),
    "glm4_moe": Format("Glm4MoeForCausalLM", _LLAMAS | {"qwen2", "qwen3"}, True, _glm_config, _glm_layer),
}
