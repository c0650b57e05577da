"""From texts to padded tensors: lengths, tokenising, which rows, in which order.

Axes: R rows of a batch's tensors, T tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.examples import Indices, TaskOptions

Encoded = dict[str, list[int]]

_SORT_BLOCK = 1024  # examples tokenised and sorted by length together; fixed, so that order never depends on batch size
_MAX_DEFAULT_LENGTH = 512
_LIMITS = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
# position tables of these models start behind the padding token's row
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"}


def position_limit(model_config: Any) -> int | None:
    """The longest input a model's positions allow, in tokens; None where its configuration names no limit."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in _LIMITS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:  # some position-free models say -1
            offset = getattr(config, "model_type", "") in _OFFSET_POSITIONS
            return limit - (getattr(config, "pad_token_id", None) or 0) - 1 if offset else limit
    return None


def length_limit(model_config: Any, tokenizer: Any, max_length: int | None) -> int:
    """Tokens per sequence: `max_length`, or the model's limit but at most 512. ConfigError if it exceeds the limit."""
    hard = position_limit(model_config)
    if max_length is not None:
        if max_length < 2 or (hard is not None and max_length > hard):
            raise ConfigError(f"--max-length {max_length} is not between 2 and the model's limit {hard}")
        return max_length
    soft = getattr(tokenizer, "model_max_length", None)  # an absurdly large number when unknown
    return int(min(x for x in (hard, soft, _MAX_DEFAULT_LENGTH) if x))


def pad_batch(rows: Sequence[Encoded], pad: Mapping[str, int]) -> dict[str, Tensor]:
    """Right-padded tensors [R, T] of every input name; names not in `pad` are padded with 0 (masks)."""
    inputs = {}
    for name in rows[0]:
        width = max(len(row[name]) for row in rows)
        filler = pad.get(name, 0)
        inputs[name] = torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
    return inputs


def real_tokens(inputs: Mapping[str, Tensor]) -> int:
    """Ones of the attention masks."""
    return sum(int(t.sum()) for name, t in inputs.items() if name.endswith("attention_mask"))


def sorted_blocks(
    indices: Indices, encode: Callable[[Indices], list[Encoded]], batch_size: int
) -> Iterator[tuple[Indices, list[Encoded]]]:
    """Batches of (row numbers, encoded rows) of similar length: tokenised in blocks, longest first within each."""
    for start in range(0, len(indices), _SORT_BLOCK):
        block = indices[start : start + _SORT_BLOCK]
        rows = encode(block)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            yield block[places], [rows[i] for i in places]


def sample_rows(
    num_rows: int, encode: Callable[[Indices], list[Encoded]], max_tokens: int | None, seed: int, options: TaskOptions
) -> Indices:
    """Rows in random order, at most `limit`, whose input tokens add up to at most `max_tokens` (one row at least).

    Tokenises only those.
    """
    every = _chosen(num_rows, options)
    order = every[np.random.default_rng(seed).permutation(len(every))[: options.limit]]
    if max_tokens is None:
        return order
    total = taken = 0
    for start in range(0, len(order), 256):
        for row in encode(order[start : start + 256]):
            total += len(row["input_ids"])
            if total > max_tokens:
                return order[: max(1, taken)]
            taken += 1
    return order


def limited(num_rows: int, options: TaskOptions) -> Indices:
    """All rows, or `limit` of them sampled uniformly, ascending."""
    every = _chosen(num_rows, options)
    if options.limit is None or options.limit >= len(every):
        return every
    chosen = np.random.default_rng(options.seed).choice(len(every), options.limit, replace=False)
    return every[np.sort(chosen)]


def _chosen(num_rows: int, options: TaskOptions) -> Indices:
    return np.arange(num_rows, dtype=np.int64) if options.rows is None else options.rows


def encode_texts(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], rows: Indices, source: str, max_length: int
) -> list[Encoded]:
    """Token ids, masks and types of texts or text pairs, cut to `max_length`.

    Raises ConfigError naming the row (counted from 1) of a text that is missing or has no token of its own.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) == 2)
    for row, text in zip(rows, texts, strict=True):
        if not any(part is not None and part.strip() for part in text) or any(part is None for part in text):
            raise ConfigError(
                f"{source}: row {int(row) + 1} has no text", "remove the row, or name another --text-field"
            )
    pairs = [[text[1] for text in texts]] if len(texts[0]) == 2 else []
    encoded = tokenizer(
        [text[0] for text in texts], *pairs, truncation=True, max_length=max_length, return_attention_mask=True,
        verbose=False,
    )  # fmt: skip
    found: list[Encoded] = [
        {name: encoded[name][i] for name in encoded if name != "special_tokens_mask"} for i in range(len(texts))
    ]
    for row, item in zip(rows, found, strict=True):
        if len(item["input_ids"]) <= special:
            message = f"{source}: the text of row {int(row) + 1} is shorter than a token"
            raise ConfigError(message, "remove the row, or raise --max-length")
    return found


def padding_of(tokenizer: Any) -> int:
    """The token padding is written with; any will do where a mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def checked_batch_size(batch_size: int) -> int:
    """The batch size, or ConfigError."""
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} is not positive")
    return batch_size


def grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last perhaps shorter."""
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def chunk_rows(vocabulary: int) -> int:
    """Positions whose log-probabilities are held at once: about 64 MB of float32."""
    return max(1, math.ceil(2**24 / vocabulary))
