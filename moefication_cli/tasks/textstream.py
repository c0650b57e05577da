"""Documents as one stream of tokens, from any point of the data, in bounded memory.

Documents are joined by the tokenizer's end token. Text is tokenised in pieces of about a megabyte; a longer document is
cut between words, where the pieces have the tokens of the whole. Blank rows that are documents are skipped.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.reading import Rows

PIECE = 1 << 20  # characters tokenised at once
_SNAP = 64  # characters within which a start in mid-text moves to the next word
_PROBES = 16  # places looked at to estimate bytes per token


@dataclass(frozen=True)
class TextStream:
    """The text of `rows` under a tokenizer, as tokens."""

    rows: Rows
    tokenizer: Any
    piece: int = PIECE

    @cached_property
    def field(self) -> str:
        """The one text field. ConfigError for a pair."""
        names = self.rows.require_text()
        if len(names) > 1:
            raise ConfigError(
                f"language modelling reads one field, not {', '.join(names)}", "name one with --text-field"
            )
        return names[0]

    @cached_property
    def separator(self) -> list[int]:
        """The end token between documents; nothing if the tokenizer has none."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            if token is not None:
                return [int(token)]
        return []

    @cached_property
    def _texts(self) -> Any:
        return self.rows.dataset.select_columns([self.field])

    @cached_property
    def row_ends(self) -> npt.NDArray[np.int64]:
        """Byte at which each row's text ends, counted over the whole data; reads offsets only, no text."""
        column = self._texts.data.column(self.field)
        lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy()
        return np.cumsum(lengths, dtype=np.int64)

    @cached_property
    def drops_space(self) -> bool:
        """Whether a text's first word is read as if a space stood before it (SentencePiece), not by its own (GPT-2)."""
        whole, first, second = self.tokenizer(["a b", "a", "b"], add_special_tokens=False)["input_ids"]
        return bool(whole == first + second)

    def tokens(self, byte: int = 0, piece: int | None = None) -> Iterator[list[int]]:
        """Token ids from a byte of the data to its end, some at a time; a start in mid-text moves to the next word."""
        row, offset = self._place(byte) if byte else (0, 0)
        size = piece or self.piece
        joint: list[int] = []
        pending: list[tuple[str, bool]] = []
        held = 0
        for text, fresh in _pieces(self._segments(row, offset, size), size, self.drops_space):
            pending.append((text, fresh))
            held += len(text)
            if held >= size:
                yield from self._tokenise(pending, joint)
                pending, held, joint = [], 0, self.separator
        if pending:
            yield from self._tokenise(pending, joint)

    def bytes_per_token(self, seed: int) -> float:
        """Estimated at places spread over the data."""
        total = int(self.row_ends[-1])
        rng = np.random.default_rng(seed)
        num_bytes = num_tokens = 0
        for start in rng.integers(total, size=_PROBES):
            text, _ = next(_pieces(self._segments(*self._place(int(start)), 1000), 1000, False), ("", True))
            num_bytes += len(text[:1000].encode())
            num_tokens += len(self.tokenizer(text[:1000], add_special_tokens=False, verbose=False)["input_ids"])
        return num_bytes / max(1, num_tokens)

    def _place(self, byte: int) -> tuple[int, int]:
        row = int(np.searchsorted(self.row_ends, byte, side="right"))
        return row, byte - (int(self.row_ends[row - 1]) if row else 0)

    def _tokenise(self, pieces: list[tuple[str, bool]], joint: list[int]) -> Iterator[list[int]]:
        """`joint` stands before the first piece if it starts a document; later ones have the separator."""
        texts = [text for text, _ in pieces]
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for ids, (_, fresh) in zip(found, pieces, strict=True):
            yield [*joint, *ids] if fresh else ids
            joint = self.separator

    def _segments(self, row: int, offset: int, size: int) -> Iterator[tuple[str, bool]]:
        """(text of a row, whether its document ends there) from a place on; few rows at a time if little is wanted."""
        starts = self.rows.document_starts
        last_rows = None if starts is None else {*(starts[1:] - 1).tolist(), self.rows.num_rows - 1}
        block = 16
        while row < self.rows.num_rows:
            texts = self._texts[row : row + block][self.field]
            for i, text in enumerate(texts, start=row):
                text = text or ""
                if offset:
                    text = _from_word(text.encode()[offset:].decode(errors="ignore"), self.drops_space)
                    offset = 0
                yield text, last_rows is None or i in last_rows
            row += block
            block = min(4 * block, 1000 if size > 100_000 else 64)


def _pieces(segments: Iterable[tuple[str, bool]], size: int, drops_space: bool) -> Iterator[tuple[str, bool]]:
    """(up to `size` characters of one document, whether the document starts there); blank documents left out."""
    parts: list[str] = []
    held, fresh = 0, True
    for text, ends in segments:
        parts.append(text)
        held += len(text)
        if held > size:
            text, start = "".join(parts), 0
            while len(text) - start > size:
                cut = _cut(text, start, size)
                yield text[start:cut], fresh
                start, fresh = cut + (drops_space and text[cut] == " "), False
            parts = [text[start:]]
            held = len(parts[0])
        if ends:
            whole = "".join(parts)
            if whole.strip() or (whole and not fresh):
                yield whole, fresh
            parts, held, fresh = [], 0, True
    whole = "".join(parts)
    if whole.strip():
        yield whole, fresh


def _cut(text: str, start: int, size: int) -> int:
    """Where to cut text[start:]: before the last single space that starts a word, else after a line end, else anywhere.

    Byte-level tokenizers take a space to its word and the blanks before it as a token of their own, so nothing changes.
    """
    end = start + size
    while (end := text.rfind(" ", start + 1, end)) > 0:
        if not text[end + 1].isspace():
            return end
    line = text.rfind("\n", start, start + size)
    return line + 1 if line >= 0 else start + size


def _from_word(text: str, drops_space: bool) -> str:
    """The text from its next word on, if that is near; with its space where the tokenizer reads the space."""
    for i, letter in enumerate(text[:_SNAP]):
        if letter.isspace():
            return text[i + (drops_space or letter != " ") :]
    return text
