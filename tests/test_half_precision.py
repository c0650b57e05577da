"""Every stage in float32, bfloat16 and float16: checkpoints as they are published, computed in their own dtype."""

import random
from pathlib import Path

import pytest
import torch
from cli_runner import Runner
from tiny_models import READS_TARGETS, save_tiny

from moefication_cli import load
from moefication_cli.conversion import search
from moefication_cli.runs import data

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt", "llama", "t5", "bert"])
def test_all_stages(name: str, dtype: str, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, rows = tmp_path / "model", tmp_path / "run", tmp_path / "rows.tsv"
    save_tiny(name, model).to(getattr(torch, dtype)).save_pretrained(model)
    rng = random.Random(3)
    lines = [" ".join(f"w{rng.randrange(40)}" for _ in range(12)) for _ in range(200)]
    rows.write_text("sentence\tlabel\n" + "".join(f"{line}\t{number % 2}\n" for number, line in enumerate(lines)))
    words = ["--label-words", "w1,w2", "--prompt", "{sentence}"] if name in READS_TARGETS else []
    if name in ("opt", "llama"):
        rows = rows.with_suffix(".txt")
        rows.write_text("\n".join(lines))
        words = ["--max-length", 16]
    run_cli.ok(
        "collect-activations",
        run,
        "--model",
        model,
        "--data",
        rows,
        *words,
        "--dtype",
        dtype,
        "--storage-dtype",
        "float32",
    )
    run_cli.ok("split", run, "--expert-size", 4)
    run_cli.ok("train-router", run, "--epochs", 2)
    # On a CPU whole models are refined in float32 unless told otherwise; on CUDA in the checkpoint's dtype
    own = data.load_whole
    monkeypatch.setattr(search, "load_whole", lambda r, m, **_: own(r, m, dtype=dtype))
    run_cli.ok("apply", run, "--fraction", 0.5, "--refine", 8)
    selection = "groundtruth,neuron,random,static,paper,regression"
    found = run_cli.ok(
        "eval", run, "--data", rows, "--dtype", dtype, "--selection", selection, "--fractions", "0.3,1.0", "--limit", 40
    )
    kl = {(row["selection"], row["fraction"]): row["kl"] for row in found["rows"]}
    assert all(value < 5 for value in kl.values())  # NaN fails as well
    assert kl["groundtruth", 1.0] < 1e-3 and kl["neuron", 0.3] < kl["random", 0.3]
    assert load(run / "model", dtype=dtype, device="cpu").dtype == getattr(torch, dtype)
