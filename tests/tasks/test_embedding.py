"""Encoders as embedders: pooling, cosine to the dense model, and correlation with scores, against direct computation."""

import datasets
import numpy as np
import pytest
import torch
from texts import rows_from_texts
from transformers import BertConfig, BertModel

from moefication_cli.conversion.learnable import distance
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.runs.data import flat_predictions
from moefication_cli.tasks.examples import Scores, TaskOptions, compare, summarise
from moefication_cli.tasks.reading import Rows
from moefication_cli.tasks.stats import spearman
from moefication_cli.tasks.task import prepare

TEXTS = ["good film", "a very bad film", "the dull film", "good", "not good", "bad bad bad film", "a the very"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=1.0,
    )  # fmt: skip
    return BertModel(config).eval()


def embedded(tokenizer, model, texts, pooling):
    """One text at a time, so without padding."""
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return torch.stack([state.mean(0) if pooling == "mean" else state[0] for state in states])


def pairs(scores, label="score"):
    first, second = TEXTS[:6], [*TEXTS[1:6], TEXTS[0]]
    data = {"sentence1": first, "sentence2": second, label: scores}
    return Rows(datasets.Dataset.from_dict(data), ("sentence1", "sentence2"), label, source="pairs")


def answers(model, batch):
    with torch.no_grad():
        return batch.answers(model(**batch.inputs))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_and_their_cosine_against_direct_computation(word_tokenizer, encoder, pooling):
    examples = prepare(
        "embedding", word_tokenizer, encoder.config, rows_from_texts(TEXTS), TaskOptions(pooling=pooling)
    )
    expected = embedded(word_tokenizer, encoder, TEXTS, pooling)
    other = embedded(word_tokenizer, encoder, TEXTS, {"mean": "cls", "cls": "mean"}[pooling])
    parts, own = [], []
    torch.manual_seed(1)
    for batch in examples.batches(3):
        found = answers(encoder, batch)
        assert torch.allclose(found, expected[batch.example_B], atol=1e-5)  # padding does not count
        assert not torch.allclose(found, other[batch.example_B], atol=1e-2)  # negative control
        changed = found + 0.3 * torch.randn_like(found)
        own.append(examples.score(found, batch))
        parts.append(compare(examples, found, changed, batch))
        cosine = torch.nn.functional.cosine_similarity(found.double(), changed.double())
        np.testing.assert_allclose(parts[-1].value_B, cosine, atol=1e-9)
        np.testing.assert_allclose(parts[-1].kl_B, 1 - cosine, atol=1e-9)
        assert float(
            distance(flat_predictions(found, batch), flat_predictions(changed, batch), batch)
        ) == pytest.approx(float((1 - cosine).mean()), abs=1e-5)  # what is trained on is what is scored
        whole = torch.cat([answers(encoder, piece) for piece in batch.pieces(6)])
        assert torch.allclose(whole, found, atol=1e-5)
    summary = summarise(examples.metric, parts)
    assert (summary.metric, summary.num_examples, summary.agreement) == ("cosine", len(TEXTS), None)
    assert 0 < summary.value < 1 and summary.kl == pytest.approx(1 - summary.value)
    assert summarise(examples.metric, own).value == 1
    with pytest.raises(NonFiniteError):
        examples.score(found * float("nan"), batch)


def test_pairs_with_scores_give_a_rank_correlation(word_tokenizer, encoder):
    scores = [4.0, 0.5, 1.0, 4.0, 2.5, 3.0]
    first = embedded(word_tokenizer, encoder, TEXTS[:6], "mean")
    cosine = torch.nn.functional.cosine_similarity(first, first.roll(-1, 0)).double().numpy()
    ranks = [np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x]) for x in (cosine, np.array(scores))]
    expected = np.corrcoef(*ranks)[0, 1]
    for given in (scores, [str(score) for score in scores]):  # a .tsv holds text
        for size in (1, 4, 100):
            examples = prepare("embedding", word_tokenizer, encoder.config, pairs(given))
            found = [compare(examples, a := answers(encoder, b), a, b) for b in examples.batches(size)]
            summary = summarise(examples.metric, found)
            assert summary.metric == "spearman" and summary.value == pytest.approx(expected, abs=1e-9)
            assert summary.stderr > 0 and summary.kl == 0
            np.testing.assert_allclose(Scores.join(found).value_B, cosine, atol=1e-5)
    # To calibrate, and where labels are classes, pairs are two texts each
    for examples in (
        prepare("embedding", word_tokenizer, encoder.config, pairs(scores), require_labels=False),
        prepare("embedding", word_tokenizer, encoder.config, pairs(["same", "other"] * 3, "label")),
    ):
        assert examples.metric == "cosine"
        (batch,) = examples.calibration(None, 0)
        assert len(batch.inputs["input_ids"]) == 12 and sorted(batch.example_B) == list(range(6))
    assert "holds classes" in examples.notes[0]


def test_rank_correlation_of_known_columns():
    assert spearman(np.array([1.0, 5, 9, 7]), np.array([10.0, 20, 90, 30]))[0] == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == (pytest.approx(-1), None)
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 3, 2, 4]))[0] == pytest.approx(0.948683, abs=1e-6)
    assert spearman(np.ones(5), np.arange(5.0))[0] == 0


def test_rows_without_text_are_left_out_and_said(word_tokenizer, encoder):
    rows = rows_from_texts(["good film", "", " \n", "bad"])
    examples = prepare("embedding", word_tokenizer, encoder.config, rows)
    assert [n for b in examples.batches(8) for n in b.example_B.tolist()] == [0, 3]
    assert "2 rows without text" in examples.notes[0]


def test_scores_that_are_none_are_refused(word_tokenizer, encoder):
    for rows, message in [
        (pairs(["1", "2", "high", "4", "5", "6"]), "row 3 has score 'high' in field 'score', which is not a number"),
        (pairs(["1", "nan", "3", "4", "5", "6"]), "row 2 has score 'nan'"),
        (pairs(["1", None, "3", "4", "5", "6"]), "row 2 has score None"),
        (pairs([2.0] * 6), "all scores are 2"),
        (rows_from_texts(["", " "]), "holds no text"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            prepare("embedding", word_tokenizer, encoder.config, rows)
        assert caught.value.hint
    with pytest.raises(ConfigError, match="3 pairs with scores are too few"):
        prepare("embedding", word_tokenizer, encoder.config, pairs([1.0, 2, 3, 4, 5, 6]), TaskOptions(limit=3))
