"""What llama.cpp runs of native MoE formats, and which expert size suits it.

Facts of llama.cpp as it comes with llama-cpp-python 0.3.36: `src/models/{llama,qwen2moe,qwen3moe}.cpp`, `src/llama-graph.cpp`
(`build_moe_ffn`) and `src/llama-context.cpp` (`graph_max_nodes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moefication_cli.errors import ConfigError
from moefication_cli.export.formats import FORMATS, Shape

Config = Mapping[str, Any]

# Native format -> (llama.cpp's name of the architecture, weight tensors of a decoder layer): tried in this order
HOSTS: dict[str, tuple[str, int]] = {
    "mixtral": ("llama", 10),
    "qwen2_moe": ("qwen2moe", 17),
    "qwen3_moe": ("qwen3moe", 12),
}
# Weights that share a scale; rows of matrices are multiples of it
BLOCK = {"f32": 32, "f16": 32, "q8_0": 32, "q4_k": 256}
_MOST_FILLED = 1.5  # times the neurons that an expert has: zeros cost what neurons cost
_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
# A graph has room for max(1024, 8 x weight tensors) nodes, and its hash table for the next power of two of nodes and leaves. Each
# layer takes two nodes per selected expert (a view and an addition) and so many besides; leaves are its weights and its cache.
# Found by loading models with a growing k until the engine aborted: mixtral of 12, 16, 24, 25 and 32 layers runs with at most 12,
# 16, 12, 10 and 16, qwen2_moe of 12 and 24 with 40. That of qwen3_moe is counted from its source
_GRAPH_NODES, _LAYER_NODES = 8, {"mixtral": 48, "qwen2_moe": 56, "qwen3_moe": 56}
# Smaller experts and more of them per token gain less there (tests/benchmarks/README.md)
_FEWEST_NEURONS, _FEWEST_EXPERTS, _MOST_SELECTED = 128, 4, 12
_ANY = Shape(num_experts=8, expert_size=256, num_shared=0, top_k=1)  # fits every architecture
EMBED = "apply --embed-code makes a folder that transformers loads with trust_remote_code"


def filled(shape: Shape, name: str, multiple: int) -> Shape:
    """`shape` with experts (and shared neurons) filled to multiples of `multiple` with neurons that are zero."""
    shared = max(shape.num_shared, int(FORMATS[name].shared))
    up = [-(-size // multiple) * multiple for size in (shape.expert_size, shared)]
    return replace(shape, expert_size=up[0], num_shared=up[1])


def choose_host(config: Config, shape: Shape, quantise: str = "f16") -> str:
    """The first of `HOSTS` in which llama.cpp can run a model of that configuration and shape.

    Raises ConfigError that says of each why it cannot.
    """
    reasons = {name: _refusal(name, config, shape, quantise) for name in HOSTS}
    for name, why in reasons.items():
        if why is None:
            return name
    said = "; ".join(f"as {name}: {why}" for name, why in reasons.items())
    again = "moefication run RUN --for gguf plans what it can, or split again with --expert-size and apply --for gguf"
    possible = any(_refusal(name, config, _ANY, quantise) is None for name in HOSTS)
    raise ConfigError(f"llama.cpp cannot run this {config['model_type']} model ({said})", again if possible else EMBED)


def _refusal(name: str, config: Config, shape: Shape, quantise: str) -> str | None:
    whole = filled(shape, name, BLOCK[quantise])
    return FORMATS[name].refusal(config, whole) or engine_refusal(name, config, shape, quantise)


def engine_refusal(name: str, config: Config, shape: Shape, quantise: str) -> str | None:
    """Why llama.cpp cannot run it, as the end of a sentence; None if it can."""
    block = BLOCK[quantise]
    size = filled(shape, name, block).expert_size
    if size > _MOST_FILLED * shape.expert_size:
        return f"{quantise} needs experts of a multiple of {block} neurons, and {shape.expert_size} is far from one"
    if shape.num_experts > _MOST_EXPERTS:
        return f"it has at most {_MOST_EXPERTS} experts"
    if shape.top_k > (most := most_selected(name, config["num_hidden_layers"])):
        return f"its graph has room for {most} selected experts per token, not for {shape.top_k}"
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < config["max_position_embeddings"]:
        return "it has no sliding window in this architecture"
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        return f"its rotary embedding of type {rope} is not written"
    return None


def most_selected(name: str, layers: int) -> int:
    """The largest k that fits llama.cpp's computation graph."""
    weights, nodes = HOSTS[name][1], _LAYER_NODES[name]
    room = max(1024, 8 * (weights * layers + 3))
    hashed = 1 << (room - 1).bit_length()
    left = min(hashed - (nodes + weights + 2) * layers, room - nodes * layers) - _GRAPH_NODES
    return max(1, left // (2 * layers))


def suitable_size(neurons: Sequence[int], fraction: float) -> int:
    """Neurons per expert for FFNs of these sizes, about `fraction` of which are to be computed.

    The smallest divisor that is a multiple of 32 of at least 128 neurons with at most 12 experts per token; else what comes
    nearest. Raises ConfigError where no size divides.
    """
    sizes = [
        size for size in range(1, min(neurons) // _FEWEST_EXPERTS + 1) if all(count % size == 0 for count in neurons)
    ]

    most = min(_MOST_SELECTED, most_selected("mixtral", len(neurons)))

    def cost(size: int) -> tuple[bool, bool, float, float]:
        padding = -(-size // 32) * 32 / size
        selected = max(count * fraction / size for count in neurons)
        return round(selected) > most, padding > 1, padding, abs(size - _FEWEST_NEURONS - 0.5)

    fitting = [size for size in sizes if size >= _FEWEST_NEURONS and not any(cost(size)[:2])]
    if not sizes:
        raise ConfigError(f"FFNs of {sorted(set(neurons))} neurons have no common expert size", "give --expert-size")
    return min(fitting) if fitting else min(sizes, key=cost)
