"""What every task is made of: batches of model inputs, and scores of a model's logits per example.

`Examples` is the one interface stages use (`task.prepare` makes them). The forward pass is the caller's, the same for
the dense model and the MoE: `logits = model(**batch.inputs).logits`. Axes: B examples of a batch (rows of data, or
windows of text), C classes, T tokens, V vocabulary, R rows of a batch's tensors (B, or more per example in text2text).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.stats import Values, perplexity, standard_error

Metric = Literal["accuracy", "perplexity"]
Encoded = dict[str, list[int]]
Indices = npt.NDArray[np.int64]

_SORT_BLOCK = 1024  # examples tokenised and sorted by length together; fixed, so that order never depends on batch size
_MAX_DEFAULT_LENGTH = 512
_LIMITS = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
# position tables of these models start behind the padding token's row
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"}


@dataclass(frozen=True)
class TaskOptions:
    """How text becomes model input. `label_words`: a comma list in label order. `limit` examples, by `seed`.

    `rows`: only these rows of the data, ascending; not of text in windows.
    """

    max_length: int | None = None
    prompt: str | None = None
    label_words: str | None = None
    limit: int | None = None
    seed: int = 0
    rows: Indices | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Batch:
    """Model inputs on the CPU (or where `to` put them), right-padded: `model(**batch.inputs)`.

    `example_B` are row numbers of the data, or window numbers. `num_tokens` counts real tokens, of decoders too.
    """

    inputs: dict[str, Tensor]
    example_B: Indices
    num_tokens: int

    def mask_of(self, stack: Literal["encoder", "decoder"]) -> Tensor | None:
        """Real tokens [B, T] that a stack of the model reads; None where it reads none.

        A decoder whose inputs are not given reads the encoder's, shifted right by the model (`BartForSequenceClassification`):
        the positions whose outputs are read are those of the encoder's mask.
        """
        own = stack == "decoder" and "decoder_input_ids" in self.inputs
        prefix = "decoder_" if own else ""
        mask, ids = self.inputs.get(f"{prefix}attention_mask"), self.inputs.get(f"{prefix}input_ids")
        return mask if mask is not None or ids is None else torch.ones_like(ids)

    def pieces(self, max_tokens: int) -> Iterator["Batch"]:
        """The batch in parts of at most so many tokens, padding included, or of one sequence; rows stay in order."""
        rows, longest = self.inputs["input_ids"].shape
        size = max(1, max_tokens // longest)
        for start in range(0, rows, size):
            part = {name: tensor[start : start + size] for name, tensor in self.inputs.items()}
            piece = Batch(part, self.example_B[start : start + size], 0)
            masks = [piece.mask_of("encoder"), piece.mask_of("decoder") if "decoder_input_ids" in part else None]
            yield replace(piece, num_tokens=sum(int(mask.sum()) for mask in masks if mask is not None))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(moved, self.example_B, self.num_tokens)


@dataclass(frozen=True)
class Scores:
    """One entry per example. Sums over the example's predictions: one of a class, or one per predicted token.

    `value_B`: right answers, or loss in nats; `weight_B`: predictions; `agreement_B`: predictions whose first choice is
    the dense model's; `kl_B`: KL(dense || this) in nats. The last two are None without a reference.
    """

    example_B: Indices
    value_B: Values
    weight_B: Values
    agreement_B: Values | None = None
    kl_B: Values | None = None

    @staticmethod
    def join(parts: Sequence["Scores"]) -> "Scores":
        """All batches' scores in one, by example number, so that two models' entries are pairs."""
        if not parts:
            raise ConfigError("there are no examples to evaluate", "check --eval-data and --limit")
        order = np.argsort(np.concatenate([p.example_B for p in parts]), kind="stable")

        def joined(columns: list[Values | None]) -> Values | None:
            return (
                None
                if any(c is None for c in columns)
                else np.concatenate([c for c in columns if c is not None])[order]
            )

        value_B, weight_B = joined([p.value_B for p in parts]), joined([p.weight_B for p in parts])
        assert value_B is not None and weight_B is not None
        example_B = np.concatenate([p.example_B for p in parts])[order]
        return Scores(
            example_B, value_B, weight_B, joined([p.agreement_B for p in parts]), joined([p.kl_B for p in parts])
        )


@dataclass(frozen=True)
class Summary:
    """A model on all examples. `stderr` is of `value`, None for one example; `agreement` is a share, `kl` in nats."""

    metric: Metric
    value: float
    stderr: float | None
    agreement: float | None
    kl: float | None
    num_examples: int
    num_predictions: int


class Examples(Protocol):
    """A task on data. `keeps_reference`: `reference` is small enough to keep for all batches (class distributions)."""

    task: str
    metric: Metric
    notes: list[str]
    keeps_reference: bool

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All examples (or `limit` of them), the same order every time and for every batch size, in bounded memory."""
        ...

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        """Sequences drawn uniformly over the data, at most `max_tokens` input tokens and `limit` in all; None: all."""
        ...

    def targets(self, batch: Batch) -> Tensor:
        """The right answer [P] to each of a calibration batch's predictions, padding left out: a class or a token.

        -100 where there is none. Raises ConfigError where the data has no labels.
        """
        ...

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `score` needs of the dense model: class log-probabilities [B, C], or the logits themselves for lm."""
        ...

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        """Per-example sums for one model; with the dense model's `reference` also agreement and KL."""
        ...


def compare(examples: Examples, dense_logits: Tensor, logits: Tensor, batch: Batch) -> Scores:
    """Scores of a model beside the dense model's logits for the same batch."""
    return examples.score(logits, batch, examples.reference(dense_logits, batch))


def summarise(metric: Metric, parts: Sequence[Scores] | Scores) -> Summary:
    """The metric over all examples with its standard error, and mean agreement and KL per prediction."""
    scores = parts if isinstance(parts, Scores) else Scores.join(parts)
    total = float(scores.weight_B.sum())
    mean = float(scores.value_B.sum()) / total
    error = standard_error(scores.value_B, scores.weight_B)
    value = mean
    if metric == "perplexity":
        value = float(perplexity(mean))
        error = None if error is None else min(error * value, 1e308)  # the slope of exp at the mean
    return Summary(
        metric,
        value,
        error,
        None if scores.agreement_B is None else float(scores.agreement_B.sum()) / total,
        None if scores.kl_B is None else float(scores.kl_B.sum()) / total,
        len(scores.example_B),
        round(total),
    )


def score_classes(logp_BC: Tensor, labels_B: Indices, batch: Batch, reference_BC: Tensor | None) -> Scores:
    """Scores of class log-probabilities [B, C] against labels, and against the dense model's."""
    if not bool(torch.isfinite(logp_BC).all()):
        raise NonFiniteError("the model's output is not finite", "check the checkpoint; try --dtype float32")
    best_B = logp_BC.argmax(-1)
    right_B = (best_B.cpu().numpy() == labels_B).astype(np.float64)
    agreement_B = kl_B = None
    if reference_BC is not None:
        dense_BC = reference_BC.to(logp_BC)
        agreement_B = (dense_BC.argmax(-1) == best_B).double().cpu().numpy()
        kl_B = (dense_BC.exp() * (dense_BC - logp_BC)).sum(-1).double().cpu().numpy()
    return Scores(batch.example_B, right_B, np.ones(len(right_B)), agreement_B, kl_B)


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
