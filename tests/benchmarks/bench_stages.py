"""The stages of construction against their targets: time, peak memory, and two processes against one.

    python tests/benchmarks/bench_stages.py router     our router training against the published recipe, MODEL's layers
    python tests/benchmarks/bench_stages.py collect    collect-activations, with and without token weights, against the plain forward pass
    python tests/benchmarks/bench_stages.py ranks      split and train-router with one and two processes of one thread
    python tests/benchmarks/bench_stages.py memory     peak memory of split, train-router and apply at 7B shape
    python tests/benchmarks/bench_stages.py safety     share of each stage's seconds that hashing, flushing and renaming take

`router`, `collect` and `safety` read `--model` and `--data` (default: bert-relu-minilm-sst2 and sst2 in shared/ beside the checkout);
the others generate random weights and activations under `--scratch`, which is kept, and whose finished stages are not
made again. Both sides of a ratio are taken in one run; `cpu` seconds hardly move on a busy machine, `seconds` do.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from moefication_cli.cli.app import exit_code
from moefication_cli.cli.console import Console
from moefication_cli.config import CollectConfig, RouterConfig, SplitConfig
from moefication_cli.models.loading import load_model
from moefication_cli.routing.routers import router_kind
from moefication_cli.routing.scores import oracle_scores
from moefication_cli.routing.train import captured as captured_rows
from moefication_cli.routing.training import RouterSample
from moefication_cli.runs.control import Control, chosen_layers
from moefication_cli.runs.data import open_examples
from moefication_cli.runs.inputs import expert_weights, layer_options, open_model, read_partition, read_tokens
from moefication_cli.runs.ranks import open_ranks
from moefication_cli.split.kmeans import balanced_kmeans
from moefication_cli.stages.collect_activations import collect_activations
from moefication_cli.stages.split_neurons import split_neurons
from moefication_cli.stages.train_router import train_router
from moefication_cli.store.rundir import RunDir

SHARED = Path(__file__).parents[3] / "shared"
Row = dict[str, Any]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def router(args: argparse.Namespace) -> Iterator[Row]:
    """Training seconds and captured share of the `mlp` router, ours and the published recipe's, on the same targets."""
    run = RunDir(args.scratch / "router")
    collect = CollectConfig(
        model=str(args.model), data=str(args.data), max_tokens=args.tokens or 133_749, sensitivity=False
    )
    collect_activations(run, collect, Control())
    split_neurons(run, SplitConfig(method="kmeans", expert_size=32), Control())
    model, activations, made = open_model(run, None, Control()), run.require("activations"), run.require("split")
    total: dict[str, float] = {}
    chosen = chosen_layers(args.layers, len(model.sites)) or range(len(model.sites))
    for index in chosen:
        weights = expert_weights(model.read_ffn(index), read_partition(made, index))
        tokens = read_tokens(activations, index)
        train, heldout = tokens.split_heldout(RouterConfig().heldout_fraction, index)
        heldout_TE = oracle_scores(heldout.x_TD, weights, "activation")
        target_TE, _, targets = timed(lambda: oracle_scores(train.x_TD, weights, "activation"))  # noqa: B023
        sample = RouterSample(train.x_TD, target_TE, heldout.x_TD, heldout_TE)
        for recipe in ("paper", "default"):
            config = RouterConfig(router="mlp", recipe=recipe)
            kind = router_kind("mlp")
            training = kind.training(config, index)
            (found,), seconds, cpu = timed(lambda: kind.train(weights, sample, training))  # noqa: B023
            rows = captured_rows(found.router, weights, sample, [0.1, 0.2, 0.3], index)
            captured = {f"captured_{row['fraction']}": row["router"] for row in rows}
            yield {"what": "router", "layer": index, "recipe": recipe, "tokens": len(tokens), "seconds": seconds,
                   "cpu": cpu, "target_cpu": targets, "epochs": len(found.history) - 1, **captured}  # fmt: skip
            for name, value in {"seconds": seconds, "cpu": cpu, "target_cpu": targets, **captured}.items():
                total[f"{recipe} {name}"] = total.get(f"{recipe} {name}", 0.0) + value / len(chosen)
    target = total["paper target_cpu"]  # the published script computes the targets of a batch anew in all 30 epochs
    yield {"what": "router, mean of layers", **total,
           "ratio": total["paper seconds"] / total["default seconds"],
           "cpu_ratio": total["paper cpu"] / total["default cpu"],
           "cpu_ratio_with_targets": (total["paper cpu"] + target) / (total["default cpu"] + target),
           "cpu_ratio_as_published": (total["paper cpu"] + 30 * target) / (total["default cpu"] + target)}  # fmt: skip


def collect(args: argparse.Namespace) -> Iterator[Row]:
    """The whole stage against loading the model and running the same batches through it, in turns."""
    run, count = RunDir(args.scratch / "collect"), args.tokens or 32_768
    config = CollectConfig(model=str(args.model), data=str(args.data), max_tokens=count, sensitivity=False)
    model = open_model(run, config, Control())

    def plain() -> int:
        loaded = load_model(model.checkpoint.folder, device=model.device, quiet=True)
        batches = open_examples(run, loaded, config, Control()).calibration(count, 0, config.batch_size)
        with torch.inference_mode():
            return sum(len(loaded.model(**batch.to(loaded.device).inputs).logits) for batch in batches)

    plain()
    _, before, before_cpu = timed(plain)
    ratios: dict[str, list[float]] = {}
    for turn in range(args.turns):
        for sensitivity in (False, True):
            options = replace(config, sensitivity=sensitivity)
            _, seconds, cpu = timed(lambda: collect_activations(run, options, Control(force=True)))  # noqa: B023
            _, after, after_cpu = timed(plain)
            dense, dense_cpu = (before + after) / 2, (before_cpu + after_cpu) / 2  # the machine's pace changes
            before, before_cpu = after, after_cpu
            found = {"ratio": seconds / dense, "cpu_ratio": cpu / dense_cpu}
            yield {"what": "collect", "turn": turn, "tokens": count, "sensitivity": sensitivity, "plain_seconds": dense,
                   "seconds": seconds, **found}  # fmt: skip
            for name, value in found.items():
                ratios.setdefault(f"{name} {'with' if sensitivity else 'without'} token weights", []).append(value)
    yield {"what": "collect, median", **{name: statistics.median(values) for name, values in ratios.items()}}


def bert_base(folder: Path) -> None:
    """Twelve FFNs of 3072 x 768 between small embeddings, random weights."""
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, hidden_act="relu")
    transformers.BertModel(config).save_pretrained(folder)


def llama_7b(folder: Path) -> None:
    """Two layers of the 7B shape in float16 (the others are the same), random weights."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)


def generated(folder: Path, build: Callable[[Path], None], tokens: int) -> RunDir:
    """A run of a generated model whose activations are random: what costs time and memory, and no forward pass."""
    if not (folder / "model" / "config.json").exists():
        build(folder / "model")
    run, config = RunDir(folder / "run"), CollectConfig(model=str(folder / "model"), data="random", max_tokens=tokens)
    model = open_model(run, config, Control())
    with run.begin("activations", layer_options(config, Control(), model, {})) as work:
        for index in work.pending():
            generator = torch.Generator().manual_seed(index)
            shape = tokens, model.sites[index].d_model
            tensors = {
                "inputs_TD": torch.randn(shape, generator=generator, dtype=torch.float32).half(),
                "sequence_T": torch.arange(tokens, dtype=torch.int32) // 32,
                "weight_T": torch.ones(tokens),
            }
            work.save(index, tensors, metrics={"tokens": tokens})
        work.finish()
    return run


def ranks(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from all ranks being ready until the stage is committed, and processor seconds of the busiest rank."""
    folder = args.scratch / "ranks"
    generated(folder, bert_base, args.tokens or 4096)
    found: dict[tuple[str, int], list[float]] = {}
    for size in (1, 2) * args.turns:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-addr"]
        command += ["127.0.0.1", "--master-port", str(29500 + size), __file__, "worker", "--scratch", str(folder)]
        command += ["--stages", args.stages]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        for stage, seconds in json.loads(done.stdout).items():
            best = found.get((stage, size), seconds)
            found[stage, size] = [min(pair) for pair in zip(seconds, best, strict=True)]
    for stage in args.stages.split(","):
        (one, one_cpu), (two, two_cpu) = found[stage, 1], found[stage, 2]
        yield {"what": f"ranks: {stage}", "one_seconds": one, "two_seconds": two, "ratio": one / two,
               "one_cpu": one_cpu, "two_cpu": two_cpu, "cpu_ratio": one_cpu / two_cpu}  # fmt: skip


def worker(args: argparse.Namespace) -> None:
    """One rank of `ranks`: rank 0 prints each stage's seconds as JSON."""
    run = RunDir(args.scratch / "run")
    spent: dict[str, list[float]] = {}
    balanced_kmeans(torch.randn(64, 8), 8)  # compile and import before anything is timed
    open_model(run, None, Control())
    with open_ranks() as joined:
        control = Control(force=True, ranks=joined)
        stages: dict[str, Callable[[], Any]] = {
            "split": lambda: split_neurons(run, SplitConfig(method="kmeans", num_experts=96), control),
            "train-router": lambda: train_router(run, RouterConfig(calibration_tokens=512), control),
        }
        for name in args.stages.split(","):
            joined.wait()
            _, seconds, cpu = timed(stages[name])
            spent[name] = [seconds, max(joined.exchange(cpu)) if joined.size > 1 else cpu]
        if joined.rank == 0:
            print(json.dumps(spent))


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak resident memory of each command in a process of its own, and of a process that only imports torch."""
    folder, tokens = args.scratch / "memory", args.tokens or 131_072
    # A process of its own: children inherit the peak of their parent.
    maker = multiprocessing.get_context("spawn").Process(target=generated, args=(folder, llama_7b, tokens))
    maker.start()
    maker.join()
    run = RunDir(folder / "run")
    sites = open_model(run, None, Control()).sites
    ffn_gib = max(site.num_parameters for site in sites) * 4 / 2**30
    imports = peak([sys.executable, "-c", "import torch, transformers, numba"])[0]
    yield {"what": "memory: imports alone", "gib": imports}
    for command in ("split", "train-router", "apply"):
        words = [sys.executable, "-m", "moefication_cli", command, str(run.root), "--force"]
        gib, seconds = peak(words)
        yield {"what": f"memory: {command}", "gib": gib, "ffn_gib": ffn_gib, "target_gib": 3 * ffn_gib + 1,
               "seconds": seconds, "layers": len(sites), "tokens": tokens}  # fmt: skip


def safety(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds in sha256, fsync and rename of each stage, on a shared model and on two layers of the 7B shape."""
    small, folder = RunDir(args.scratch / "safety"), args.scratch / "memory"
    data = ["--data", str(args.data)]
    commands = [
        [
            "collect-activations",
            str(small.root),
            "--model",
            str(args.model),
            *data,
            "--max-tokens",
            str(args.tokens or 65_536),
        ],
        *([name, str(small.root)] for name in ("split", "train-router", "apply")),
        ["eval", str(small.root), *data, "--limit", "500"],
    ]
    large = generated(folder, llama_7b, 16_384)
    commands += [[name, str(large.root)] for name in ("split", "train-router", "apply")]
    for words in commands:
        spent: dict[str, float] = {}
        with ExitStack() as patches:
            for owner, name in ((hashlib, "file_digest"), (os, "fsync"), (Path, "replace")):
                patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name), name, spent)))
            code, seconds, _ = timed(lambda: exit_code(Console(json_mode=True), [*words, "--force", "--json"]))  # noqa: B023
        assert code == 0, words
        where = "7B shape, 2 layers" if words[1] == str(large.root) else args.model.name
        share = sum(spent.values()) / seconds
        yield {"what": f"safety: {words[0]}", "model": where, "seconds": seconds, **spent, "share": share}


def counted(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The same function, its seconds added to `spent[name]`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result, seconds, _ = timed(lambda: function(*args, **kwargs))
        spent[name] = spent.get(name, 0.0) + seconds
        return result

    return run


def peak(command: list[str]) -> tuple[float, float]:
    """(GiB, seconds) of a command that must succeed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 2**20, time.perf_counter() - begun


def show(row: Row) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"router": router, "collect": collect, "ranks": ranks, "memory": memory, "safety": safety}
    parser.add_argument("part", choices=[*parts, "worker"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--layers", type=int, nargs="*", help="router: only these")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--stages", default="split,train-router", help="ranks: only these")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "bert-relu-minilm-sst2")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "sst2" / "train.tsv")
    parser.add_argument("--scratch", type=Path, default=Path("artifacts/bench"))
    args = parser.parse_args()
    if args.part == "worker":
        worker(args)
        return
    rows = []
    for row in parts[args.part](args):
        rows.append(row)
        if not args.json:
            print(show(row), flush=True)
    if args.json:
        print(json.dumps({"ok": True, "rows": rows}))


if __name__ == "__main__":
    main()
