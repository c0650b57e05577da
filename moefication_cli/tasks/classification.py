"""Sequence classification with an encoder's (or decoder's) classification head: logits [B, C] against labels.

Metric: accuracy; beside the dense model, agreement of the first choice and KL of the class distribution. Regression
heads (STS-B) and multi-label heads are refused.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
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
from moefication_cli.tasks.examples import Batch, Indices, Metric, Scores, TaskOptions, score_classes
from moefication_cli.tasks.fields import class_labels
from moefication_cli.tasks.reading import Rows


class ClassificationExamples:
    """Rows with one text or a pair, and a label unless they only calibrate. See `examples.Examples`."""

    task = "classification"
    metric: Metric = "accuracy"
    keeps_reference = True

    def __init__(
        self, tokenizer: Any, model_config: Any, rows: Rows, options: TaskOptions, require_labels: bool = True
    ) -> None:
        self._tokenizer, self._rows, self._options = tokenizer, rows, options
        self._fields = rows.require_text()
        self._max_length = length_limit(model_config, tokenizer, options.max_length)
        # Types are no input of models without a table of them, whatever the tokenizer offers
        self._types = (getattr(model_config, "type_vocab_size", None) or 0) > 1
        self._pad = {"input_ids": padding_of(tokenizer), "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
        # Decoders find the last token by the padding token; without one they take single sequences only
        self._single = getattr(model_config, "pad_token_id", None) is None
        self.notes: list[str] = []
        self._labels: Indices | None = None
        if require_labels:
            _refuse_heads(model_config)
            self._labels = read_labels(rows, class_names(model_config), self.notes)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._batches(limited(self._rows.num_rows, self._options), batch_size)

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        indices = sample_rows(self._rows.num_rows, self._encode, max_tokens, seed, self._options)
        return self._batches(indices, batch_size)

    def targets(self, batch: Batch) -> Tensor:
        if self._labels is None:
            raise ConfigError(f"{self._rows.source}: no labels were read", "name the field with --label-field")
        return torch.from_numpy(self._labels[batch.example_B])

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.float().log_softmax(-1)

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        if self._labels is None:
            raise ConfigError(f"{self._rows.source}: no labels were read", "name the field with --label-field")
        return score_classes(self.reference(logits, batch), self._labels[batch.example_B], batch, reference)

    def _batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        size = 1 if self._single else checked_batch_size(batch_size)
        for example_B, encoded in sorted_blocks(indices, self._encode, size):
            inputs = pad_batch(encoded, self._pad)
            yield Batch(inputs, example_B, real_tokens(inputs))

    def _encode(self, indices: Indices) -> list[Encoded]:
        texts = self._rows.take(self._fields, indices)
        encoded = encode_texts(self._tokenizer, texts, indices, self._rows.source, self._max_length)
        if not self._types:
            for row in encoded:
                row.pop("token_type_ids", None)
        return encoded


def class_names(model_config: Any) -> list[str]:
    """The model's classes in order of their number."""
    names = getattr(model_config, "id2label", None) or {}
    count = int(getattr(model_config, "num_labels", len(names)))
    return [str(names.get(i, f"LABEL_{i}")) for i in range(count)]


def read_labels(rows: Rows, names: list[str], notes: list[str]) -> Indices:
    """Class number of every row. ConfigError without a label field, or naming the first row that does not fit."""
    field = rows.label_field
    if field is None:
        raise ConfigError(
            f"{rows.source}: no field looks like the label; fields: {', '.join(map(repr, rows.fields))}",
            "name it with --label-field",
        )
    column = rows.dataset.select_columns([field])
    values = (value for start in range(0, rows.num_rows, 10_000) for value in column[start : start + 10_000][field])
    return class_labels(values, names, rows.source, notes, getattr(column.features[field], "names", None))


def _refuse_heads(model_config: Any) -> None:
    problem = getattr(model_config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or len(class_names(model_config)) < 2:
        kind = "multi-label" if problem == "multi_label_classification" else "regression"
        raise ConfigError(f"the model has a {kind} head; classification into two classes or more is what eval measures")
