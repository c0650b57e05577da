"""FFN families as data: where a transformer block keeps its feed-forward layer, one row per naming pattern.

Source: the `modeling_*.py` files of transformers 5.23. `block` is a regular expression matched against the *end* of a
module path; `up`, `gate` and `down` are module paths below that block, `act` is the attribute path of the activation
callable (alternatives separated by `|`), or the name in `ffn.ACTIVATIONS` of one that the block's code calls without
keeping it; `kind` is the class of blocks that a row is for, where paths alone do not tell.
The first row whose paths all resolve wins, so gated rows stand before plain
ones. A row says nothing about sizes, biases, `Conv1D` or the activation's kind: `sites` reads those from the modules.
Where one projection holds two parts, `gate` and `up` name the same module: its first half is the gate, which the
activation acts on, its second half is up.
"""

import re
from dataclasses import dataclass

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ACTIVATIONS

ACT_NAMES = ("act_fn", "act", "activation_fn", "intermediate_act_fn", "activation", "gelu_impl", "activation_function")
_BLOCK = r"(layers?|h|blocks?)\.\d+"


@dataclass(frozen=True)
class FFNSpec:
    """One naming pattern; see the module docstring. `act=""` searches `ACT_NAMES` beside `up`, then upwards."""

    name: str
    block: str
    up: str
    down: str
    gate: str = ""
    act: str = ""
    kind: str = ""

    def matches(self, path: str, kind: str) -> bool:
        """Whether the module path ends in this row's block, and its class is this row's."""
        return self.kind in ("", kind) and re.search(rf"(^|\.)(?:{self.block})$", path) is not None


FAMILIES: tuple[FFNSpec, ...] = (
    # T5 v1.1, mT5, umT5, FLAN: the activation acts on wi_0. Encoder FFNs are layer.1 of a block, decoder FFNs layer.2
    FFNSpec(
        "t5-gated",
        r"block\.\d+\.layer\.[12]",
        up="DenseReluDense.wi_1",
        gate="DenseReluDense.wi_0",
        down="DenseReluDense.wo",
        act="DenseReluDense.act",
    ),
    # T5 v1.0: in float16 `wo` stays float32 and the module casts the hidden activations to it
    FFNSpec(
        "t5",
        r"block\.\d+\.layer\.[12]",
        up="DenseReluDense.wi",
        down="DenseReluDense.wo",
        act="DenseReluDense.act",
    ),
    # Llama, Mistral, Qwen2/3, Gemma 1/2/3, OLMo2, Cohere, StableLM, SmolLM3, Granite, EXAONE 4
    FFNSpec("llama", _BLOCK, up="mlp.up_proj", gate="mlp.gate_proj", down="mlp.down_proj", act="mlp.act_fn"),
    # Phi-3, Phi-4, GLM, GLM-4: one projection, gate rows first
    FFNSpec(
        "phi3",
        _BLOCK,
        up="mlp.gate_up_proj",
        gate="mlp.gate_up_proj",
        down="mlp.down_proj",
        act="mlp.activation_fn",
    ),
    # ModernBERT: the half that the activation acts on is called `input` there, the other `gate`
    FFNSpec("modernbert", r"layers\.\d+", up="mlp.Wi", gate="mlp.Wi", down="mlp.Wo", act="mlp.act"),
    # Nemotron, Arcee, Jais2: the same names without a gate (relu2)
    FFNSpec("nemotron", _BLOCK, up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn"),
    # MPT: `ffn`, whose forward also adds the residual
    FFNSpec("mpt", _BLOCK, up="ffn.up_proj", down="ffn.down_proj", act="ffn.act"),
    # LFM2: SiLU is called by the forward
    FFNSpec("lfm2", _BLOCK, up="feed_forward.w3", gate="feed_forward.w1", down="feed_forward.w2", act="silu"),
    # ESM-2: BERT's names, and a GELU that is called by the forward
    FFNSpec("esm", r"layer\.\d+", up="intermediate.dense", down="output.dense", act="gelu", kind="EsmLayer"),
    # BERT, RoBERTa, ELECTRA, CamemBERT, DeBERTa-v2, MPNet, Longformer, ERNIE: no module of its own; `output` also owns
    # LayerNorm and residual, and the activation may be a bare function
    FFNSpec(
        "bert",
        r"layer\.\d+",
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
    ),
    # BART, mBART, Pegasus, Marian, M2M100, BlenderBot, Whisper (encoder and decoder), OPT, XGLM, BioGPT: inline in the
    # layer; OPT flattens its input to [B*T, D], BART-like ones have dropout between activation and fc2
    FFNSpec("bart", r"layers\.\d+", up="fc1", down="fc2", act="activation_fn"),
    # ViT, CLIP, SigLIP, DINOv2, Phi-1/2
    FFNSpec("fc-mlp", _BLOCK, up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn|mlp.activation|mlp.act"),
    # GPT-2 (Conv1D: weights are [in, out]), GPT-Neo, GPTBigCode, Starcoder2 (Linear)
    FFNSpec("gpt2", _BLOCK, up="mlp.c_fc", down="mlp.c_proj", act="mlp.act"),
    # GPT-NeoX and Pythia (parallel residual: the FFN's input is not the post-attention stream), Falcon, Persimmon;
    # BLOOM's activation is `gelu_impl` and has no config attribute
    FFNSpec("gpt-neox", _BLOCK, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act|mlp.gelu_impl"),
    # GPT-J, CodeGen
    FFNSpec("gpt-j", _BLOCK, up="mlp.fc_in", down="mlp.fc_out", act="mlp.act"),
    # DistilBERT
    FFNSpec("distilbert", r"layer\.\d+", up="ffn.lin1", down="ffn.lin2", act="ffn.activation"),
)


def custom_spec(text: str) -> FFNSpec:
    """The row a user describes with `--ffn "up=model.layers.*.mlp.up_proj,gate=...,down=...,act=..."`.

    `*` stands for one path segment (the layer number); everything through the last `*` is the block and must be the
    same for all parts. Without `*` the paths are relative to whatever module has them all (`up=fc1,down=fc2`). `gate`
    and `act` are optional: the activation is looked for beside `up` under its usual names. `act=gelu` names one that the
    model's code calls without keeping it.
    Raises ConfigError for anything else.
    """
    hint = 'write it as --ffn "up=layers.*.mlp.up_proj,gate=layers.*.mlp.gate_proj,down=layers.*.mlp.down_proj"'
    parts: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key not in ("up", "gate", "down", "act") or key in parts:
            raise ConfigError(f"--ffn: cannot read {item.strip()!r} (known: up, gate, down, act, each once)", hint)
        if not re.fullmatch(r"[\w*]+(\.[\w*]+)*", value) or value.endswith("*"):
            raise ConfigError(f"--ffn: {value!r} is not a module path", hint)
        parts[key] = value
    if "up" not in parts or "down" not in parts:
        raise ConfigError("--ffn needs at least up= and down=", hint)
    called = parts.pop("act") if parts.get("act") in ACTIVATIONS else ""
    blocks = {value.rpartition("*")[0] + "*" if "*" in value else "" for value in parts.values()}
    if len(blocks) != 1:
        raise ConfigError(f"--ffn: the parts lie in different blocks: {', '.join(sorted(blocks))}", hint)
    prefix = blocks.pop()
    block = re.escape(prefix).replace(r"\*", r"[^.]+") if prefix else r"[^.]+(\.[^.]+)*"
    below = {key: value[len(prefix) :].lstrip(".") for key, value in parts.items()}
    return FFNSpec("custom", block, below["up"], below["down"], below.get("gate", ""), called or below.get("act", ""))
