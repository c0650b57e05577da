"""What `moefication run` keeps of the shared models at each compute, beside the published recipe and static pruning.

    python tests/benchmarks/bench_quality.py [bert opt t5 llama] [--shared ../shared] [--out DIR] [--fractions 0.1,0.2,0.3,0.5]
        [--data generated:131072] [--finetune STEPS] [--seed 0]

One run directory per model under --out; every fraction is a `run` of its own, so that the applied row is what a user gets.
Tuned on training data (or on --data, such as language models write themselves), measured on the dev sets. Prints one Markdown row
per model and fraction. A killed benchmark goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS: dict[str, tuple[str, str, str, list[str]]] = {
    "bert": ("bert-relu-minilm-sst2", "sst2/train.tsv", "sst2/dev.tsv", []),
    "t5": ("t5-relu-sst2", "sst2/train.tsv", "sst2/dev.tsv", ["--prompt", "sst2"]),
    "opt": ("opt-relu-wikitext2", "wikitext2/wiki.train.txt", "wikitext2/wiki.valid.txt", []),
    "llama": ("llama-stories260k", "stories/train.txt", "stories/valid.txt", ["--documents", "line"]),
}
HEAD = (
    "| model | FLOPs at most | spent | metric / dense | agreement | KL | KL of published recipe | KL of static pruning | "
    "KL below both (95 %) | whole-model speed-up |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[3] / "shared")
    parser.add_argument("--out", type=Path, default=Path("artifacts/quality"))
    parser.add_argument("--fractions", default="0.1,0.2,0.3,0.5")
    parser.add_argument("--data", help="calibration data instead of the model's training data")
    parser.add_argument("--finetune", type=int, default=0, help="fine-tune for so many steps and measure that")
    parser.add_argument(
        "--seed", type=int, default=0, help="of calibration data and training; another one wants another --out"
    )
    args = parser.parse_args()
    more = [*(["--data", args.data] if args.data else []), "--finetune", str(args.finetune), "--seed", str(args.seed)]
    print(HEAD)
    for name in args.models:
        for fraction in args.fractions.split(","):
            print(row(name, fraction, run(name, fraction, args.shared, args.out, more)), flush=True)


def run(name: str, fraction: str, shared: Path, out: Path, more: list[str]) -> dict[str, Any]:
    model, train, dev, extra = MODELS[name]
    command = [
        sys.executable, "-m", "moefication_cli", "run", str(out / name), "--model", str(shared / "models" / model),
        "--data", str(shared / "data" / train), "--eval-data", str(shared / "data" / dev), *extra,
        "--fraction", fraction, "--fractions", fraction, "--name", f"at-{fraction}", "--json", *more,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def row(name: str, fraction: str, found: dict[str, Any]) -> str:
    rows = {entry["selection"]: entry for entry in found["rows"]}
    mine = next(entry for entry in found["rows"] if entry["applied"])
    below = all(mine[f"kl_minus_{baseline}_interval"][1] < 0 for baseline in ("static", "paper"))
    return (
        f"| {name} | {fraction} | {mine['ffn_flops_fraction']:.3f} | {mine['relative']:.3f} | {mine['agreement']:.3f} | "
        f"{mine['kl']:.4f} | {rows['paper']['kl']:.4f} | {rows['static']['kl']:.4f} | {'yes' if below else 'no'} | "
        f"{mine['speedup']:.2f}x |"
    )


if __name__ == "__main__":
    main()
