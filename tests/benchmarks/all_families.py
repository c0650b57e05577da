"""Every architecture of transformers that text goes into, tiny and random: are its FFNs found, is the model the same with them replaced?

    python tests/benchmarks/all_families.py [MODEL_TYPE ...]

Prints a line each: same (with the largest relative difference of the logits), differs, refused (with the reason), or not tried, where a
tiny model of the default configuration cannot be built or run. Exit code 1 if one differs. Some minutes.
"""

import argparse
import signal
import sys
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from moefication_cli.errors import UnsupportedModelError, first_line
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import install, live_weights, pack

TABLES = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classifier": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text2text": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
# What configurations call their sizes
SIZES = {
    16: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "sliding_window"),
    32: ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers",
        "num_encoder_layers", "num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_heads", "eos_token_id"),
    1: ("num_key_value_heads", "bos_token_id", "decoder_start_token_id"),
    8: ("d_kv", "head_dim"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    60: ("vocab_size",),
    0: ("pad_token_id",),
}  # fmt: skip
MOST_PARAMETERS, SECONDS = 40_000_000, 20


class Whole:
    """All neurons of an FFN, in place of the FFN."""

    def __init__(self, ffn: FFNWeights) -> None:
        self.weights, self.calls = ExpertWeights(ffn, 1), 0

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.weights.ffn.forward(x)


def tiny(model_type: str, name: str) -> Any:
    """A random model of a few parameters; raises whatever its configuration or class does."""
    kind = transformers.CONFIG_MAPPING[model_type]
    default = kind()
    asked = {option: size for size, options in SIZES.items() for option in options if hasattr(default, option)}
    if getattr(default, "layer_types", None):
        asked["layer_types"] = [default.layer_types[0]] * 2
    try:
        config = kind(**asked)
    except Exception:
        asked.pop("head_dim", None)
        config = kind(**asked)
    made = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in made(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with the sizes that are set here")
    torch.manual_seed(0)
    return made(config).eval()


@torch.no_grad()
def tried(table: str, model_type: str, name: str) -> tuple[str, str]:
    """(what came of it, more about it)."""
    signal.alarm(SECONDS)
    try:
        model = tiny(model_type, name)
        sites = find_sites(model)
        ids = torch.randint(3, 50, (2, 9))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if table == "text2text":
            inputs["decoder_input_ids"] = ids
        before = model(**inputs).logits
        mask = TokenMask(model)
        layers = []
        for site in sites:
            pack(model, site)
            layers.append(Whole(live_weights(model, site)))
            install(model, site, layers[-1], mask)
        after = model(**inputs).logits
    except UnsupportedModelError as error:
        return "refused", error.message
    except Exception as error:
        return "not tried", f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)
    if idle := [site.name for site, layer in zip(sites, layers, strict=True) if not layer.calls]:
        return "differs", f"never called: {', '.join(idle)}"
    off = float((before - after).abs().max() / before.abs().max())
    return (
        "same" if off < 1e-4 else "differs",
        f"{off:.1e}, {len(sites)} FFNs, {sites[0].activation}, {sites[0].family}",
    )


def too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    wanted = parser.parse_args().model_types
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, too_long)
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for table, entries in TABLES.items():
        for model_type, names in entries.items():
            if model_type in seen or (wanted and model_type not in wanted):
                continue
            seen.add(model_type)
            outcome, more = tried(table, model_type, names if isinstance(names, str) else names[0])
            counts[outcome] = counts.get(outcome, 0) + 1
            print(f"{model_type:28} {table:10} {outcome:9} {more[:160]}", flush=True)
    print(counts)
    sys.exit("differs" in counts)


if __name__ == "__main__":
    main()
