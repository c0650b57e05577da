"""A native MoE checkpoint as a GGUF file, one tensor in memory at a time.

Names by `gguf.TensorNameMap`; what is not a matter of names after `conversion/{base,llama,qwen}.py` of llama.cpp: experts stacked,
query and key rows of Llama in pairs, rotary factors of Llama 3 as a tensor.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from moefication_cli.errors import UnavailableError
from moefication_cli.export.gguf_shape import BLOCK, HOSTS
from moefication_cli.export.gguf_vocab import add_vocabulary
from moefication_cli.store import files

# A dense Llama is there to measure against
_ARCHITECTURES = {name: architecture for name, (architecture, _) in HOSTS.items()} | {"llama": "llama"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_EXACT = ("ffn_gate_inp.weight",)  # routers: small differences between logits choose the experts


def require_gguf() -> Any:
    """The package gguf. Raises UnavailableError."""
    try:
        import gguf
    except ImportError:
        raise UnavailableError("export --to gguf needs the package gguf", "pip install 'moefication[gguf]'") from None
    return gguf


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its type, and its values [.., rows, columns] when they are wanted."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], Tensor]


def write_gguf(folder: Path, quantise: str, out: Path, name: str, about: str = "", vocabulary: bool = True) -> None:
    """Write the native checkpoint in `folder` (written by `write_native`, expert sizes filled) to the file `out`; synced.

    `quantise` f32, f16 or q8_0: matrices whose rows are no multiple of 32 stay f16; vectors and routers stay f32. Without
    `vocabulary` the file takes token ids alone, and `folder` needs no tokenizer. Raises
    ConfigError where the tokenizer has no counterpart, UnavailableError without the package gguf.
    """
    gguf = require_gguf()
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, _ARCHITECTURES[config["model_type"]])
    writer.add_name(name)
    writer.add_description(about)
    _add_settings(writer, config)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[quantise]])
    if vocabulary:
        add_vocabulary(writer, folder, config["vocab_size"])
    else:
        writer.add_tokenizer_model("none")
    entries = _entries(folder, config, quantise)
    for entry in entries:
        stored = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
        kind = gguf.GGMLQuantizationType
        dtype = {kind.F32: np.dtype(np.float32), kind.F16: np.dtype(np.float16)}.get(entry.kind, np.dtype(np.uint8))
        shape, size = (stored, math.prod(stored)) if dtype == np.uint8 else (entry.shape, math.prod(stored))
        writer.add_tensor_info(entry.name, shape, dtype, size, entry.kind)
    with files.writing(out):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            values = entry.read().float().numpy().reshape(entry.shape)
            writer.write_tensor_data(gguf.quantize(values, entry.kind))
        writer.close()
        files.fsync(out)


def _add_settings(writer: Any, config: Mapping[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _entries(folder: Path, config: Mapping[str, Any], quantise: str) -> list[_Entry]:
    import gguf

    kinds = gguf.GGMLQuantizationType
    wanted = {"f32": kinds.F32, "f16": kinds.F16, "q8_0": kinds.Q8_0}[quantise]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[_ARCHITECTURES[config["model_type"]]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    groups: dict[str, list[str]] = defaultdict(list)  # experts of one kind are one tensor
    for key in index:
        found = _EXPERT.fullmatch(key)
        groups[f"{found[1]}.{found[3]}.weight" if found else key].append(key)
    made = []
    for merged, keys in groups.items():
        stacked = merged not in keys
        keys.sort(key=lambda key: (len(key), key))  # experts by number
        with safe_open(folder / index[keys[0]], "pt") as file:
            shape = tuple(file.get_slice(keys[0]).get_shape())
        shape = (len(keys), *shape) if stacked else shape
        if "shared_expert_gate" in merged:
            shape = shape[-1:]
        plain = merged.replace("model.layers", "layers").replace("block_sparse_moe.experts", "feed_forward.experts")
        name = names.get_name(merged, (".weight", ".bias")) or names.get_name(plain, (".weight", ".bias"))
        assert name is not None, merged
        exact = len(shape) == 1 or name.endswith(_EXACT)
        kind = kinds.F32 if exact else wanted if wanted != kinds.Q8_0 or shape[-1] % BLOCK[quantise] == 0 else kinds.F16
        turned = heads.get(merged.split(".")[-2]) if arch == gguf.MODEL_ARCH.LLAMA else None
        made.append(_Entry(name, shape, kind, _reader(folder, index, keys, stacked, turned)))
    if (config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        factors = llama3_factors(config)
        made.append(_Entry("rope_freqs.weight", tuple(factors.shape), kinds.F32, lambda: factors))
    return made


def _reader(
    folder: Path, index: Mapping[str, str], keys: list[str], stacked: bool, heads: int | None
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensors = []
        for key in keys:
            with safe_open(folder / index[key], "pt") as file:
                tensors.append(file.get_tensor(key))
        found = torch.stack(tensors) if stacked else tensors[0]
        return found if heads is None else paired_rows(found, heads)

    return read


def paired_rows(w: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * H, D] (or its bias) in llama.cpp's order, which rotates neighbours."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def llama3_factors(config: Mapping[str, Any]) -> Tensor:
    """What llama.cpp divides the rotary frequencies by, [H / 2] (transformers' `_compute_llama3_parameters`)."""
    rope = config["rope_parameters"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
