"""The project's speed targets, measured: every row beside its target and the bound, as a Markdown table.

    make bench                                             everything, about half an hour on two cores
    python tests/benchmarks/bench_targets.py --only "all on,decode" --seconds 20
    python tests/benchmarks/bench_targets.py --only none --runs RUN RUN     converted models, with their own routers
    ... --threads 1 --clock cpu                            on a machine that others use as well

Dense and MoE take turns in one process; dense is the stock module. A figure is the median of paired ratios (in brackets its quartiles),
its bound what arithmetic and bytes allow. One-layer rows come from `bench_layer` (cold weights, linear router), the others from
`moefication bench`. Exit code 1 where a row misses its target.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_layer
import torch

RELU, SWIGLU = ("t5-base", "bert-large"), ("llama-7b",)
SMALL = ("t5-base/16", "t5-base/8", "bert-large/16", "bert-large/8", "llama-7b/16")


@dataclass(frozen=True)
class Target:
    """At least `times` dense, and at least `of_bound` of the bound."""

    times: float = 0.0
    of_bound: float = 0.0

    def __str__(self) -> str:
        return f"{self.times:g}x" if self.times else f"{self.of_bound:.0%} of the bound" if self.of_bound else "-"


@dataclass(frozen=True)
class Layer:
    """A row of `bench_layer`."""

    what: str
    target: Target
    cases: tuple[str, ...]
    tokens: tuple[int, ...]
    fraction: float = 0.2
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Command:
    """Rows of one `moefication bench` command."""

    what: str
    target: Target
    words: str


BERT = "--shape bert-large --mode prefill --batch 8 --seq 128 --fractions 0.25"
T5, OPT = "--shape t5-base --fractions 0.2", "--shape opt-1.3b --mode decode --fractions 0.2"
ROWS: list[Layer | Command] = [
    Layer("one token, ReLU", Target(times=8), RELU, (1,)),
    Layer("one token, SwiGLU", Target(of_bound=0.85), SWIGLU, (1,)),
    Layer("few tokens", Target(times=1.5), RELU + SWIGLU, (8, 64)),
    Layer("512 tokens", Target(times=3.5), RELU + SWIGLU, (512,)),
    Layer("2048 tokens", Target(times=3.8), RELU + SWIGLU, (2048,)),
    Layer("small experts", Target(of_bound=0.6), SMALL, (1, 8, 64, 512)),
    Layer("all on", Target(times=0.95), (*RELU, *SWIGLU, "small-384", "small-64"), (1, 8, 64, 512), fraction=1.0),
    Layer("bfloat16", Target(), RELU + SWIGLU, (1, 8, 64, 512), dtype=torch.bfloat16),
    Command("bert-large, whole model", Target(times=1.65), BERT),
    Command("bert-large, experts of 8", Target(of_bound=0.6), BERT + " --expert-size 8"),
    Command("t5-base encoder", Target(of_bound=0.85), T5 + " --mode prefill --batch 8 --seq 128"),
    Command("t5-base decode", Target(of_bound=0.85), T5 + " --mode decode"),
    Command("t5-base decode, experts of 8", Target(of_bound=0.6), T5 + " --mode decode --expert-size 8"),
    Command("opt-1.3b decode", Target(times=1.65), OPT),
    Command("opt-1.3b decode, experts of 16", Target(of_bound=0.6), OPT + " --expert-size 16"),
]


def layer_rows(row: Layer, seconds: float, clock: str) -> Iterator[dict[str, Any]]:
    """Measures every case at every number of tokens."""
    for case in bench_layer.CASES:
        for tokens in row.tokens if case.name in row.cases else ():
            found = bench_layer.row(case, tokens, row.fraction, row.dtype, "auto", 2000, seconds, clock)
            yield {"row": f"{row.what}: {case.name}, {tokens} tokens", **found}


def command_rows(row: Command, seconds: float, clock: str) -> Iterator[dict[str, Any]]:
    """Runs `moefication bench` in a process of its own, so that a large model is gone afterwards."""
    options = ["--json", "--seconds", str(seconds), "--clock", clock, "--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "moefication_cli", "bench", *row.words.split(), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    for each in found["rows"]:
        where = f", {each['tokens']} tokens" if each["mode"] == "ffn" else ""
        yield {"row": f"{row.what}: {each['mode']}{where}", **each}
    for memory in found["memory"]:
        if memory["of"] == "model":
            what = f"{row.what}: memory of the loaded MoE over dense (at most 1.05)"
            yield {"row": what, "speedup": memory["ratio"], "memory": True}


def reached(row: dict[str, Any], target: Target) -> bool | None:
    """Whether the measured row is as good as asked; None where nothing was asked."""
    if row.get("memory"):
        return bool(row["speedup"] <= 1.05)
    if not target.times and not target.of_bound:
        return None
    return bool(row["speedup"] >= max(target.times, target.of_bound * row["bound"]))


def line(row: dict[str, Any], target: Target) -> str:
    """One row of the table."""
    verdict = {True: "reached", False: "**missed**", None: "reported"}[reached(row, target)]
    if row.get("memory"):
        return f"| {row['row']} | | | {row['speedup']:.3f}x | | {verdict} |"
    spread = f"{row['speedup']:.2f}x ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})"
    return (
        f"| {row['row']} | {1e3 * row['dense_seconds']:.3g} | {1e3 * row['moe_seconds']:.3g} | {spread} "
        f"| {row['bound']:.2f}x | {target}: {verdict} |"
    )


def main() -> None:
    """Measures the rows asked for; a table on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma list of words; rows whose name has one of them")
    parser.add_argument("--runs", nargs="*", default=[], help="converted runs to bench as well")
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    words = [word for word in options.only.split(",") if word]
    rows = [row for row in ROWS if not words or any(word in row.what for word in words)]
    rows += [Command(f"run {Path(run).name}", Target(times=1), run) for run in options.runs]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{torch.get_num_threads()} threads, {options.clock} clock, torch {torch.__version__}{load}\n")
    print("| row | dense ms | MoE ms | speed-up (quartiles) | bound | target |\n|---|---|---|---|---|---|")
    missed = False
    torch.manual_seed(0)
    for row in rows:
        for found in (layer_rows if isinstance(row, Layer) else command_rows)(row, options.seconds, options.clock):  # type: ignore[operator]
            print(line(found, row.target), flush=True)
            missed |= reached(found, row.target) is False
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
