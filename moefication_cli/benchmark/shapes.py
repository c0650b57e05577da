"""Architectures with random weights, so that real sizes are measured without a download, and twins of models.

The classes are transformers' own; sizes are those of the published checkpoints. Random weights say nothing about
quality. A twin shares every parameter with its original until one of them replaces it. Axes as in `ffn`:
T tokens, D model width, F neurons. Reads no files.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moefication_cli.errors import ConfigError
from moefication_cli.models.random_weights import random_model
from moefication_cli.models.sites import FFNSite
from moefication_cli.models.surgery import install

M = TypeVar("M", bound=nn.Module)
_VOCABULARY_UNUSED = 128  # words of a model of which only the FFNs are run


@dataclass(frozen=True)
class Shape:
    """How to build one architecture; `auto` and `config` name classes of transformers, `modes` are what it is meant for."""

    auto: str
    config: str
    settings: Mapping[str, int]
    layer_settings: tuple[str, ...]  # settings that hold the number of layers
    activation_setting: str
    layers: int
    activation: str
    d_model: int
    num_neurons: int
    gated: bool
    expert_size: int
    modes: tuple[str, ...]

    @property
    def ffn_parameters(self) -> int:
        """Weights of one FFN."""
        return self.d_model * self.num_neurons * (3 if self.gated else 2)


_ALL = ("ffn", "prefill", "decode")
_T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "vocab_size": 32128, "decoder_start_token_id": 0}
_BERT = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
_OPT = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "num_attention_heads": 32, "ffn_dim": 8192}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SHAPES: dict[str, Shape] = {
    "t5-base": Shape(
        "AutoModelForSeq2SeqLM", "T5Config", _T5, ("num_layers", "num_decoder_layers"), "feed_forward_proj",
        12, "relu", 768, 3072, False, 32, _ALL,
    ),
    "bert-large": Shape(
        "AutoModel", "BertConfig", _BERT, ("num_hidden_layers",), "hidden_act",
        24, "relu", 1024, 4096, False, 32, ("ffn", "prefill"),
    ),
    "opt-1.3b": Shape(
        "AutoModelForCausalLM", "OPTConfig", _OPT, ("num_hidden_layers",), "activation_function",
        24, "relu", 2048, 8192, False, 32, _ALL,
    ),
    "llama-7b-layer": Shape(
        "AutoModelForCausalLM", "LlamaConfig", _LLAMA, ("num_hidden_layers",), "hidden_act",
        1, "silu", 4096, 11008, True, 128, _ALL,
    ),
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """The shape of that name; ConfigError naming those there are."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}", f"use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    activation: str | None = None,
    ffn_layers: int | None = None,
) -> Any:
    """The whole model with random weights, in evaluation mode; with `ffn_layers`, that many blocks and few words."""
    shape = find_shape(name)
    settings: dict[str, Any] = {**shape.settings, shape.activation_setting: activation or shape.activation}
    settings |= dict.fromkeys(shape.layer_settings, ffn_layers or shape.layers)
    if ffn_layers is not None:
        settings["vocab_size"] = _VOCABULARY_UNUSED
        settings |= {"num_decoder_layers": 1} if "num_decoder_layers" in settings else {}
    try:
        return random_model(shape.auto, shape.config, settings, dtype=dtype, device=device, seed=seed)
    except KeyError as error:
        raise ConfigError(f"--activation {activation}: transformers knows no such function ({error})") from None


def share(model: M) -> M:
    """A copy of the modules that holds the very same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def without_ffns(model: nn.Module, sites: list[FFNSite]) -> Any:
    """A twin whose FFNs return their input at once: what is left is all the other work of a forward pass."""
    twin = share(model)
    for site in sites:
        install(twin, site, _Nothing())
        for path in (site.up, site.gate, site.down):
            if path is not None:
                part = twin.get_submodule(path)
                part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)  # type: ignore[operator]
    return twin


def set_firing(up: nn.Module, x_TD: Tensor, share_firing: float) -> None:
    """Gives a random Linear a bias with which each neuron exceeds 0 for that share of the tokens in `x_TD`."""
    pre_TF = x_TD.float() @ up.weight.float().t()  # type: ignore[operator]
    rank = max(1, min(len(pre_TF), round(len(pre_TF) * (1 - share_firing))))
    threshold_F = pre_TF.kthvalue(rank, dim=0).values
    up.bias = nn.Parameter(-threshold_F.to(up.weight.dtype), requires_grad=False)  # type: ignore[arg-type]


class _Nothing:
    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return x
