"""Encoders as embedders: a sequence's embedding is its tokens' last hidden states, averaged or that of the first (CLS).

Metric: the mean cosine to the dense model's embedding of the same text; given pairs of texts with scores (STS benchmarks),
Spearman's correlation of the pairs' cosines with the scores. There is no distribution to compare, so in place of the KL
stands 1 - cosine to the dense embedding: the KL divergence of unit-variance normal distributions around the two unit
vectors. Rows of a batch are texts, example-major: a pair is two rows.
Axes: R rows of a batch (B examples times one or two texts), T tokens, D embedding width.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.encoding import (
    Encoded,
    checked_batch_size,
    encode_texts,
    length_limit,
    limited,
    pad_batch,
    padding_of,
    real_tokens,
    sample_rows,
    sorted_blocks,
)
from moefication_cli.tasks.examples import Batch, Indices, Metric, Scores, TaskOptions
from moefication_cli.tasks.reading import Rows
from moefication_cli.tasks.stats import Values

_FEWEST_PAIRS = 4  # the standard error of a correlation needs them


class EmbeddingExamples:
    """Rows with one text or a pair, perhaps with a score. See `examples.Examples`; `reference` is the embeddings [R, D]."""

    task = "embedding"
    keeps_reference = True

    def __init__(
        self, tokenizer: Any, model_config: Any, rows: Rows, options: TaskOptions, require_labels: bool = True
    ) -> None:
        self._tokenizer, self._rows = tokenizer, rows
        self._fields = rows.require_text()
        self._max_length = length_limit(model_config, tokenizer, options.max_length)
        self._pad = {"input_ids": padding_of(tokenizer)}
        self._pooling = options.pooling
        self.notes: list[str] = []
        with_text = _with_text(rows, self._fields, options.rows)
        left_out = (rows.num_rows if options.rows is None else len(options.rows)) - len(with_text)
        if left_out:
            self.notes.append(f"{rows.source}: {left_out} rows without text are left out")
        if not len(with_text):
            raise ConfigError(f"{rows.source} holds no text", "name other data, or another --text-field")
        self._options = replace(options, rows=with_text)
        paired = require_labels and len(self._fields) == 2 and rows.label_field is not None
        self._score_of_row = read_scores(rows, self.notes) if paired else None
        self.metric: Metric = "cosine"
        if self._score_of_row is not None:
            self.metric = "spearman"
            _check_scores(self._score_of_row[limited(rows.num_rows, self._options)], rows.source)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._batches(limited(self._rows.num_rows, self._options), batch_size)

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        indices = sample_rows(self._rows.num_rows, self._encode, max_tokens, seed, self._options)
        return self._batches(indices, batch_size)

    def targets(self, batch: Batch) -> Tensor:
        raise ConfigError("embeddings have no labels to learn", "use --loss kl or hidden")

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.float()

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        """`logits` are embeddings [R, D], as `Batch.answers` makes them."""
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError("the model's output is not finite", "check the checkpoint; try --dtype float32")
        texts, count = len(self._fields), len(batch.example_B)
        unit_RD = _unit(logits)
        distance_R = torch.zeros(len(unit_RD), dtype=torch.float64, device=unit_RD.device)
        if reference is not None:
            distance_R = (unit_RD - _unit(reference).to(unit_RD.device)).square().sum(
                -1
            ) / 2  # 1 - cosine, never below 0
        distance_B: Values = distance_R.reshape(count, texts).mean(1).cpu().numpy()
        value_B, gold_B = 1 - distance_B, None
        if self._score_of_row is not None:
            first_BD, second_BD = unit_RD.reshape(count, texts, -1).unbind(1)
            value_B, gold_B = (first_BD * second_BD).sum(-1).cpu().numpy(), self._score_of_row[batch.example_B]
        return Scores(batch.example_B, value_B, np.ones(count), None, None if reference is None else distance_B, gold_B)

    def _batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        size = max(1, checked_batch_size(batch_size) // len(self._fields))
        for example_B, encoded in sorted_blocks(indices, self._encode, size):
            inputs = pad_batch([text for row in encoded for text in _texts(row)], self._pad)
            yield Batch(inputs, example_B, real_tokens(inputs), pool_RT=self._pool(inputs["attention_mask"]))

    def _pool(self, mask_RT: Tensor) -> Tensor:
        """The weight of every token in its sequence's embedding."""
        if self._pooling == "mean":
            return mask_RT / mask_RT.sum(1, keepdim=True)
        pool_RT = torch.zeros(mask_RT.shape)
        pool_RT[:, 0] = 1
        return pool_RT

    def _encode(self, indices: Indices) -> list[Encoded]:
        """The tokens of each row's texts one after the other, and how many each has."""
        values = self._rows.take(self._fields, indices)
        encoded = [
            encode_texts(
                self._tokenizer, [(value[n],) for value in values], indices, self._rows.source, self._max_length
            )
            for n in range(len(self._fields))
        ]
        return [
            {
                "input_ids": [token for text in row for token in text["input_ids"]],
                "lengths": [len(text["input_ids"]) for text in row],
            }
            for row in zip(*encoded, strict=True)
        ]


def _texts(row: Encoded) -> Iterator[Encoded]:
    start = 0
    for length in row["lengths"]:
        yield {"input_ids": row["input_ids"][start : start + length], "attention_mask": [1] * length}
        start += length


def _unit(embedding_RD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embedding_RD.double(), dim=-1)


def _with_text(rows: Rows, fields: tuple[str, ...], chosen: Indices | None) -> Indices:
    """The rows, of those chosen, whose every field has a text; the lines between paragraphs have none."""
    columns = rows.dataset.select_columns(list(fields)).data
    there = np.ones(rows.num_rows, bool)
    for field in fields:
        length = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(columns.column(field))), 0)
        there &= length.to_numpy() > 0
    found = np.flatnonzero(there).astype(np.int64)
    return found if chosen is None else chosen[there[chosen]]


def read_scores(rows: Rows, notes: list[str]) -> Values | None:
    """Every row's score; None, and said, where the field named `label` holds classes.

    Raises ConfigError naming the first row whose score is no number.
    """
    assert rows.label_field is not None
    values = rows.dataset[rows.label_field]
    found = [_number(value) for value in values]
    classes = getattr(rows.dataset.features[rows.label_field], "names", None) is not None
    if classes or (rows.label_field == "label" and all(math.isnan(score) for score in found)):
        notes.append(
            f"{rows.source}: field {rows.label_field!r} holds classes, no scores; name scores with --label-field"
        )
        return None
    for row, (score, value) in enumerate(zip(found, values, strict=True), 1):
        if not math.isfinite(score):
            raise ConfigError(
                f"{rows.source}: row {row} has score {value!r} in field {rows.label_field!r}, which is not a number",
                "correct or remove the row, or name the field with the scores with --label-field",
            )
    return np.array(found, np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _check_scores(score_B: Values, source: str) -> None:
    if len(score_B) < _FEWEST_PAIRS:
        raise ConfigError(
            f"{source}: {len(score_B)} pairs with scores are too few for a correlation",
            "name more data, or a larger --limit",
        )
    if bool((score_B == score_B[0]).all()):
        raise ConfigError(
            f"{source}: all scores are {score_B[0]:g}: nothing can correlate with them", "name another --label-field"
        )
