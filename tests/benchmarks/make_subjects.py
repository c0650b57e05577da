"""Trains the two subjects of `quality.md` that are not in shared/models: models that are not ReLU, larger than 260k parameters.

    python tests/benchmarks/make_subjects.py swiglu OUT     a Llama of 6.2 M parameters on WikiText-2
    python tests/benchmarks/make_subjects.py gelu OUT       bert-relu-minilm-sst2 with GELU put back, one epoch of SST-2
        [--shared ../shared] [--steps N] [--seed 0]

Training data only. Writes an ordinary model folder and OUT/subject.json: steps, tokens, seconds, loss or accuracy on the dev set.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

LENGTH = 256  # tokens of a window


class Rows(Dataset[dict[str, Any]]):
    """Examples made beforehand."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def windows(tokenizer: PreTrainedTokenizerBase, path: Path) -> Rows:
    """The text as windows of LENGTH tokens without overlap."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return Rows([{"input_ids": row, "labels": row} for row in cut])


def sentences(tokenizer: PreTrainedTokenizerBase, path: Path) -> Rows:
    """SST-2's lines as token ids and labels."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    ids = tokenizer([text for text, _ in lines], truncation=True, max_length=128)["input_ids"]
    return Rows([{"input_ids": row, "labels": int(label)} for row, (_, label) in zip(ids, lines, strict=True)])


def swiglu(shared: Path) -> tuple[Any, Any, Rows, Rows, dict[str, Any]]:
    """A new model, its tokenizer, training and dev rows, and how it is trained."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "opt-relu-wikitext2")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    train = windows(tokenizer, shared / "data" / "wikitext2" / "wiki.train.txt")
    dev = windows(tokenizer, shared / "data" / "wikitext2" / "wiki.valid.txt")
    how = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_steps": 1200, "weight_decay": 0.1}
    return LlamaForCausalLM(config), tokenizer, train, dev, how


def gelu(shared: Path) -> tuple[Any, Any, Rows, Rows, dict[str, Any]]:
    """The same for the classifier."""
    source = shared / "models" / "bert-relu-minilm-sst2"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, hidden_act="gelu", dtype=torch.float32)
    rows = [sentences(tokenizer, shared / "data" / "sst2" / name) for name in ("train.tsv", "dev.tsv")]
    how = {
        "learning_rate": 2e-5, "per_device_train_batch_size": 32, "num_train_epochs": 1, "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    return model, tokenizer, rows[0], rows[1], how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["swiglu", "gelu"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[3] / "shared")
    parser.add_argument("--steps", type=int, help="instead of 1,200 (swiglu) or one epoch (gelu)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, tokenizer, train, dev, how = (swiglu if options.subject == "swiglu" else gelu)(options.shared)
    if options.steps:
        how = how | {"max_steps": options.steps}
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"), save_strategy="no", report_to=[], logging_steps=50, warmup_steps=100,
        lr_scheduler_type="cosine", max_grad_norm=1.0, adam_beta2=0.95, bf16=True, seed=options.seed, disable_tqdm=True,
        per_device_eval_batch_size=32, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, **how,
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer) if options.subject == "gelu" else None
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=dev, data_collator=collate)
    start = time.monotonic()
    trainer.train()
    seconds = round(time.monotonic() - start)
    told = {"subject": options.subject, "steps": trainer.state.global_step, "seconds": seconds, "seed": options.seed}
    if options.subject == "swiglu":
        told["tokens"] = trainer.state.global_step * how["per_device_train_batch_size"] * LENGTH
        told["dev_perplexity"] = math.exp(trainer.evaluate()["eval_loss"])
    else:
        found = trainer.predict(dev)
        told["dev_accuracy"] = float((found.predictions.argmax(1) == found.label_ids).mean())
    model.float().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "subject.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
