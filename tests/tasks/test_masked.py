"""Masked language modelling: which positions are asked for, and scores against direct computation."""

import numpy as np
import pytest
import torch
from texts import TEXT, logits_of, rows_from_texts
from transformers import BertConfig, BertForMaskedLM

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.runs.data import flat_predictions
from moefication_cli.tasks.examples import NOT_ASKED, Scores, TaskOptions, compare, summarise
from moefication_cli.tasks.task import prepare


@pytest.fixture(scope="module")
def encoder_tokenizer(byte_tokenizer):
    """The byte-level one with an encoder's special tokens around each text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = byte_tokenizer.backend_tokenizer.__class__.from_str(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", cls_token="<cls>", sep_token="<end>", mask_token="<mask>"
    )
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<cls>", "<end>")]
    template = processors.TemplateProcessing(single="<cls> $A <end>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.fixture(scope="module")
def masked_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=330, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def masked(tokenizer, model, texts, **options):
    return prepare("mlm", tokenizer, model.config, rows_from_texts(texts), TaskOptions(**options))


def originals(batch):
    """The tokens before masking."""
    return torch.where(batch.labels_RT == NOT_ASKED, batch.inputs["input_ids"], batch.labels_RT)


def test_a_share_of_the_words_is_asked_for_by_the_published_rule(encoder_tokenizer, masked_bert):
    examples = masked(encoder_tokenizer, masked_bert, [TEXT] * 12, max_length=40)
    special = torch.tensor(encoder_tokenizer.all_special_ids)
    asked = words = read_mask = read_same = 0
    for batch in examples.batches(16):
        ids, labels, real = batch.inputs["input_ids"], batch.labels_RT, batch.inputs["attention_mask"].bool()
        is_word = real & ~torch.isin(originals(batch), special)
        at = labels != NOT_ASKED
        assert not (at & ~is_word).any()  # neither special tokens nor padding
        assert torch.equal(at.sum(1), (0.15 * is_word.sum(1).double()).round().clamp_min(1).long())
        asked, words = asked + int(at.sum()), words + int(is_word.sum())
        read_mask += int((ids[at] == encoder_tokenizer.mask_token_id).sum())
        read_same += int((ids[at] == labels[at]).sum())
        assert (ids[~at] != encoder_tokenizer.mask_token_id).all()
    assert asked > 3000 and asked / words == pytest.approx(0.15, abs=0.01)
    assert read_mask / asked == pytest.approx(0.8, abs=0.03)
    assert read_same / asked == pytest.approx(0.1, abs=0.03)  # the others read a random token


def test_windows_stand_between_special_tokens_and_hold_the_text(encoder_tokenizer, masked_bert):
    examples = masked(encoder_tokenizer, masked_bert, ["one two", "three"], max_length=64)
    (batch,) = examples.batches(4)
    first, last = encoder_tokenizer.cls_token_id, encoder_tokenizer.eos_token_id
    one, two = (encoder_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two", "three"))
    assert originals(batch)[0].tolist() == [first, *one, last, *two, last]


def test_masks_depend_on_the_seed_and_the_window_alone(encoder_tokenizer, masked_bert):
    def found(seed=0, batch_size=4, calibration=None, limit=None):
        examples = masked(encoder_tokenizer, masked_bert, [TEXT], max_length=40, seed=seed, limit=limit)
        batches = examples.batches(batch_size)
        if calibration is not None:
            batches = examples.calibration(400, calibration, batch_size)
        return {
            tuple(row.tolist()): (ids[: len(row)].tolist(), labels[: len(row)].tolist())
            for b in batches
            for row, ids, labels, real in zip(
                originals(b), b.inputs["input_ids"], b.labels_RT, b.inputs["attention_mask"].sum(1), strict=True
            )
            for row in [row[:real]]
        }

    whole = found()
    assert len(whole) > 50
    assert found(batch_size=7) == whole
    others = found(seed=1)
    assert others.keys() == whole.keys() and others != whole  # negative control
    for part in (found(calibration=1), found(calibration=2), found(limit=5)):
        same = part.keys() & whole.keys()
        assert all(part[window] == whole[window] for window in same)
    assert sum(len(window) for window in found(calibration=1)) <= 400


def test_loss_kl_and_agreement_against_direct_computation(encoder_tokenizer, masked_bert, monkeypatch):
    examples = masked(encoder_tokenizer, masked_bert, [TEXT], max_length=50)
    monkeypatch.setattr("moefication_cli.tasks.language.chunk_rows", lambda vocabulary: 3)
    torch.manual_seed(2)
    losses, divergences, agreements, parts = [], [], [], []
    for batch in examples.batches(4):
        dense = logits_of(masked_bert, batch)
        other = dense + torch.randn_like(dense) * dense.std()
        parts.append(compare(examples, dense, other, batch))
        at = batch.labels_RT != NOT_ASKED
        p, q = (logits[at].double().log_softmax(-1) for logits in (dense, other))
        losses += torch.nn.functional.nll_loss(q, batch.labels_RT[at], reduction="none").tolist()
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        agreements += (p.argmax(-1) == q.argmax(-1)).tolist()
        assert torch.equal(flat_predictions(other, batch), other[at])  # what is trained on is what is scored
        assert torch.equal(examples.targets(batch), batch.labels_RT[at])
        pieces = list(batch.pieces(50))
        assert torch.equal(torch.cat([piece.labels_RT for piece in pieces]), batch.labels_RT) and len(pieces) > 1
    summary = summarise(examples.metric, parts)
    assert (summary.metric, summary.num_predictions) == ("loss", len(losses))
    assert summary.value == pytest.approx(np.mean(losses), rel=1e-5)
    assert summary.kl == pytest.approx(np.mean(divergences), rel=1e-4)
    assert summary.agreement == pytest.approx(np.mean(agreements)) and 0 < summary.agreement < 1
    with pytest.raises(NonFiniteError):
        examples.score(dense * float("inf"), batch)


def test_padding_does_not_change_a_windows_score(encoder_tokenizer, masked_bert):
    examples = masked(encoder_tokenizer, masked_bert, [TEXT[:600]], max_length=40)
    scores = [Scores.join([examples.score(logits_of(masked_bert, b), b) for b in examples.batches(n)]) for n in (1, 99)]
    assert len(scores[0].value_B) > 2 and scores[0].weight_B[-1] < scores[0].weight_B[0]
    np.testing.assert_allclose(scores[0].value_B, scores[1].value_B, rtol=1e-4)


def test_what_cannot_be_masked_is_refused(encoder_tokenizer, byte_tokenizer, masked_bert):
    small = BertConfig(vocab_size=encoder_tokenizer.mask_token_id, max_position_embeddings=64)
    for tokenizer, config, texts, options, message in [
        (byte_tokenizer, masked_bert.config, [TEXT], {}, "has no mask token"),
        (encoder_tokenizer, small, [TEXT], {}, "has mask token .* and the model"),
        (encoder_tokenizer, masked_bert.config, ["a"], {}, "fewer than two tokens"),
        (encoder_tokenizer, masked_bert.config, ["<cls><end><cls>"], {}, "no word that could be masked"),
        (encoder_tokenizer, masked_bert.config, [TEXT], {"max_length": 3}, "--max-length 3 leaves no text"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            prepare("mlm", tokenizer, config, rows_from_texts(texts), TaskOptions(**options))
        assert caught.value.hint
