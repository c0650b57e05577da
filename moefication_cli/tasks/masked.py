"""Masked language modelling: loss in nats on masked positions of windows of text, between the model's special tokens.

Windows are those of `language`, documents joined by the end token. Of each, 15 % of the tokens (one at least, special
tokens never) are asked for, by BERT's rule (arXiv 1810.04805, section 3.1): 80 % of these read the mask token, 10 % a
random one, 10 % themselves. So the loss is what the model was trained on and transformers' `run_mlm.py` reports. Which
positions and tokens depends on the seed and the window alone: the same in every row of `eval`, with any batch size.
Beside the dense model: KL(dense || moe) and agreement of the first choice, per masked position.
Axes: B windows, T tokens, V vocabulary.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.encoding import (
    Encoded,
    checked_batch_size,
    grouped,
    length_limit,
    pad_batch,
    padding_of,
    real_tokens,
)
from moefication_cli.tasks.examples import NOT_ASKED, Batch, Metric, Scores, TaskOptions
from moefication_cli.tasks.language import Window, Windows, score_tokens, windows
from moefication_cli.tasks.reading import Rows
from moefication_cli.tasks.textstream import TextStream

_SHARE = 0.15  # of the tokens are asked for
_MASKED, _RANDOM = 0.8, 0.1  # shares of these


class MaskedExamples:
    """Text in windows with masked positions; an example is a window. See `examples.Examples`; `reference` is the logits."""

    task = "mlm"
    metric: Metric = "loss"
    keeps_reference = False

    def __init__(self, tokenizer: Any, model_config: Any, rows: Rows, options: TaskOptions) -> None:
        self._masking = _masking_of(tokenizer, model_config, options.seed)
        self._pad = {"input_ids": padding_of(tokenizer), "labels": NOT_ASKED}
        self._before, self._behind = _frame(tokenizer)
        added = len(self._before) + len(self._behind)
        length = length_limit(model_config, tokenizer, options.max_length) - added
        if length < 2:
            raise ConfigError(
                f"--max-length {length + added} leaves no text beside {added} special tokens",
                f"--max-length {2 + added} or more",
            )
        self._windows = Windows(TextStream(rows, tokenizer), length, options, added)
        self.notes = self._windows.notes()
        some = windows(TextStream(rows, tokenizer, piece=4096), length)
        if not any(self._masking.of(window) for window in some):
            raise ConfigError(f"{rows.source} holds no word that could be masked", "name other data")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order; with `limit`, that many sampled over the whole data."""
        return self._batches(self._windows.every(), batch_size)

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        """Windows sampled over the whole data, masked as those to evaluate on."""
        return self._batches(self._windows.sampled(max_tokens, seed), batch_size)

    def targets(self, batch: Batch) -> Tensor:
        labels_BT = _labels(batch)
        return labels_BT[labels_BT != NOT_ASKED]

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        return score_tokens(logits, _labels(batch), batch.example_B, reference)

    def _batches(self, found: Iterator[Window], batch_size: int) -> Iterator[Batch]:
        number = 0
        # A window of special tokens alone has nothing to ask for
        masked = (pair for window in found if (pair := self._masking.of(window)) is not None)
        for group in grouped(masked, checked_batch_size(batch_size)):
            inputs = pad_batch([self._framed(*pair) for pair in group], self._pad)
            labels_BT = inputs.pop("labels")
            yield Batch(inputs, np.arange(number, number + len(group)), real_tokens(inputs), labels_BT)
            number += len(group)

    def _framed(self, ids: Window, labels: Window) -> Encoded:
        """A window between the special tokens, which are not asked for."""
        whole = [*self._before, *ids, *self._behind]
        before, behind = ([NOT_ASKED] * len(special) for special in (self._before, self._behind))
        return {
            "input_ids": whole,
            "attention_mask": [1] * len(whole),
            "labels": [*before, *labels, *behind],
        }


@dataclass(frozen=True)
class _Masking:
    """Which tokens of a window are asked for, and what is read in their place."""

    mask: int
    special: frozenset[int]
    vocabulary: int
    seed: int

    def of(self, window: Window) -> tuple[Window, Window] | None:
        """(tokens to read, labels); None where there is no token but special ones."""
        read = np.array(window, np.int64)
        places = np.flatnonzero([token not in self.special for token in window])
        if not len(places):
            return None
        rng = np.random.default_rng((self.seed, zlib.crc32(read.tobytes())))
        chosen = rng.choice(places, max(1, round(_SHARE * len(places))), replace=False)
        labels = np.full_like(read, NOT_ASKED)
        labels[chosen] = read[chosen]
        kind, drawn = rng.random(len(chosen)), rng.integers(self.vocabulary, size=len(chosen))
        replaced = np.where(kind < _MASKED + _RANDOM, drawn, read[chosen])
        read[chosen] = np.where(kind < _MASKED, self.mask, replaced)
        return read.tolist(), labels.tolist()


def _masking_of(tokenizer: Any, model_config: Any, seed: int) -> _Masking:
    """Raises ConfigError for a tokenizer without a mask token, or with one that the model does not have."""
    mask, known = tokenizer.mask_token_id, int(getattr(model_config, "vocab_size", len(tokenizer)))
    if mask is None or mask >= known:
        has = "has no mask token" if mask is None else f"has mask token {mask} and the model {known} tokens"
        raise ConfigError(
            f"masked language modelling: the tokenizer {has}",
            "put the tokenizer that the model was trained with into its folder (tokenizer.save_pretrained)",
        )
    return _Masking(int(mask), frozenset(tokenizer.all_special_ids), min(len(tokenizer), known), seed)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _labels(batch: Batch) -> Tensor:
    assert batch.labels_RT is not None  # `_batches` sets them
    return batch.labels_RT
