"""Tiny random models, at least one per row of FAMILIES: hidden 16, two layers, F = 48. No files, no network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

VOCAB, D, F = 64, 16, 48

_GPT = {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": F}
_HF = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": 64,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": VOCAB, "d_model": D, "d_kv": 8, "d_ff": F, "num_layers": 2, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_KV = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


def _gpt_neo() -> Any:
    return tf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=D, num_layers=2, num_heads=2, intermediate_size=F,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    )  # fmt: skip


# encoder-decoders whose decoder is given inputs of its own, and all of them
READS_TARGETS = ("t5", "t5-gated", "bart")
ENCODER_DECODERS = (*READS_TARGETS, "bart-classifier")

# name -> (model class, configuration); the names are the tests' parameters
TINY: dict[str, tuple[str, Callable[[], Any]]] = {
    "t5": ("T5ForConditionalGeneration", lambda: tf.T5Config(**_T5, feed_forward_proj="relu")),
    "t5-gated": ("T5ForConditionalGeneration", lambda: tf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "bert": ("BertForSequenceClassification", lambda: tf.BertConfig(**_HF, hidden_act="relu")),
    "bert-bare": ("BertModel", lambda: tf.BertConfig(**_HF)),
    "bert-mlm": ("BertForMaskedLM", lambda: tf.BertConfig(**_HF)),
    "roberta": ("RobertaForSequenceClassification", lambda: tf.RobertaConfig(**_HF, pad_token_id=0)),
    "roberta-mlm": ("RobertaForMaskedLM", lambda: tf.RobertaConfig(**_HF, pad_token_id=0)),
    "electra": ("ElectraForSequenceClassification", lambda: tf.ElectraConfig(**_HF, embedding_size=D)),
    "bart": ("BartForConditionalGeneration", lambda: tf.BartConfig(**_BART)),
    "bart-classifier": (  # its decoder reads the encoder's input, and the last </s> of each sequence is classified
        "BartForSequenceClassification",
        lambda: tf.BartConfig(
            **_BART, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None
        ),
    ),
    "opt": (
        "OPTForCausalLM",
        lambda: tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, ffn_dim=F,
            max_position_embeddings=64, word_embed_proj_dim=D,
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: tf.GPT2Config(**_GPT)),
    "gpt-neo": ("GPTNeoForCausalLM", _gpt_neo),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", lambda: tf.GPTBigCodeConfig(**_GPT)),
    "starcoder2": ("Starcoder2ForCausalLM", lambda: tf.Starcoder2Config(**_HF, num_key_value_heads=1)),
    "gpt-neox": ("GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**_HF)),
    "bloom": ("BloomForCausalLM", lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=D, n_layer=2, n_head=2)),
    "falcon": (
        "FalconForCausalLM",
        lambda: tf.FalconConfig(
            vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, ffn_hidden_size=F
        ),
    ),
    "gpt-j": ("GPTJForCausalLM", lambda: tf.GPTJConfig(**_GPT, rotary_dim=4)),
    "llama": ("LlamaForCausalLM", lambda: tf.LlamaConfig(**_HF, num_key_value_heads=1, pad_token_id=0)),
    "llama-bias": ("LlamaForSequenceClassification", lambda: tf.LlamaConfig(**_HF, mlp_bias=True, pad_token_id=0)),
    "mistral": ("MistralForCausalLM", lambda: tf.MistralConfig(**_HF, **_KV)),
    "qwen2": ("Qwen2ForCausalLM", lambda: tf.Qwen2Config(**_HF, num_key_value_heads=1)),
    "qwen3": ("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**_HF, **_KV)),
    "gemma": ("GemmaForCausalLM", lambda: tf.GemmaConfig(**_HF, **_KV)),
    "gemma2": ("Gemma2ForCausalLM", lambda: tf.Gemma2Config(**_HF, **_KV)),
    "gemma3": ("Gemma3ForCausalLM", lambda: tf.Gemma3TextConfig(**_HF, **_KV)),
    "nemotron": ("NemotronForCausalLM", lambda: tf.NemotronConfig(**_HF, num_key_value_heads=1)),
    "phi": ("PhiForCausalLM", lambda: tf.PhiConfig(**_HF)),
    "mpt": ("MptForCausalLM", lambda: tf.MptConfig(vocab_size=VOCAB, d_model=D, n_layers=2, n_heads=2, max_seq_len=64)),
    "phi3": ("Phi3ForCausalLM", lambda: tf.Phi3Config(**_HF, num_key_value_heads=1, pad_token_id=0)),
    "glm4": ("Glm4ForCausalLM", lambda: tf.Glm4Config(**_HF, **_KV)),
    "modernbert": (
        "ModernBertForSequenceClassification",
        lambda: tf.ModernBertConfig(
            **_HF, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1, mlp_bias=True
        ),
    ),
    "lfm2": (  # one block with attention and one with a convolution; neither keeps its activation
        "Lfm2ForCausalLM",
        lambda: tf.Lfm2Config(
            **_HF,
            num_key_value_heads=1,
            pad_token_id=0,
            layer_types=["full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        ),
    ),
    "esm": (
        "EsmForSequenceClassification",
        lambda: tf.EsmConfig(**_HF, pad_token_id=0, mask_token_id=1, position_embedding_type="rotary"),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        lambda: tf.DistilBertConfig(
            vocab_size=VOCAB, dim=D, n_layers=2, n_heads=2, hidden_dim=F, max_position_embeddings=64
        ),
    ),
    "vit": (
        "ViTForImageClassification",
        lambda: tf.ViTConfig(
            hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=F, image_size=8, patch_size=4
        ),
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model in evaluation mode. Weights are large enough for every FFN to move the output."""
    kind, config = TINY[name]
    torch.manual_seed(seed)
    model = getattr(tf, kind)(config()).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 or parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.tie_weights()
    return model.requires_grad_(False)


def tiny_inputs(name: str, padded: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of 3 x 7; the second and third sequence are padded on the right unless `padded` is false."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = mask[2, 2:] = 0
        ids = ids * mask
    if name == "bart-classifier":
        ids[torch.arange(3), mask.sum(1) - 1] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in READS_TARGETS:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 4), generator=generator)
        if padded:
            inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    return inputs


def tiny_tokenizer(folder: Path, ends: bool = False, masks: bool = False) -> None:
    """A word-level tokenizer w0 .. w60 with <pad>, </s> and <unk>, saved into `folder`; `ends` puts </s> behind each text.

    `masks`: an encoder's, with <s> and <mask> in place of the last two words, and <s> before and </s> behind each text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if masks:
        words[-2:] = "<s>", "<mask>"
        raw.model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        single = [("<s>", VOCAB - 2), ("</s>", 1)]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=single)
    if ends:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64,
        **({"mask_token": "<mask>", "cls_token": "<s>"} if masks else {}),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def save_tiny(
    name: str, folder: Path, tokenizer: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Saves a tiny model (and tokenizer) into `folder` and returns it."""
    model = tiny_model(name).to(dtype)
    model.save_pretrained(folder, **options)
    if tokenizer:
        tiny_tokenizer(folder, ends=name == "bart-classifier", masks=name.endswith(("-mlm", "-bare")))
    return model
