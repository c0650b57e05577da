"""Language modelling: perplexity over windows of text, and windows sampled uniformly to calibrate on.

Documents joined by the end token, windows of `max_length` without overlap, exp of the mean loss per predicted token
(the first token of a window is read, not predicted). Beside the dense model: KL(dense || moe) and agreement of the
first choice, per token. Axes: B windows, T tokens, V vocabulary, P predicted tokens of a window.
`Windows` and `score_tokens` also serve masked language models (`masked`). Does not know encoder-decoders.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.encoding import (
    checked_batch_size,
    chunk_rows,
    grouped,
    length_limit,
    pad_batch,
    padding_of,
    real_tokens,
)
from moefication_cli.tasks.examples import NOT_ASKED, Batch, Indices, Metric, Scores, TaskOptions
from moefication_cli.tasks.reading import Rows
from moefication_cli.tasks.textstream import TextStream

Window = list[int]


class LanguageExamples:
    """Text in windows; an example is a window. See `examples.Examples`; `reference` is the logits themselves."""

    task = "lm"
    metric: Metric = "perplexity"
    keeps_reference = False

    def __init__(self, tokenizer: Any, model_config: Any, rows: Rows, options: TaskOptions) -> None:
        if getattr(model_config, "is_encoder_decoder", False):
            raise ConfigError("language modelling needs a decoder, not an encoder-decoder", "use --task text2text")
        self._pad = {"input_ids": padding_of(tokenizer)}
        self.max_length = length_limit(model_config, tokenizer, options.max_length)
        self._windows = Windows(TextStream(rows, tokenizer), self.max_length, options)
        self.notes = self._windows.notes()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order; with `limit`, that many sampled over the whole data."""
        return self._batches(self._windows.every(), batch_size)

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        """Windows sampled over the whole data, at most `max_tokens` in all (but two at least), in random order."""
        return self._batches(self._windows.sampled(max_tokens, seed), batch_size)

    def targets(self, batch: Batch) -> Tensor:
        return batch.inputs["input_ids"][:, 1:][batch.inputs["attention_mask"][:, 1:].bool()]

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        ids_BT, real_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        next_BT = torch.full_like(ids_BT, NOT_ASKED)
        next_BT[:, :-1] = ids_BT[:, 1:].masked_fill(~(real_BT[:, 1:] & real_BT[:, :-1]), NOT_ASKED)
        return score_tokens(logits, next_BT, batch.example_B, reference)

    def _batches(self, found: Iterator[Window], batch_size: int) -> Iterator[Batch]:
        number = 0
        for group in grouped(found, checked_batch_size(batch_size)):
            inputs = pad_batch([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in group], self._pad)
            yield Batch(inputs, np.arange(number, number + len(group)), real_tokens(inputs))
            number += len(group)


@dataclass(frozen=True)
class Windows:
    """Text in windows of `length` tokens without overlap; each gets `added` special tokens besides.

    Raises ConfigError where there are fewer than two tokens.
    """

    stream: TextStream
    length: int
    options: TaskOptions
    added: int = 0

    def __post_init__(self) -> None:
        rows, tokenizer = self.stream.rows, self.stream.tokenizer
        if next(windows(TextStream(rows, tokenizer, piece=4096), 2), None) is None:
            raise ConfigError(f"{rows.source} holds fewer than two tokens of text", "name longer data")

    def notes(self) -> list[str]:
        """What the user should know of how documents are joined."""
        return [] if self.stream.separator else ["the tokenizer has no end token: documents are joined without one"]

    def every(self) -> Iterator[Window]:
        """All in order; with `limit`, that many sampled over the whole data."""
        limit, seed = self.options.limit, self.options.seed
        if limit is None:
            return windows(self.stream, self.length)
        return iter(sample_windows(self.stream, self.length, [self.length] * limit, seed))

    def sampled(self, max_tokens: int | None, seed: int) -> Iterator[Window]:
        """Sampled over the whole data, at most `max_tokens` in all, special ones too, but one window at least; None: `every`."""
        if max_tokens is None:
            return self.every()
        full, rest = divmod(max(2 + self.added, max_tokens), self.length + self.added)
        lengths = [self.length] * full + ([rest - self.added] if rest >= 2 + self.added else [])
        return iter(sample_windows(self.stream, self.length, lengths[: self.options.limit], seed))


def windows(stream: TextStream, length: int) -> Iterator[Window]:
    """The whole data as windows of `length` tokens without overlap; a last one of two tokens or more is kept."""
    buffer: Window = []
    for ids in stream.tokens():
        buffer += ids
        whole = len(buffer) // length * length
        for start in range(0, whole, length):
            yield buffer[start : start + length]
        buffer = buffer[whole:]
    if len(buffer) > 1:
        yield buffer


def sample_windows(stream: TextStream, length: int, lengths: list[int], seed: int) -> list[Window]:
    """Windows of the given lengths (at most `length`) drawn uniformly over the whole data without tokenising it.

    The data's bytes are cut into equal cells of about `length` tokens; cells are drawn without replacement and a window
    starts at its cell's first word. Asked for more than there is, all windows come. In random order either way.
    """
    rng = np.random.default_rng(seed)
    total = int(stream.row_ends[-1])
    num_cells = int(total / (stream.bytes_per_token(seed) * length))
    if len(lengths) >= 0.8 * num_cells:  # nearly everything: cut exactly, then draw
        return _reservoir(windows(stream, length), lengths, rng)
    cells = rng.choice(num_cells, len(lengths), replace=False)
    found = []
    for cell, wanted in zip(cells.tolist(), lengths, strict=True):
        ids: Window = []
        for part in stream.tokens(int(cell * total / num_cells), piece=8 * length):
            ids += part
            if len(ids) >= wanted:
                break
        found.append(ids[:wanted])
    return [ids for ids in found if len(ids) > 1]


def _reservoir(every: Iterator[Window], lengths: list[int], rng: np.random.Generator) -> list[Window]:
    """Windows drawn uniformly from a stream of unknown length (Vitter's algorithm R), in random order."""
    kept: list[Window] = []
    for seen, window in enumerate(every):
        if seen < len(lengths):
            kept.append(window)
        elif (place := int(rng.integers(seen + 1))) < len(lengths):
            kept[place] = window
    order = rng.permutation(len(kept))
    return [kept[i][:wanted] for i, wanted in zip(order, lengths, strict=False)]


def score_tokens(
    logits_BTV: Tensor, labels_BT: Tensor, example_B: Indices, reference_BTV: Tensor | None = None
) -> Scores:
    """Per sequence: summed loss (nats), predicted tokens, and beside dense logits agreements and summed KL.

    labels_BT: the token that each position should give, NOT_ASKED where nothing is read. Works on slices of positions, so
    that no second copy of the logits is made. NonFiniteError if a loss is not finite.
    """
    labels_BT = labels_BT.to(logits_BTV.device)
    sums = np.zeros((4, len(labels_BT)))  # loss, count, agreement, KL
    for b in range(len(labels_BT)):
        positions = (labels_BT[b] != NOT_ASKED).nonzero()[:, 0]
        sums[1, b] = len(positions)
        step = chunk_rows(logits_BTV.shape[-1])
        for start in range(0, len(positions), step):
            at_P = positions[start : start + step]
            logp_PV = logits_BTV[b, at_P].float().log_softmax(-1)
            sums[0, b] -= logp_PV.gather(-1, labels_BT[b, at_P, None]).double().sum().item()
            if reference_BTV is not None:
                dense_PV = reference_BTV[b, at_P].to(logp_PV.device).float().log_softmax(-1)
                sums[2, b] += (dense_PV.argmax(-1) == logp_PV.argmax(-1)).sum().item()
                sums[3, b] += (dense_PV.exp() * (dense_PV - logp_PV)).sum(-1).double().sum().item()
    if not np.isfinite(sums).all():
        raise NonFiniteError("the model's output is not finite", "check the checkpoint; try --dtype float32")
    agreement_B, kl_B = (sums[2], sums[3]) if reference_BTV is not None else (None, None)
    return Scores(example_B, sums[0], sums[1], agreement_B, kl_B)
