"""Language modelling: windows and scores, against slow direct computation on tiny models."""

import math

import numpy as np
import pytest
import torch
from texts import TEXT, all_tokens, logits_of, rows_from_texts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    T5Config,
)

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.encoding import length_limit
from moefication_cli.tasks.examples import Scores, TaskOptions, compare, summarise
from moefication_cli.tasks.language import sample_windows
from moefication_cli.tasks.reading import load_rows
from moefication_cli.tasks.task import prepare
from moefication_cli.tasks.textstream import TextStream


@pytest.fixture
def text_rows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return load_rows(path)


@pytest.fixture(scope="module")
def space_tokenizer():
    """As SentencePiece does: a space is part of the next word, and one stands before the text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator([TEXT, "a b"], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("piece", [50, 300, 1 << 20])
@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
def test_cut_text_has_the_tokens_of_the_whole(text_rows, request, kind, piece):
    tokenizer = request.getfixturevalue(kind)
    stream = TextStream(text_rows, tokenizer, piece=piece)
    assert stream.drops_space == (kind == "space_tokenizer")
    assert all_tokens(stream) == tokenizer(TEXT)["input_ids"]


def test_documents_are_joined_by_the_end_token(tmp_path, byte_tokenizer):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\nthree\n")
    end = byte_tokenizer.eos_token_id
    one, two, three = (byte_tokenizer(t)["input_ids"] for t in ("one", "two", "three"))
    joined = [*one, end, *two, end, *three]
    for piece in (1, 1000):
        stream = TextStream(load_rows(path, documents="line"), byte_tokenizer, piece=piece)
        assert all_tokens(stream) == joined
    assert all_tokens(TextStream(rows_from_texts(["one", " ", "two", "three"]), byte_tokenizer)) == joined
    (tmp_path / "more").mkdir()
    for name, text in (("a", "one\n\n two"), ("b", "\n"), ("c", "three")):
        (tmp_path / "more" / f"{name}.txt").write_text(text)
    files = TextStream(load_rows(tmp_path / "more", documents="file"), byte_tokenizer)
    assert all_tokens(files) == [*byte_tokenizer("one\n\n two")["input_ids"], end, *three]


def test_what_a_document_is_gets_guessed_out_loud(tmp_path):
    story = "Once upon a time there was a cat. " * 12
    for name, text, mode in (("stories", f"{story}\n" * 5, "line"), ("wrapped", "A short line.\n" * 50, "file")):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        rows = load_rows(path)
        assert f"each {mode} is read as one document" in rows.notes[0]
        assert (rows.document_starts is None) == (mode == "line")


def test_perplexity_kl_and_agreement_against_direct_computation(text_rows, gpt2, byte_tokenizer, monkeypatch):
    options = TaskOptions(max_length=50)
    examples = prepare("lm", byte_tokenizer, gpt2.config, text_rows, options)
    ids = byte_tokenizer(TEXT)["input_ids"]
    monkeypatch.setattr("moefication_cli.tasks.language.chunk_rows", lambda vocabulary: 7)
    torch.manual_seed(2)
    losses, divergences, agreements, parts = [], [], [], []
    for batch in examples.batches(4):
        dense = logits_of(gpt2, batch)
        other = dense + torch.randn_like(dense) * dense.std()
        parts.append(compare(examples, dense, other, batch))
        for number, row in zip(batch.example_B, range(len(dense)), strict=True):
            window = torch.tensor(ids[50 * number : 50 * number + 50])
            assert batch.inputs["input_ids"][row, : len(window)].tolist() == window.tolist()
            p = dense[row, : len(window) - 1].double().log_softmax(-1)
            q = other[row, : len(window) - 1].double().log_softmax(-1)
            losses += torch.nn.functional.nll_loss(q, window[1:], reduction="none").tolist()
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
            agreements += (p.argmax(-1) == q.argmax(-1)).tolist()
    summary = summarise("perplexity", parts)
    assert summary.num_predictions == len(losses) == len(ids) - math.ceil(len(ids) / 50)
    assert summary.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert summary.kl == pytest.approx(np.mean(divergences), rel=1e-4)
    assert summary.agreement == pytest.approx(np.mean(agreements)) and 0 < summary.agreement < 1
    with pytest.raises(NonFiniteError):
        examples.score(dense * float("inf"), batch)


def test_padding_does_not_change_a_windows_score(gpt2, byte_tokenizer):
    rows = rows_from_texts([TEXT[:600]])
    examples = prepare("lm", byte_tokenizer, gpt2.config, rows, TaskOptions(max_length=40))
    scores = [Scores.join([examples.score(logits_of(gpt2, b), b) for b in examples.batches(n)]) for n in (1, 100)]
    assert len(scores[0].value_B) > 2 and scores[0].weight_B[-1] < 39  # the last window is short, so padded
    np.testing.assert_allclose(scores[0].value_B, scores[1].value_B, rtol=1e-4)


def test_sampled_windows_are_uniform_over_the_whole_text(text_rows, byte_tokenizer):
    stream = TextStream(text_rows, byte_tokenizer)
    where = {tuple(byte_tokenizer(f" {i}")["input_ids"]): i for i in range(400)}
    assert len(where) == 400
    counts = np.zeros(8)
    for seed in range(60):
        found = sample_windows(stream, 32, [32] * 6, seed)
        assert [len(w) for w in found] == [32] * 6
        for window in found:
            line = int(byte_tokenizer.decode(window).split("Line ")[1].split()[0])
            counts[min(line // 50, 7)] += 1
    assert ((counts - 45) ** 2 / 45).sum() < 24.3  # chi square, 7 degrees of freedom, one in a thousand
    assert sample_windows(stream, 32, [32] * 6, 5) == sample_windows(stream, 32, [32] * 6, 5)


def test_sampling_keeps_to_max_tokens_and_gives_all_there_is(text_rows, gpt2, byte_tokenizer):
    examples = prepare("lm", byte_tokenizer, gpt2.config, text_rows)
    assert sum(b.num_tokens for b in examples.calibration(1000, 0)) == 1000
    total = len(byte_tokenizer(TEXT)["input_ids"])
    assert sum(b.num_tokens for b in examples.calibration(10 * total, 0)) == total
    assert sum(b.num_tokens for b in examples.calibration(None, 0)) == total
    limited = prepare("lm", byte_tokenizer, gpt2.config, text_rows, TaskOptions(limit=5))
    assert sum(len(b.example_B) for b in limited.batches(2)) == 5
    assert sum(len(b.example_B) for b in limited.calibration(1000, 0)) == 5


def test_sampling_reads_little_of_large_data(byte_tokenizer, monkeypatch):
    rows = rows_from_texts([f"Document {i} says little.\n" * 40 for i in range(3000)])
    read = []
    call = byte_tokenizer.__class__.__call__

    def counted(self, text, *args, **options):
        read.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return call(self, text, *args, **options)

    monkeypatch.setattr(byte_tokenizer.__class__, "__call__", counted)
    found = sample_windows(TextStream(rows, byte_tokenizer), 64, [64] * 10, 0)
    assert sum(map(len, found)) == 640
    assert sum(read) < 0.05 * 3000 * 26 * 40


def test_multibyte_text_and_text_without_spaces(gpt2, byte_tokenizer):
    text = "猫は魚を食べる。" * 3000
    stream = TextStream(rows_from_texts([text]), byte_tokenizer, piece=1000)
    assert byte_tokenizer.decode(all_tokens(stream)) == text
    assert all(len(w) == 40 for w in sample_windows(stream, 40, [40] * 4, 0))


def test_language_refuses(t5, gpt2, byte_tokenizer):
    for texts in ([" \n"], ["", "\t"]):
        with pytest.raises(ConfigError, match="fewer than two tokens"):
            prepare("lm", byte_tokenizer, gpt2.config, rows_from_texts(texts))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        prepare("lm", byte_tokenizer, t5.config, rows_from_texts(["a"]))


def test_length_limit_knows_where_position_tables_start(byte_tokenizer):
    assert length_limit(GPT2Config(n_positions=2048), byte_tokenizer, None) == 512
    assert length_limit(BertConfig(max_position_embeddings=66, pad_token_id=1), byte_tokenizer, None) == 66
    from transformers import MptConfig, RobertaConfig

    assert length_limit(RobertaConfig(max_position_embeddings=66, pad_token_id=1), byte_tokenizer, None) == 64
    assert length_limit(T5Config(), byte_tokenizer, 700) == 700
    assert length_limit(MptConfig(max_seq_len=96), byte_tokenizer, None) == 96
    with pytest.raises(ConfigError, match="limit 96"):
        length_limit(MptConfig(max_seq_len=96), byte_tokenizer, 97)
    with pytest.raises(ConfigError):
        length_limit(T5Config(), byte_tokenizer, 1)
