"""What every task is made of: batches of model inputs, and scores of a model's logits per example.

`Examples` is the one interface stages use (`task.prepare` makes them). The forward pass is the caller's, the same for
the dense model and the MoE: `logits = batch.answers(model(**batch.inputs))`. Axes: B examples of a batch (rows of data, or
windows of text), C classes, T tokens, V vocabulary, R rows of a batch's tensors (B, or more per example in text2text).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.stats import Values, perplexity, spearman, standard_error

Metric = Literal["accuracy", "perplexity", "loss", "cosine", "spearman"]
LOWER_IS_BETTER: tuple[Metric, ...] = ("perplexity", "loss")
Indices = npt.NDArray[np.int64]
NOT_ASKED = -100  # in place of a label, as in torch's cross-entropy


@dataclass(frozen=True)
class TaskOptions:
    """How text becomes model input. `label_words`: a comma list in label order. `limit` examples, by `seed`.
    `pooling`: how an embedder's tokens become one vector.

    `rows`: only these rows of the data, ascending; not of text in windows.
    """

    max_length: int | None = None
    prompt: str | None = None
    label_words: str | None = None
    limit: int | None = None
    seed: int = 0
    rows: Indices | None = field(default=None, compare=False)
    pooling: Literal["mean", "cls"] = "mean"


@dataclass(frozen=True)
class Batch:
    """Model inputs on the CPU (or where `to` put them), right-padded: `model(**batch.inputs)`.

    `example_B` are row numbers of the data, or window numbers. `num_tokens` counts real tokens, of decoders too.
    `labels_RT`, of masked language models, is no input: the token to be found where one is asked for, else NOT_ASKED.
    `pool_RT`, of embedders, is none either: the weight of each token in its sequence's embedding.
    """

    inputs: dict[str, Tensor]
    example_B: Indices
    num_tokens: int
    labels_RT: Tensor | None = None
    pool_RT: Tensor | None = None

    def answers(self, outputs: Any) -> Tensor:
        """What is measured of a model's outputs: the logits, or of an embedder each sequence's embedding [R, D], float32."""
        if self.pool_RT is None:
            logits: Tensor = outputs.logits
            return logits
        hidden_RTD = outputs.last_hidden_state.float()
        return (self.pool_RT.to(hidden_RTD)[:, None] @ hidden_RTD).squeeze(1)

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
            rows_of = slice(start, start + size)
            part = {name: tensor[rows_of] for name, tensor in self.inputs.items()}
            labels_RT, pool_RT = (None if t is None else t[rows_of] for t in (self.labels_RT, self.pool_RT))
            piece = Batch(part, self.example_B[rows_of], 0, labels_RT, pool_RT)
            masks = [piece.mask_of("encoder"), piece.mask_of("decoder") if "decoder_input_ids" in part else None]
            yield replace(piece, num_tokens=sum(int(mask.sum()) for mask in masks if mask is not None))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved)


@dataclass(frozen=True)
class Scores:
    """One entry per example. Sums over the example's predictions: one of a class, or one per predicted token.

    `value_B`: right answers, or loss in nats; `weight_B`: predictions; `agreement_B`: predictions whose first choice is
    the dense model's; `kl_B`: KL(dense || this) in nats, or what stands in its place (`distance_name`). These two are None
    without a reference, agreement also of embeddings. `gold_B`, for a correlation, is what `value_B` should go along with.
    """

    example_B: Indices
    value_B: Values
    weight_B: Values
    agreement_B: Values | None = None
    kl_B: Values | None = None
    gold_B: Values | None = None

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
        optional = (joined([getattr(p, name) for p in parts]) for name in ("agreement_B", "kl_B", "gold_B"))
        return Scores(example_B, value_B, weight_B, *optional)


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

        NOT_ASKED where there is none. Raises ConfigError where the data has no labels.
        """
        ...

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `score` needs of the dense model: class log-probabilities [B, C], or the logits themselves for lm and mlm."""
        ...

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        """Per-example sums for one model; with the dense model's `reference` also agreement and KL."""
        ...


def distance_name(metric: str) -> str:
    """What `kl` is where this is the metric: embeddings have no distribution whose KL could be taken."""
    return "1 - cosine to dense" if metric in ("cosine", "spearman") else "KL(dense || converted)"


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
    if metric == "spearman":
        assert scores.gold_B is not None
        value, error = spearman(scores.value_B, scores.gold_B)
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
