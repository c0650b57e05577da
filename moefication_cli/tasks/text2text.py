"""Text-to-text classification by label words (T5): the class whose word the decoder finds most probable.

Score of a class: summed log-probability of its word's tokens, the end token left out; the distribution over classes
(for KL) is their softmax. Prompts and words of the GLUE tasks: Raffel et al., T5 (arXiv 1910.10683), appendix D.
Label words of several tokens need several decoder inputs; prefixes share one, so words of one token cost one row per
example. Axes: R = B * J rows, J decoder inputs per example, C classes, L decoder positions, V vocabulary.
STS-B (a number as text) is not supported.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.classification import read_labels
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
from moefication_cli.tasks.examples import NOT_ASKED, Batch, Indices, Metric, Scores, TaskOptions, score_classes
from moefication_cli.tasks.reading import Rows

# (prompt, label words in label order)
PRESETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cola": ("cola sentence: {sentence}", ("unacceptable", "acceptable")),
    "sst2": ("sst2 sentence: {sentence}", ("negative", "positive")),
    "mrpc": ("mrpc sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent")),
    "qqp": ("qqp question1: {question1} question2: {question2}", ("not_duplicate", "duplicate")),
    "mnli": ("mnli hypothesis: {hypothesis} premise: {premise}", ("entailment", "neutral", "contradiction")),
    "qnli": ("qnli question: {question} sentence: {sentence}", ("entailment", "not_entailment")),
    "rte": ("rte sentence1: {sentence1} sentence2: {sentence2}", ("entailment", "not_entailment")),
    "wnli": ("wnli sentence1: {sentence1} sentence2: {sentence2}", ("not_entailment", "entailment")),
}


@dataclass(frozen=True)
class Prompt:
    """A template with `{field}` places, the fields that fill them (in the order of the places), and the label words."""

    template: str
    places: tuple[str, ...]
    fields: tuple[str, ...]
    words: tuple[str, ...]

    def fill(self, values: tuple[Any, ...]) -> str:
        """The prompt of one row. Fields are stripped: GLUE's sentences end in a space that is none of the prompt."""
        return self.template.format(**{p: str(v).strip() for p, v in zip(self.places, values, strict=True)})


def resolve_prompt(rows: Rows, options: TaskOptions, notes: list[str]) -> Prompt:
    """The prompt from `--prompt` (a template or a preset's name) or guessed from the data's name, and its fields.

    Places name fields; if they do not, `--text-field`s fill them in order. Raises ConfigError.
    """
    name = options.prompt
    if name is None:
        words = re.split(r"[^a-z0-9]+", rows.source.lower().replace("sst-2", "sst2"))
        name = next((preset for preset in (*PRESETS, "stsb") if preset in words), None)
        if name is None:
            example = '--prompt "sst2 sentence: {sentence}" --label-words negative,positive'
            hint = f"{example}, or --prompt {'|'.join(PRESETS)}"
            raise ConfigError("a text-to-text model needs a prompt", hint)
        notes.append(f"prompt and label words of {name} (--prompt)")
    if name.lower() in ("stsb", "sts-b"):
        raise ConfigError("STS-B asks for a number; text2text measures classification", "choose another task")
    template, preset_words = PRESETS.get(name.lower(), (name, ()))
    given = tuple(w.strip() for w in (options.label_words or "").split(",") if w.strip())
    label_words = given or preset_words
    if len(label_words) < 2 or len(set(label_words)) < len(label_words):
        raise ConfigError("text2text needs two or more different label words", "--label-words negative,positive")
    try:
        places = tuple(dict.fromkeys(p for _, p, _, _ in string.Formatter().parse(template) if p is not None))
    except ValueError as error:
        raise ConfigError(f"--prompt {template!r}: {error}", 'write it as "sst2 sentence: {sentence}"') from None
    if not places or not all(re.fullmatch(r"[^.\[\]]+", p) for p in places):
        raise ConfigError(f"--prompt {template!r} names no field", 'write it as "sst2 sentence: {sentence}"')
    fields = places
    if not set(places) <= set(rows.fields):
        fields = rows.text_fields
        if len(fields) != len(places):
            missing = next(p for p in places if p not in rows.fields)
            listed = ", ".join(map(repr, rows.fields))
            raise ConfigError(
                f"the prompt's {{{missing}}} is no field of {rows.source}", f"fields: {listed}; or --text-field"
            )
        if places != fields:
            notes.append(", ".join(f"{{{p}}} is field {f!r}" for p, f in zip(places, fields, strict=True)))
    rows.require_fields(fields)
    # Format fields may not be identifiers ("0"); numbering the places is safe for all of them
    for i, place in enumerate(places):
        template = template.replace("{" + place + "}", "{p" + str(i) + "}")
    return Prompt(template, tuple(f"p{i}" for i in range(len(places))), fields, label_words)


class Text2TextExamples:
    """Rows under a prompt with label words. See `examples.Examples`."""

    task = "text2text"
    metric: Metric = "accuracy"
    keeps_reference = True

    def __init__(
        self, tokenizer: Any, model_config: Any, rows: Rows, options: TaskOptions, require_labels: bool = True
    ) -> None:
        self._start = getattr(model_config, "decoder_start_token_id", None)
        if not getattr(model_config, "is_encoder_decoder", False) or self._start is None:
            raise ConfigError("text2text needs an encoder-decoder model", "use --task classification or lm")
        self.notes: list[str] = []
        self._tokenizer, self._rows, self._options = tokenizer, rows, options
        self.prompt = resolve_prompt(rows, options, self.notes)
        self._max_length = length_limit(model_config, tokenizer, options.max_length)
        self.word_tokens = [tokenizer(w, add_special_tokens=False)["input_ids"] for w in self.prompt.words]
        _check_words(self.prompt.words, self.word_tokens)
        self._decoder_inputs, self._input_of_class = _share_prefixes(self._start, self.word_tokens)
        self._pad = {"input_ids": padding_of(tokenizer), "decoder_input_ids": padding_of(tokenizer)}
        self._labels: Indices | None = None
        if require_labels or rows.label_field is not None:
            self._labels = read_labels(rows, list(self.prompt.words), self.notes)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Example-major: example b's decoder inputs are the rows b*J to b*J + J - 1."""
        per_example = len(self._decoder_inputs)
        size = max(1, checked_batch_size(batch_size) // per_example)
        for example_B, encoded in sorted_blocks(limited(self._rows.num_rows, self._options), self._encode, size):
            rows = [row | _decoder(ids) for row in encoded for ids in self._decoder_inputs]
            inputs = pad_batch(rows, self._pad)
            yield Batch(inputs, example_B, real_tokens(inputs))

    def calibration(self, max_tokens: int | None, seed: int, batch_size: int = 32) -> Iterator[Batch]:
        """The decoder reads the start token and the label's word, as in training; without labels the start token."""
        indices = sample_rows(self._rows.num_rows, self._encode, max_tokens, seed, self._options)
        for example_B, encoded in sorted_blocks(indices, self._encode, checked_batch_size(batch_size)):
            rows = [row | _decoder(self._target(int(i))) for i, row in zip(example_B, encoded, strict=True)]
            inputs = pad_batch(rows, self._pad)
            yield Batch(inputs, example_B, real_tokens(inputs))

    def targets(self, batch: Batch) -> Tensor:
        """The label's tokens; what would follow the last one is not asked for."""
        if self._labels is None:
            raise ConfigError(f"{self._rows.source}: no labels were read", "name the field with --label-field")
        real_RL = batch.inputs["decoder_attention_mask"].bool()
        next_RL = torch.full_like(batch.inputs["decoder_input_ids"], NOT_ASKED)
        next_RL[:, :-1] = batch.inputs["decoder_input_ids"][:, 1:].masked_fill(~real_RL[:, 1:], NOT_ASKED)
        return next_RL[real_RL]

    def reference(self, logits: Tensor, batch: Batch) -> Tensor:
        logits_BJLV = logits.reshape(len(batch.example_B), len(self._decoder_inputs), *logits.shape[1:])
        columns = []
        for tokens, j in zip(self.word_tokens, self._input_of_class, strict=True):
            logp_BLV = logits_BJLV[:, j, : len(tokens)].float().log_softmax(-1)
            ids_L = torch.tensor(tokens, device=logits.device)
            columns.append(logp_BLV.gather(-1, ids_L.expand(len(logp_BLV), -1)[..., None]).sum((1, 2)))
        return torch.stack(columns, -1).log_softmax(-1)

    def score(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Scores:
        if self._labels is None:
            raise ConfigError(f"{self._rows.source}: no labels were read", "name the field with --label-field")
        return score_classes(self.reference(logits, batch), self._labels[batch.example_B], batch, reference)

    def _encode(self, indices: Indices) -> list[Encoded]:
        values = self._rows.take(self.prompt.fields, indices)
        for row, value in zip(indices, values, strict=True):
            if not any(v is not None and str(v).strip() for v in value):
                raise ConfigError(f"{self._rows.source}: row {int(row) + 1} has no text", "remove the row")
        texts = [(self.prompt.fill(value),) for value in values]
        encoded = encode_texts(self._tokenizer, texts, indices, self._rows.source, self._max_length)
        return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in encoded]

    def _target(self, row: int) -> list[int]:
        word = self.word_tokens[self._labels[row]] if self._labels is not None else []
        return [int(self._start), *word]  # type: ignore[arg-type]


def _decoder(ids: list[int]) -> Encoded:
    return {"decoder_input_ids": ids, "decoder_attention_mask": [1] * len(ids)}


def _check_words(words: tuple[str, ...], tokens: list[list[int]]) -> None:
    for word, ids in zip(words, tokens, strict=True):
        if not ids:
            raise ConfigError(f"label word {word!r} has no token", "choose other --label-words")
    if len({tuple(ids) for ids in tokens}) < len(tokens):
        raise ConfigError(f"label words {', '.join(words)} have the same tokens", "choose other --label-words")


def _share_prefixes(start: int, tokens: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(decoder inputs, which of them holds each class): an input that begins another one is read off that one."""
    wanted = [[int(start), *ids[:-1]] for ids in tokens]
    kept: list[list[int]] = []
    for ids in sorted(wanted, key=len, reverse=True):
        if not any(longer[: len(ids)] == ids for longer in kept):
            kept.append(ids)
    return kept, [next(j for j, longer in enumerate(kept) if longer[: len(ids)] == ids) for ids in wanted]
