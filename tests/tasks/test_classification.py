"""Classification and text to text: labels, prompts and scores, against slow direct computation on tiny models."""

import itertools
import math

import numpy as np
import pytest
import torch
from texts import logits_of, rows_from_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
)

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks.examples import Scores, TaskOptions, compare, summarise
from moefication_cli.tasks.reading import load_rows
from moefication_cli.tasks.task import prepare
from moefication_cli.tasks.text2text import PRESETS


def test_classification_scores_are_those_of_single_rows(sst2, bert, word_tokenizer):
    rows = load_rows(sst2)
    examples = prepare("classification", word_tokenizer, bert.config, rows)
    batches = list(examples.batches(3))
    assert sorted(np.concatenate([b.example_B for b in batches]).tolist()) == list(range(7))
    assert all(int(b.inputs["attention_mask"].sum()) == b.num_tokens for b in batches)
    scores = Scores.join([examples.score(logits_of(bert, b), b) for b in batches])
    right = []
    for text, label in rows.take(["sentence", "label"], np.arange(7)):  # one by one, no padding
        one = word_tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            right.append(float(bert(**one).logits.argmax() == int(label)))
    assert scores.value_B.tolist() == right and 0 < sum(right) < 7
    summary = summarise("accuracy", scores)
    assert summary.value == pytest.approx(np.mean(right)) and summary.agreement is None
    assert summary.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(7))


def test_agreement_and_kl_against_direct_computation(sst2, bert, word_tokenizer):
    examples = prepare("classification", word_tokenizer, bert.config, load_rows(sst2))
    torch.manual_seed(1)
    parts, agreements, divergences = [], [], []
    for batch in examples.batches(2):
        dense = logits_of(bert, batch)
        other = dense + torch.randn_like(dense) * dense.std()
        parts.append(compare(examples, dense, other, batch))
        p, q = dense.double().softmax(-1), other.double().softmax(-1)
        divergences += (p * (p / q).log()).sum(-1).tolist()
        agreements += (p.argmax(-1) == q.argmax(-1)).tolist()
    summary = summarise("accuracy", parts)
    assert summary.kl == pytest.approx(np.mean(divergences), rel=1e-4) and summary.kl > 0
    assert summary.agreement == pytest.approx(np.mean(agreements)) and summary.agreement < 1
    same = [compare(examples, logits, logits, b) for b in examples.batches(2) for logits in [logits_of(bert, b)]]
    assert (summarise("accuracy", same).agreement, summarise("accuracy", same).kl) == (1.0, 0.0)


def test_batch_order_and_scores_do_not_depend_on_batch_size(sst2, bert, word_tokenizer):
    examples = prepare("classification", word_tokenizer, bert.config, load_rows(sst2))
    order = [np.concatenate([b.example_B for b in examples.batches(n)]).tolist() for n in (1, 3, 7)]
    assert order[0] == order[1] == order[2] != list(range(7))  # sorted by length
    joined = [Scores.join([examples.score(logits_of(bert, b), b) for b in examples.batches(n)]) for n in (1, 7)]
    assert joined[0].value_B.tolist() == joined[1].value_B.tolist()


def test_pairs_carry_token_types(tmp_path, bert, word_tokenizer):
    path = tmp_path / "pairs.tsv"
    path.write_text("sentence1\tsentence2\tlabel\ngood film\tbad\tpositive\n")
    [batch] = prepare("classification", word_tokenizer, bert.config, load_rows(path)).batches(8)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 6, 1, 5, 1]]


def test_classification_refuses(tmp_path, sst2, bert, word_tokenizer):
    def refused(match, content=None, config=bert.config, options=None, **load):
        path = tmp_path / "bad.tsv"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=match):
            examples = prepare("classification", word_tokenizer, config, load_rows(path, **load), options)
            list(examples.batches(4))

    refused("row 2 has label '2'", "sentence\tlabel\ngood\t1\nbad\t2\n")
    refused("row 2 has no text", "sentence\tlabel\ngood\t1\n  \t0\n")
    refused("looks like the label", "sentence\tx\ngood\t1\n")
    refused("max-length 33", "sentence\tlabel\ngood\t1\n", options=TaskOptions(max_length=33))
    refused("regression head", config=BertConfig(num_labels=1))
    with pytest.raises(NonFiniteError):
        examples = prepare("classification", word_tokenizer, bert.config, load_rows(sst2))
        batch = next(examples.batches(4))
        examples.score(torch.full((4, 2), float("nan")), batch)


def test_text_shorter_than_a_token_is_named(bert):
    core = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(".")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    examples = prepare("classification", tokenizer, bert.config, rows_from_texts(["a", "..."]), require_labels=False)
    with pytest.raises(ConfigError, match="row 2 is shorter than a token"):
        list(examples.batches(4))


def test_calibration_rows_are_a_uniform_sample_of_the_whole(bert, word_tokenizer):
    rows = rows_from_texts(["good film"] * 200)  # four tokens each
    examples = prepare("classification", word_tokenizer, bert.config, rows, require_labels=False)
    counts = np.zeros(200)
    for seed in range(100):
        batches = list(examples.calibration(83, seed, batch_size=8))
        assert sum(b.num_tokens for b in batches) == 80  # never above 83
        counts[np.concatenate([b.example_B for b in batches])] += 1
    assert counts.sum() == 2000
    chi_square = ((counts - 10) ** 2 / 9).sum()  # binomial(100, 0.1) has variance 9
    assert 130 < chi_square < 280  # 199 degrees of freedom: mean 199, sd 20; the first 20 rows would give 20,000
    again = [b.example_B.tolist() for b in examples.calibration(83, 99, batch_size=8)]
    assert again == [b.example_B.tolist() for b in batches]
    order = [i for b in examples.calibration(83, 99, batch_size=3) for i in b.example_B.tolist()]
    assert order == list(itertools.chain(*again))


def test_limit_samples_uniformly(bert, word_tokenizer):
    rows = rows_from_texts(["good"] * 100)
    options = TaskOptions(limit=10, seed=3)
    examples = prepare("classification", word_tokenizer, bert.config, rows, options, require_labels=False)
    chosen = np.concatenate([b.example_B for b in examples.batches(4)])
    assert len(set(chosen.tolist())) == 10 and chosen.max() > 30
    assert sum(len(b.example_B) for b in examples.calibration(1000, 0)) == 10


@pytest.mark.parametrize("words", ["pos,neg", "not _ent,pos itive neg,pos"])
def test_label_words_are_scored_by_their_summed_log_probability(sst2, t5, word_tokenizer, words):
    sst2.write_text("sentence\tlabel\n" + "good film\t1\na very bad film\t0\nthe\t1\n")
    options = TaskOptions(prompt="sst2 sentence: {sentence}", label_words=words)
    examples = prepare("text2text", word_tokenizer, t5.config, load_rows(sst2), options)
    label_ids = [[word_tokenizer.vocab[w] for w in word.split()] for word in words.split(",")]
    for batch in examples.batches(4):
        found = examples.reference(logits_of(t5, batch), batch)
        for row, example in enumerate(batch.example_B):
            text = ["good film", "a very bad film", "the"][example]
            sums = []
            for ids in label_ids:  # one forward per class, nothing shared, nothing padded
                inputs = word_tokenizer("sst2 sentence: " + text, return_tensors="pt", return_token_type_ids=False)
                with torch.no_grad():
                    logits = t5(**inputs, decoder_input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0]
                sums.append(sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(ids)))
            expected = torch.tensor(sums).log_softmax(-1)
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
            assert expected.std() > 1e-4
    if words == "pos,neg":
        assert all(len(b.inputs["input_ids"]) == len(b.example_B) for b in examples.batches(4))


def test_calibration_decodes_the_label(sst2, t5, word_tokenizer):
    options = TaskOptions(prompt="{sentence}", label_words="neg,pos itive")
    examples = prepare("text2text", word_tokenizer, t5.config, load_rows(sst2), options, require_labels=False)
    ids = {w: word_tokenizer.vocab[w] for w in ("neg", "pos", "itive")}
    labels = [int(label) for (label,) in load_rows(sst2).take(["label"], np.arange(7))]
    for batch in examples.calibration(None, 0):
        for row, example in enumerate(batch.example_B):
            real = batch.inputs["decoder_attention_mask"][row].bool()
            wanted = [0, ids["pos"], ids["itive"]] if labels[example] else [0, ids["neg"]]
            assert batch.inputs["decoder_input_ids"][row][real].tolist() == wanted


def test_presets_are_guessed_and_prompts_checked(sst2, t5, gpt2, word_tokenizer, byte_tokenizer):
    rows = load_rows(sst2)
    examples = prepare("text2text", word_tokenizer, t5.config, rows, TaskOptions(label_words="neg,pos"))
    assert any("sst2" in note for note in examples.notes)
    filled = word_tokenizer.decode(next(examples.batches(7)).inputs["input_ids"][0])
    assert filled == "[CLS] sst2 sentence: a very bad film </s>"  # longest first
    assert set(PRESETS) == {"cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"}

    def refused(match, **options):
        with pytest.raises(ConfigError, match=match):
            prepare("text2text", word_tokenizer, t5.config, rows, TaskOptions(**options))

    refused("STS-B", prompt="stsb")
    refused(r"\{text\}|names no field", prompt="no place", label_words="neg,pos")
    refused(r"\{a\} is no field", prompt="{a} {b}", label_words="neg,pos")
    refused("two or more", prompt="{sentence}", label_words="pos")
    refused("same tokens", prompt="{sentence}", label_words="unknown,words")
    renamed = prepare("text2text", word_tokenizer, t5.config, rows, TaskOptions(prompt="{x}", label_words="neg,pos"))
    assert renamed.prompt.fields == ("sentence",)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        prepare("text2text", byte_tokenizer, gpt2.config, rows)
