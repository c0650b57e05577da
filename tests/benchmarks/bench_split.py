"""Balanced clustering and co-activation graphs against their targets; every ratio is taken within one run.

    python tests/benchmarks/bench_split.py              table: planted, time at three shapes, trained models
    python tests/benchmarks/bench_split.py large        (11008, 4096, 128): seconds and memory
    python tests/benchmarks/bench_split.py graph        co-activation and METIS at F = 11008, d = 4096
    python tests/benchmarks/bench_split.py all --json   everything, one JSON object

The reference is k-means-constrained at its default (10 starts, one thread). `cpu_ratio` compares processor seconds:
it hardly moves on a busy machine, and charges both threads to the solver. Reduced figures are said in `note`:
`graph` runs `--tokens` tokens (default 4096) and scales to 100,000. Trained models are read from `--models`
(default: shared/models beside the checkout) and left out where absent.
"""

import argparse
import json
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moefication_cli.split.coactivation import coactivation_graph
from moefication_cli.split.kmeans import balanced_kmeans, constrained_kmeans, normalised_rows
from moefication_cli.split.metis import cut_weight, partition_graph
from moefication_cli.split.partition import random_partition

SHAPES = [(1536, 384, 48), (3072, 768, 96), (4096, 1024, 128)]
ROWS_OF = re.compile(r"(intermediate\.dense|fc1|\.wi|gate_proj|up_proj)\.weight$")
Row = dict[str, Any]


def planted(num_rows: int, width: int, num_experts: int, spread: float = 0.6, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_experts, width, generator=g) * spread
    return normalised_rows(centres[torch.arange(num_rows) % num_experts] + torch.randn(num_rows, width, generator=g))


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, x_FD: Tensor, num_experts: int, repeats: int = 3) -> Row:
    ours = sorted((timed(lambda: balanced_kmeans(x_FD, num_experts)) for _ in range(repeats)), key=lambda r: r[1])
    result, seconds, cpu = ours[len(ours) // 2]
    reference, reference_seconds, reference_cpu = timed(lambda: constrained_kmeans(x_FD, num_experts))
    return {
        "what": name,
        "rows": x_FD.shape[0],
        "width": x_FD.shape[1],
        "experts": num_experts,
        "inertia": result.inertia,
        "reference_inertia": reference.inertia,
        "inertia_percent": 100 * (result.inertia / reference.inertia - 1),
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "ratio": reference_seconds / seconds,
        "cpu_ratio": reference_cpu / cpu,
    }


def trained(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in sorted(k for k in file.keys() if ROWS_OF.search(k)):
                x_FD = normalised_rows(file.get_tensor(key))
                for num_experts in [43, 4] if x_FD.shape[0] == 172 else [x_FD.shape[0] // 32]:
                    yield compare(f"{path.parent.name} {key.removesuffix('.weight')}", x_FD, num_experts, repeats=1)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def large() -> Row:
    x_FD = torch.empty(11008, 4096)
    g = torch.Generator().manual_seed(0)
    for start in range(0, 11008, 1376):  # in pieces, so that making the input does not set the peak
        x_FD[start : start + 1376] = normalised_rows(torch.randn(1376, 4096, generator=g))
    before = peak_gib()
    result, seconds, cpu = timed(lambda: balanced_kmeans(x_FD, 128))
    grown = peak_gib() - before
    return {
        "what": "large, random rows", "rows": 11008, "width": 4096, "experts": 128, "inertia": result.inertia,
        "seconds": seconds, "cpu_seconds": cpu, "extra_gib": grown, "note": "random rows need the most swaps",
    }  # fmt: skip


def graph(tokens: int, dtype: torch.dtype) -> Row:
    num_neurons, width, chunk, wanted = 11008, 4096, 2048, 100_000
    g = torch.Generator().manual_seed(0)
    topics = torch.randn(128, width, generator=g)
    w_FD = (
        topics[torch.randint(0, 128, (num_neurons,), generator=g)] + torch.randn(num_neurons, width, generator=g)
    ).to(dtype)

    def chunks() -> Iterator[Tensor]:
        source = torch.Generator().manual_seed(1)
        for start in range(0, tokens, chunk):
            size = min(chunk, tokens - start)
            x_TD = topics[torch.randint(0, 128, (size,), generator=source)] + torch.randn(size, width, generator=source)
            yield torch.relu(x_TD.to(dtype) @ w_FD.t() - 100.0)

    _, fixed, fixed_cpu = timed(
        lambda: coactivation_graph(lambda: [torch.zeros(0, num_neurons)], num_neurons, neighbours=32)
    )
    built, seconds, cpu = timed(lambda: coactivation_graph(chunks, num_neurons, neighbours=32, dtype=dtype))
    cut, cut_seconds, cut_cpu = timed(lambda: partition_graph(built, 344))
    random = random_partition(num_neurons, 344, 0)
    scaled = fixed + (seconds - fixed) * wanted / tokens
    scaled_cpu = fixed_cpu + (cpu - fixed_cpu) * wanted / tokens
    return {
        "what": "co-activation and METIS", "rows": num_neurons, "width": width, "experts": 344, "dtype": str(dtype)[6:],
        "edges": built.num_edges, "graph_seconds": seconds, "graph_cpu_seconds": cpu,
        "partition_seconds": cut_seconds, "partition_cpu_seconds": cut_cpu,
        "cut_to_random": cut_weight(built, cut.expert_F) / cut_weight(built, random.expert_F),
        "seconds": scaled + cut_seconds, "cpu_seconds": scaled_cpu + cut_cpu, "peak_gib": peak_gib(),
        "note": f"{tokens} tokens run, hidden activations included; seconds and cpu_seconds scaled to {wanted} tokens",
    }  # fmt: skip


def show(row: Row) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", default="table", choices=["table", "time", "trained", "large", "graph", "all"]
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[3] / "shared" / "models")
    args = parser.parse_args()

    balanced_kmeans(torch.randn(64, 8), 8)  # compile before anything is timed
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if not args.json:
            print(show(row), flush=True)

    if args.part in ("graph", "all"):  # first: the peak of memory only grows
        add(graph(args.tokens, getattr(torch, args.dtype)))
    if args.part in ("large", "all"):
        add(large())
    if args.part in ("table", "time", "all"):
        for shape in SHAPES:
            add(compare("planted", planted(*shape), shape[2]))
        add(compare("random rows", normalised_rows(torch.randn(4096, 1024)), 128))
    if args.part in ("table", "trained", "all"):
        for row in trained(args.models):
            add(row)
    percent = [r["inertia_percent"] for r in rows if r["what"] not in ("planted", "random rows") and "ratio" in r]
    summary: Row = {}
    if percent:
        summary = {"layers": len(percent), "mean_percent": sum(percent) / len(percent), "worst_percent": max(percent)}
    if args.json:
        print(json.dumps({"ok": True, "rows": rows, "trained": summary}))
    elif summary:
        print("trained layers:", show(summary))


if __name__ == "__main__":
    main()
