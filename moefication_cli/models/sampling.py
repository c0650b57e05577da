"""Text that a language model writes by itself: sampled from its own distribution, for models without data at hand."""

from typing import Any

import torch
from transformers import GenerationConfig

from moefication_cli.errors import ConfigError
from moefication_cli.models.loading import LoadedModel


def start_token(tokenizer: Any, config: Any) -> int:
    """The token a text begins with: the tokenizer's first one, else its or the model's end token. Raises ConfigError."""
    found = (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id)
    token = next((token for token in found if isinstance(token, int)), None)
    if token is None:
        raise ConfigError(
            "the model has no token that a text begins with, so it cannot write one", "name real data with --data"
        )
    return token


@torch.no_grad()
def sample_texts(loaded: LoadedModel, texts: int, length: int, seed: int) -> tuple[list[str], int]:
    """So many texts of at most `length` tokens, sampled at temperature 1 from the whole distribution; and the tokens written.

    A text ends with the model's end token. Depends on the seed alone, on one machine.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    start, end = start_token(tokenizer, loaded.config), tokenizer.eos_token_id
    pad = start if end is None else end
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, eos_token_id=end, pad_token_id=pad,
        bos_token_id=start, use_cache=True,
    )  # fmt: skip
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        ids = torch.full((texts, 1), start, device=loaded.device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    written = found[:, 1:].tolist()
    bodies = [row if end is None or end not in row else row[: row.index(end)] for row in written]
    return tokenizer.batch_decode(bodies, skip_special_tokens=True), sum(map(len, bodies))
