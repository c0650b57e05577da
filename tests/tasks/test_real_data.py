"""Statistics, and the metrics of real models on real data."""

import itertools
import math

import numpy as np
import pytest
import torch
from texts import logits_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from moefication_cli.tasks import stats
from moefication_cli.tasks.examples import summarise
from moefication_cli.tasks.reading import load_rows
from moefication_cli.tasks.task import prepare


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
