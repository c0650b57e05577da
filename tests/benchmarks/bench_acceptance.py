"""The command line on four real models, stage by stage, against what the published code and the dense models do.

    python tests/benchmarks/bench_acceptance.py bert t5 opt llama          about half an hour on two cores
    python tests/benchmarks/bench_acceptance.py llama --out /tmp/x         a part; what is up to date is not done again

Everything goes through `python -m moefication_cli` as a user types it, apart from `load` and `generate`. Prints the rows of
every evaluation, then a table of checks; exits 1 if one fails. Needs the models and data of --shared. Paper settings:
balanced k-means, `mlp` router, 20 % of the neurons (arXiv 2110.01786). The published figures for BERT on SST-2 were made by
running its code on this very model: captured share of activation mass per layer and dev accuracy, 48 experts of 32.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PUBLISHED_SHARE = (0.498, 0.450, 0.448, 0.422, 0.368, 0.371)
PUBLISHED_ACCURACY, PUBLISHED_ORACLE, STDERR = 0.851, 0.850, 0.012
T5_ACCURACY, OPT_PERPLEXITY, OPT_WINDOWS, OPT_WINDOW = 0.774, 50.8, 80, 256
PAPER = ["--fraction-of", "neurons"]
KEYS = ("selection", "fraction", "value", "relative", "agreement", "kl", "active_fraction", "ffn_flops_fraction")

Json = dict[str, Any]


class Bench:
    """Runs commands, prints evaluations, collects checks."""

    def __init__(self, shared: Path, out: Path, seeds: int, tokens: int) -> None:
        self.models, self.data, self.out = shared / "models", shared / "data", out
        self.seeds, self.tokens = seeds, tokens
        self.checks: list[tuple[bool, str, str]] = []

    def cli(self, *words: object, code: int = 0) -> Json:
        """One command under --json; its object. Stops the benchmark where another exit code than `code` comes back."""
        done = subprocess.run(
            [sys.executable, "-m", "moefication_cli", *map(str, words), "--json", "--quiet"],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode != code:
            sys.exit(f"exit {done.returncode}, not {code}: moefication {' '.join(map(str, words))}")
        found: Json = json.loads(done.stdout)
        return found

    def check(self, what: str, good: bool, found: str) -> None:
        """One line of the final table."""
        self.checks.append((good, what, found))
        print(f"  {'ok  ' if good else 'FAIL'} {what}: {found}", flush=True)

    def rows(self, title: str, metrics: Json) -> dict[tuple[str, float], Json]:
        """Print an evaluation; its rows by selection and fraction."""
        dense = metrics["dense"]
        print(f"\n{title}: dense {dense['metric']} {dense['value']:.4f} on {metrics['examples']} examples")
        for row in metrics["rows"]:
            cells = (f"{row[k]:.4f}" if isinstance(row[k], float) else str(row[k]) for k in KEYS)
            print("  " + "  ".join(f"{cell:>11}" for cell in cells), flush=True)
        return {(row["selection"], row["fraction"]): row for row in metrics["rows"]}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the layer files of a stage."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("layer_*.safetensors"))}


def captured(found: Json, fraction: float) -> list[Json]:
    """Per layer, what router, oracle and random capture at this fraction."""
    layers = found["metrics"]["layers"]
    return [next(row for row in layer["captured"] if row["fraction"] == fraction) for layer in layers]


def paper_stages(bench: Bench, run: Path, data: Path, experts: int, seed: int, *evaluate: object) -> tuple[Json, Json]:
    """Stages after collect-activations at the published settings; (train-router, eval) of the `mlp` router."""
    bench.cli("build-graph", run)
    bench.cli("split", run, "--method", "kmeans", "--num-experts", experts, "--seed", seed)
    bench.cli("train-router", run, "--router", "similarity", "--seed", seed)
    trained = bench.cli("train-router", run, "--router", "mlp", "--seed", seed)
    bench.cli("apply", run, "--router", "mlp", "--fraction", 0.2, *PAPER, "--seed", seed)
    measured = bench.cli(
        "eval", run, "--data", data, "--fractions", 0.2, *PAPER, "--seed", seed, "--name", f"seed-{seed}",
        "--selection", "groundtruth,neuron,random,static,similarity,mlp", *evaluate,
    )  # fmt: skip
    return trained, measured


def bert(bench: Bench) -> None:
    """SST-2 with an encoder head: six commands for every seed, then `run` from nothing."""
    model, data = bench.models / "bert-relu-minilm-sst2", bench.data / "sst2"
    collect = ["--model", model, "--data", data / "train.tsv", "--no-sensitivity"]
    first = bench.out / "bert-0"
    bench.cli("collect-activations", first, *collect)
    shares, values, stages = [], [], {}
    for seed in range(bench.seeds):
        run = bench.out / f"bert-{seed}"
        if not run.exists():  # the same activations: a stage is its folder
            shutil.copytree(first / "activations", run / "activations", copy_function=os.link)
            shutil.copy(first / "run.json", run)
        trained, measured = paper_stages(bench, run, data / "dev.tsv", 48, seed)
        if seed == 0:
            stages = {name: digests(run / name) for name in ("activations", "split", "router/mlp")}
        rows = bench.rows(f"BERT SST-2, seed {seed}", measured)
        shares.append([row["router"] for row in captured(trained, 0.2)])
        values.append(rows["mlp", 0.2]["value"])
    dense = measured["dense"]["value"]
    bench.check("dense accuracy is 770 of 872", round(dense * 872) == 770, f"{dense * 872:.0f} of 872")
    worst = [min(column) for column in zip(*shares, strict=True)]
    bench.check(
        "captured share of mass at 20 %, every layer and seed, is at least the published code's",
        all(a >= b for a, b in zip(worst, PUBLISHED_SHARE, strict=True)),
        "lowest of the seeds " + ", ".join(f"{a:.3f} ({b:.3f})" for a, b in zip(worst, PUBLISHED_SHARE, strict=True)),
    )
    mean = statistics.mean(values)
    bench.check(
        f"accuracy with the mlp router, mean of seeds, is within two standard errors of {PUBLISHED_ACCURACY}, or above",
        mean >= PUBLISHED_ACCURACY - 2 * STDERR,
        f"{mean:.3f} from {', '.join(f'{value:.3f}' for value in values)}",
    )
    oracle = rows["groundtruth", 0.2]["value"]
    bench.check(
        f"ground truth is near {PUBLISHED_ORACLE}", abs(oracle - PUBLISHED_ORACLE) < 2 * STDERR, f"{oracle:.3f}"
    )

    whole = bench.out / "bert-run"
    found = bench.cli(
        "run", whole, *collect, "--eval-data", data / "dev.tsv", "--method", "kmeans", "--num-experts", 48,
        "--router", "mlp", "--fraction", 0.2, *PAPER, "--selection", "groundtruth,random,static,mlp",
    )  # fmt: skip
    row = bench.rows("BERT SST-2, `run`", found)["mlp", 0.2]
    bench.check(
        "`run` writes the bytes the separate commands wrote (seed 0), and measures the same",
        all(digests(whole / name) == stages[name] for name in stages) and row["value"] == values[0],
        f"{', '.join(stages)}; accuracy {row['value']:.3f}",
    )


def t5(bench: Bench) -> None:
    """SST-2 text to text, encoder and decoder FFNs."""
    model, data, run = bench.models / "t5-relu-sst2", bench.data / "sst2", bench.out / "t5"
    words = ["--prompt", "sst2 sentence: {sentence}", "--label-words", "negative,positive"]
    bench.cli("collect-activations", run, "--model", model, "--data", data / "train.tsv", "--no-sensitivity",
              "--max-tokens", bench.tokens, *words)  # fmt: skip
    trained, measured = paper_stages(bench, run, data / "dev.tsv", 32, 0)
    rows = bench.rows("T5 SST-2", measured)
    names = [layer["layer"] for layer in trained["metrics"]["layers"]]
    bench.check(
        "encoder and decoder FFNs are converted",
        [name.split(".")[0] for name in names] == ["encoder"] * 4 + ["decoder"] * 4,
        f"{len(names)} layers",
    )
    dense = measured["dense"]["value"]
    bench.check(f"dense accuracy is {T5_ACCURACY}", round(dense, 3) == T5_ACCURACY, f"{dense:.3f}")
    mlp, chance = rows["mlp", 0.2], rows["random", 0.2]
    bench.check(
        "the mlp router is closer to dense than random experts",
        mlp["kl"] < chance["kl"] and mlp["value"] > chance["value"],
        f"accuracy {mlp['value']:.3f} against {chance['value']:.3f}, KL {mlp['kl']:.3f} against {chance['kl']:.3f}",
    )
    bench.check(
        "every layer's router captures more than random experts",
        all(row["router"] > row["random"] for row in captured(trained, 0.2)),
        ", ".join(f"{row['router']:.3f} ({row['random']:.3f})" for row in captured(trained, 0.2)),
    )


def first_windows(text: str, tokenizer: Any, tokens: int) -> str:
    """The beginning of a text that is this many tokens long."""
    coded = tokenizer(text[: 12 * tokens], return_offsets_mapping=True, add_special_tokens=False)
    return text[: coded["offset_mapping"][tokens - 1][1]]


def opt(bench: Bench) -> None:
    """Perplexity on the first 80 windows of WikiText-2 valid, which is what the dense figure is of."""
    from transformers import AutoTokenizer

    model, data, run = bench.models / "opt-relu-wikitext2", bench.data / "wikitext2", bench.out / "opt"
    head = bench.out / "wiki.valid.head.txt"
    text = (data / "wiki.valid.txt").read_text(encoding="utf-8")
    head.write_text(
        first_windows(text, AutoTokenizer.from_pretrained(model), OPT_WINDOWS * OPT_WINDOW), encoding="utf-8"
    )
    bench.cli("collect-activations", run, "--model", model, "--data", data / "wiki.train.txt", "--no-sensitivity",
              "--max-tokens", bench.tokens, "--documents", "file", "--max-length", OPT_WINDOW)  # fmt: skip
    _, measured = paper_stages(bench, run, head, 32, 0, "--documents", "file")
    rows = bench.rows("OPT WikiText-2", measured)
    dense = measured["dense"]["value"]
    bench.check(f"dense perplexity is {OPT_PERPLEXITY}", abs(dense - OPT_PERPLEXITY) < 0.3, f"{dense:.2f}")
    mlp, chance, pruned = (rows[name, 0.2]["value"] for name in ("mlp", "random", "static"))
    bench.check(
        "the mlp router's perplexity is below that of random experts and of static pruning",
        mlp < chance and mlp < pruned,
        f"{mlp / dense:.2f}x dense; random {chance / dense:.2f}x, static {pruned / dense:.2f}x",
    )


def llama(bench: Bench) -> None:
    """A gated model with few divisors, all the way through `load` and `generate`; then every stage again, alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moefication_cli import load

    model, data = bench.models / "llama-stories260k", bench.data / "stories"
    line = ["--documents", "line"]
    collect = ["--model", model, "--data", data / "train.txt", *line, "--max-tokens", bench.tokens]
    for experts in (4, 43):
        run = bench.out / f"llama-{experts}"
        bench.cli("collect-activations", run, *collect)
        bench.cli("build-graph", run)
        bench.cli("split", run, "--num-experts", experts)
        bench.cli("train-router", run)
        bench.cli("apply", run, "--fraction", 0.75, "--refine", 60)
        measured = bench.cli("eval", run, "--data", data / "valid.txt", *line, "--fractions", "0.75")
        rows = bench.rows(f"Llama, {experts} experts", measured)
        mine, chance = rows["regression", 0.75], rows["random", 0.75]
        bench.check(
            f"{experts} experts: perplexity at 0.75 of the FLOPs is below that of random experts",
            mine["value"] < chance["value"],
            f"{mine['relative']:.3f}x dense at {mine['ffn_flops_fraction']:.3f}, random {chance['relative']:.3f}x",
        )
        words = AutoTokenizer.from_pretrained(model)
        prompt = words("Once upon a time", return_tensors="pt")
        options = {"max_new_tokens": 60, "do_sample": False}
        dense = AutoModelForCausalLM.from_pretrained(model).eval()
        plain = AutoModelForCausalLM.from_pretrained(run / "model").eval()
        with torch.inference_mode():
            original = dense.generate(**prompt, **options)
            same = [m.generate(**prompt, **options) for m in (plain, load(run / "model", fraction=1.0))]
            told = load(run / "model").generate(**prompt, **options)
        bench.check(
            f"{experts} experts: generate is the dense text with transformers, and with every expert on",
            all(torch.equal(original, other) for other in same),
            "60 tokens",
        )
        bench.check(
            f"{experts} experts: generate with the experts a token needs", told.shape[1] > prompt["input_ids"].shape[1],
            repr(words.decode(told[0], skip_special_tokens=True)),
        )  # fmt: skip
    again(bench, bench.out / "llama-4", collect, data)


def again(bench: Bench, run: Path, collect: list[object], data: Path) -> None:
    """Stages of a finished run: up to date, stale where they depend, the same bytes after deletion, no GPU."""
    line = ["--documents", "line"]
    stages = {
        "collect-activations": collect,
        "build-graph": [],
        "split": ["--num-experts", 4],
        "train-router": [],
        "apply": ["--fraction", 0.75, "--refine", 60],
        "eval": ["--data", data / "valid.txt", *line, "--fractions", "0.75"],
    }
    fresh = [name for name, options in stages.items() if bench.cli(name, run, *options)["up_to_date"]]
    bench.check("every stage run again alone is up to date", len(fresh) == 6, ", ".join(fresh))
    before = {name: digests(run / name) for name in ("graph", "split")}
    for name in before:
        shutil.rmtree(run / name)
    bench.cli("build-graph", run)
    bench.cli("split", run, "--num-experts", 4)
    after = {name: digests(run / name) for name in before}
    bench.check(
        "deleted graph and split come back with the same bytes", before == after, f"{len(after['split'])} layers"
    )
    still = bench.cli("train-router", run)["up_to_date"]
    bench.check("what depends on them is still up to date", still, str(still))
    bench.cli("split", run, "--num-experts", 43)
    kept = [
        name for name in ("collect-activations", "build-graph") if bench.cli(name, run, *stages[name])["up_to_date"]
    ]
    stale = bench.cli("apply", run, "--fraction", 0.75, code=3)["error"]["message"]
    bench.check("another split makes stale only what depends on it", len(kept) == 2, f"{', '.join(kept)} stay; {stale}")
    bench.cli("split", run, "--num-experts", 4)
    if not os.path.exists("/dev/nvidia0"):  # noqa: PTH110
        error = bench.cli("split", run, "--device", "cuda", code=2)["error"]
        bench.check("--device cuda without a GPU is a usage error", "CUDA" in error["message"], error["message"])


PARTS: dict[str, Callable[[Bench], None]] = {"bert": bert, "t5": t5, "opt": opt, "llama": llama}


def main() -> None:
    """Run the parts, print the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[3] / "shared")
    parser.add_argument("--out", type=Path, help="where the runs go (default: a new temporary folder)")
    parser.add_argument("--seeds", type=int, default=3, help="of the BERT rows")
    parser.add_argument("--tokens", type=int, default=65536, help="to calibrate on; BERT takes the default, 131072")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="acceptance-"))
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.shared, out, arguments.seeds, arguments.tokens)
    for part in arguments.parts or PARTS:
        PARTS[part](bench)
    print(f"\n{'':4} check (runs are in {out})")
    for good, what, found in bench.checks:
        print(f"{'ok  ' if good else 'FAIL'} {what}\n       {found}")
    sys.exit(not all(good for good, _, _ in bench.checks))


if __name__ == "__main__":
    main()
