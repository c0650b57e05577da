"""Words, text and rows that the tests of tasks share."""

import itertools

import datasets
import torch

from moefication_cli.tasks.reading import Rows

WORDS = ["good", "bad", "film", "a", "the", "very", "dull", "sst2", "sentence:", "pos", "neg", "itive", "not", "_ent"]
# Every line is different, and blank lines, indents and runs of spaces are where cut text goes wrong
TEXT = "".join(f"Line {i} of  the text\n" + ("\n" if i % 5 == 0 else f"  indented, {i}\n") for i in range(400))


def rows_from_texts(texts: list[str]) -> Rows:
    return Rows(datasets.Dataset.from_dict({"text": texts}), ("text",), source="data")


def all_tokens(stream):
    return list(itertools.chain.from_iterable(stream.tokens()))


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits
