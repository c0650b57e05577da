"""Stock mixtures of experts with random weights under transformers' experts and under this package's kernels.

    python tests/benchmarks/bench_experts.py [--dtype float32|bfloat16] [--threads 1] [--clock cpu]

Two layers each of an OLMoE and of a Mixtral at an eighth of its size; further options go to `bench`.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers as tf

from moefication_cli.cli.app import main

_BASE = {
    "vocab_size": 1024,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = {
    "OLMoE-1B-7B, 2 of 16 layers": tf.OlmoeConfig(
        **_BASE, hidden_size=2048, intermediate_size=1024, num_attention_heads=16, num_experts=64, num_experts_per_tok=8
    ),
    "Mixtral of width 512, 2 layers": tf.MixtralConfig(
        **_BASE, hidden_size=512, intermediate_size=1792, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip


def run() -> None:
    """One table per shape on stdout."""
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(Path(folder) / "model")
            del model
            print(name, flush=True)
            sys.argv = ["moefication", "bench", "--experts", str(Path(folder) / "model"), *sys.argv[1:]]
            try:
                main()
            except SystemExit as done:
                if done.code:
                    raise
            sys.argv = [sys.argv[0], *sys.argv[4:]]


if __name__ == "__main__":
    run()
