"""What a native format costs in quality beside its speed: plans for formats beside the free plan, on a trained model.

    python tests/benchmarks/bench_formats.py [--fraction 0.25] [--finetune 300] [--cases free,mixtral,gguf] [--out DIR]

`llama-stories260k` (SwiGLU, d 64, F 172), calibrated on its training text and measured on the valid text. Every row is a
`moefication run`, with and without `--finetune`. Prints Markdown; a killed benchmark goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL, TRAIN, VALID = "models/llama-stories260k", "data/stories/train.txt", "data/stories/valid.txt"
# name -> (router, options): formats without shared experts, with one of a quarter of what is computed, and llama.cpp's larger experts
CASES: dict[str, tuple[str, list[str]]] = {
    "free": ("regression", []),
    "mixtral": ("native", ["--for", "mixtral"]),
    "qwen2_moe": ("native", ["--for", "qwen2_moe", "--shared-fraction", "0.0698"]),
    "gguf": ("native", ["--for", "gguf", "--fraction-of", "neurons"]),  # one expert of four and its router are 0.258
}
HEAD = (
    "| plan | fine-tuned | experts | neurons | always on | k | FFN FLOPs | perplexity / dense | agreement | KL |\n"
    + "|---" * 10
    + "|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--fraction", default="0.25")
    parser.add_argument("--finetune", default="300", help="steps")
    parser.add_argument("--limit", help="measure on at most so many windows")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[3] / "shared")
    parser.add_argument("--out", type=Path, default=Path("artifacts/formats"))
    args = parser.parse_args()
    print(HEAD)
    for name in args.cases.split(","):
        for steps in ("0", args.finetune):
            print(row(name, steps, run(name, steps, args)), flush=True)


def run(name: str, steps: str, args: argparse.Namespace) -> dict[str, Any]:
    router, words = CASES[name]
    command = [
        sys.executable, "-m", "moefication_cli", "run", str(args.out / name), "--model", str(args.shared / MODEL),
        "--data", str(args.shared / TRAIN), "--eval-data", str(args.shared / VALID), "--documents", "line", *words,
        "--fraction", args.fraction, "--fractions", args.fraction, "--selection", router, "--finetune", steps,
        "--name", f"finetune-{steps}", "--json",
    ]  # fmt: skip
    if args.limit:
        command += ["--eval-limit", args.limit]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def row(name: str, steps: str, found: dict[str, Any]) -> str:
    (mine,) = [entry for entry in found["rows"] if entry["applied"]]
    layers = found["stages"]["apply"]["metrics"]["layers"]
    kept = steps != "0" and found["stages"]["finetune"]["kept"]

    def said(key: str) -> str:
        values = sorted({layer[key] for layer in layers}, key=str)
        return "varies" if len(values) > 1 else "thresholds" if values[0] is None else str(values[0])

    tuned = "-" if steps == "0" else f"{steps} steps" if kept else "not kept"
    figures = f"{mine['ffn_flops_fraction']:.3f} | {mine['relative']:.2f}x | {mine['agreement']:.3f} | {mine['kl']:.3f}"
    sizes = " | ".join(said(key) for key in ("num_experts", "expert_size", "always_on", "top_k"))
    return f"| {name} | {tuned} | {sizes} | {figures} |"


if __name__ == "__main__":
    main()
