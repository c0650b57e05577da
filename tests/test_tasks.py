"""Tasks: rows, labels, windows, prompts and scores, against slow direct computation on tiny models."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.tasks import stats
from moefication_cli.tasks.examples import Scores, TaskOptions, compare, length_limit, summarise
from moefication_cli.tasks.fields import class_labels
from moefication_cli.tasks.language import sample_windows
from moefication_cli.tasks.reading import load_rows, rows_from_texts
from moefication_cli.tasks.task import prepare
from moefication_cli.tasks.text2text import PRESETS
from moefication_cli.tasks.textstream import TextStream

WORDS = ["good", "bad", "film", "a", "the", "very", "dull", "sst2", "sentence:", "pos", "neg", "itive", "not", "_ent"]
# Every line is different, and blank lines, indents and runs of spaces are where cut text goes wrong
TEXT = "".join(f"Line {i} of  the text\n" + ("\n" if i % 5 == 0 else f"  indented, {i}\n") for i in range(400))


@pytest.fixture(scope="module")
def word_tokenizer():
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "</s>", "[UNK]", "[CLS]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A </s>", pair="[CLS] $A </s> $B:1 </s>:1", special_tokens=[("[CLS]", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def byte_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
        initializer_range=1.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=18, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def sst2(tmp_path):
    rows = [
        ("good film", 1),
        ("a very bad film", 0),
        ('"the film', 1),
        ("dull", 0),
        ("a good", 1),
        ("null", 0),
        ("NA", 1),  # words, not missing values
    ]
    path = tmp_path / "sst2" / "dev.tsv"
    path.parent.mkdir()
    path.write_text("sentence\tlabel\n" + "".join(f"{text}{' ' * (len(text) > 4)}\t{label}\n" for text, label in rows))
    return path


def all_tokens(stream):
    return list(itertools.chain.from_iterable(stream.tokens()))


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits


# ---------------------------------------------------------------------------------------------------- data


def test_tsv_keeps_quotes_and_words_that_look_missing(sst2):
    rows = load_rows(sst2)
    assert rows.num_rows == 7 and rows.text_fields == ("sentence",) and rows.label_field == "label"
    assert [text for (text,) in rows.take(["sentence"], np.array([6, 2, 5]))] == ["NA", '"the film ', "null"]
    assert any("'sentence'" in note for note in rows.notes)


def test_no_header_takes_column_numbers(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text('gj04\t1\t\tHe said "go.\ngj04\t0\t*\tGo he.\n')
    rows = load_rows(path, header=False, text_field="3", label_field="1")
    assert rows.num_rows == 2 and rows.fields == ["0", "1", "2", "3"]
    assert rows.take(["3", "1"], np.array([0])) == [('He said "go.', "1")]
    with pytest.raises(ConfigError, match="no field '3'") as caught:
        load_rows(path, text_field="3")
    assert "--no-header" in caught.value.hint
    with pytest.raises(ConfigError, match="looks like the text"):
        load_rows(path).require_text()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_formats(tmp_path, suffix):
    items = [
        {"premise": 'a "b", c', "hypothesis": "d", "label": "x"},
        {"premise": "e", "hypothesis": "f", "label": "y"},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text('premise,hypothesis,label\n"a ""b"", c",d,x\ne,f,y\n')
    elif suffix == "parquet":
        import datasets

        datasets.Dataset.from_list(items).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, items)) if suffix == "jsonl" else json.dumps(items))
    rows = load_rows(path)
    assert rows.text_fields == ("premise", "hypothesis") and rows.label_field == "label"
    assert rows.take(["premise", "hypothesis", "label"], np.arange(2)) == [tuple(item.values()) for item in items]


def test_folder_takes_the_split_that_fits_the_purpose(sst2):
    (sst2.parent / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    assert load_rows(sst2.parent).num_rows == 1
    assert load_rows(sst2.parent, purpose="evaluate").num_rows == 7
    assert load_rows(sst2.parent, split="validation").files == (sst2,)
    with pytest.raises(ConfigError, match="no file of split 'test'"):
        load_rows(sst2.parent, split="test")


def test_bad_data_is_one_sentence(tmp_path, sst2, capfd):
    def refused(name, match, content=None, **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            load_rows(path, **options)

    refused("missing.tsv", "not found")
    refused("empty.tsv", "is empty", b"")
    refused("header.tsv", "is empty", b"sentence\tlabel\n")
    refused("wide.tsv", "names 2 columns, the next line has 3", b"sentence\tlabel\na\tb\t1\n")
    refused("ragged.tsv", "cannot be read", b"sentence\tlabel\na\t1\nb\t1\t2\n")
    refused("bytes.tsv", "cannot be read", b"sentence\tlabel\n\xff\xfe\t1\n")
    refused("broken.jsonl", "cannot be read", b'{"text": "a"}\n{"text": \n')
    refused("torn.parquet", "cannot be read", b"PAR1 and then nothing")
    refused("rows.xlsx", "unknown kind", b"x")
    refused("numbers.jsonl", "holds int64, not text", b'{"text": 3}\n')
    refused("sst2/dev.tsv", "no field 'sentense'", text_field="sentense")
    refused("sst2/dev.tsv", "no label field 'y'", label_field="y")
    with pytest.raises(ConfigError, match="names 3 fields"):
        load_rows(sst2, text_field="a,b,c")
    assert capfd.readouterr() == ("", "")


def test_unreachable_hub_is_an_error_at_once(monkeypatch):
    import socket

    def no_network(*_args, **_options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        load_rows("glue/no_such_configuration")


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_by_name_number_and_usual_order():
    notes = []
    assert class_labels(["Positive", "negative "], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    assert class_labels(["1", "0"], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    assert class_labels([True, 0.0], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    # classes of the dataset in another order than the model's: names win over numbers
    assert class_labels([0, 1], ["b", "a"], "d", notes, dataset_names=["a", "b"]).tolist() == [1, 0]
    assert notes == []
    generic = ["LABEL_0", "LABEL_1", "LABEL_2"]
    found = class_labels(["neutral", "entailment", "contradiction"], generic, "d", notes)
    assert found.tolist() == [1, 0, 2] and "entailment, neutral, contradiction" in notes[0]
    assert class_labels(["z", "x", "y"], generic, "d", notes).tolist() == [2, 0, 1]


@pytest.mark.parametrize("labels", [["0", "2"], ["0", "-1"], ["negative", "meh"], ["0", ""], [0, None], ["LABEL", "0"]])
def test_label_outside_the_set_names_row_and_value(labels):
    outside = next(i for i, value in enumerate(labels) if value not in ("0", 0, "negative"))
    with pytest.raises(ConfigError, match=rf"row {outside + 1} has label {labels[outside]!r}"):
        class_labels(labels, ["negative", "positive"], "d", [])
    with pytest.raises(ConfigError, match="regression"):
        class_labels([0.5], ["negative", "positive"], "d", [])


# ---------------------------------------------------------------------------------------------------- classification


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


# ---------------------------------------------------------------------------------------------------- text2text


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


# ---------------------------------------------------------------------------------------------------- language


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
    with pytest.raises(ConfigError, match="is empty"):
        rows_from_texts([])


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


# ---------------------------------------------------------------------------------------------------- statistics


def test_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        interval = stats.bootstrap_ci(rng.normal(1.0, 1.0, 60), seed, resamples=200)
        covered += interval.low <= 1.0 <= interval.high
    assert 84 <= covered <= 100  # 95 % nominal
    a = rng.normal(0.0, 10.0, 500)
    better = stats.paired_bootstrap(a + 0.1, a, 0, resamples=200)
    assert 0.09 < better.low <= better.value <= better.high < 0.11  # unpaired, the noise would hide it
    losses, weights = rng.uniform(50, 150, 40), np.full(40, 30.0)
    ppl = stats.bootstrap_ci(losses, 0, weights=weights, transform=stats.perplexity)
    assert ppl.value == pytest.approx(math.exp(losses.sum() / weights.sum())) and ppl.low < ppl.value < ppl.high
    assert stats.bootstrap_ci(losses, 3) == stats.bootstrap_ci(losses, 3) != stats.bootstrap_ci(losses, 4)
    assert stats.standard_error(np.ones(1)) is None
    with pytest.raises(ValueError, match="different lengths"):
        stats.paired_bootstrap(a, a[1:], 0)


# ---------------------------------------------------------------------------------------------------- real models


def evaluated(loader, folder, task, data, num_batches=None, batch_size=32, **load):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    examples = prepare(task, tokenizer, model.config, load_rows(data, purpose="evaluate", **load))
    batches = itertools.islice(examples.batches(batch_size), num_batches)
    return summarise(examples.metric, [examples.score(logits_of(model, b), b) for b in batches])


@pytest.mark.slow
def test_bert_accuracy_on_sst2(shared_dir):
    folder = shared_dir / "models/bert-relu-minilm-sst2"
    summary = evaluated(AutoModelForSequenceClassification, folder, "classification", shared_dir / "data/sst2")
    assert (summary.num_examples, round(summary.value * 872)) == (872, 770)


@pytest.mark.slow
def test_t5_accuracy_on_sst2(shared_dir):
    folder = shared_dir / "models/t5-relu-sst2"
    summary = evaluated(AutoModelForSeq2SeqLM, folder, "text2text", shared_dir / "data/sst2/dev.tsv")
    assert summary.value == pytest.approx(0.774, abs=5e-4)


@pytest.mark.slow
def test_opt_perplexity_on_wikitext2(shared_dir):
    data = shared_dir / "data/wikitext2/wiki.valid.txt"
    summary = evaluated(AutoModelForCausalLM, shared_dir / "models/opt-relu-wikitext2", "lm", data, 5, 16)
    assert summary.num_predictions == 80 * 255
    assert summary.value == pytest.approx(50.8, abs=0.05)


def test_llama_perplexity_on_stories(shared_dir):
    data = shared_dir / "data/stories/valid.txt"
    summary = evaluated(AutoModelForCausalLM, shared_dir / "models/llama-stories260k", "lm", data, 2, 8)
    assert 4.0 < summary.value < 7.0  # end tokens, which the model hardly knows, are predicted too


def test_real_glue_files_load(shared_dir):
    rte = load_rows(shared_dir / "data/rte/dev.tsv")
    assert (rte.num_rows, rte.text_fields, rte.label_field) == (277, ("sentence1", "sentence2"), "label")
    cola = load_rows(shared_dir / "data/cola/dev.tsv", header=False, text_field="3", label_field="1")
    assert cola.num_rows == 1043
    assert load_rows(shared_dir / "data/sst2").num_rows == 67349
