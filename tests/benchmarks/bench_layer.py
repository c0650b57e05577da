"""One FFN layer: the stock torch FFN against the MoE with its router, alternating in one process, weights cold.

    python tests/benchmarks/bench_layer.py                 every row of the table below, about ten minutes on two cores
    python tests/benchmarks/bench_layer.py --cases t5-base --tokens 1,8 --repeats 30 --json

Dense is what a user has: two or three nn.Linear and an activation. The MoE holds the same weights behind `MoEFFN`, a linear router
(D -> E) and top-k included. Calls rotate over so many layers that no weight is still in cache when its turn comes again, the MoE half
a rotation behind: it shares the first projection with the dense layer.
ReLU rows carry a bias that lets 15 % of the neurons fire; SwiGLU rows have nothing to skip. Weights are random, so a
row says nothing about quality. `bound` is the larger of the ratios of arithmetic and of bytes, router and the union of the
tokens' experts counted; skipping neurons whose ReLU is zero is not in it and may pass it.
"""

import argparse
import json
import platform
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.benchmark.timing import Call, Paired, alternate
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import TopK
from moefication_cli.runtime.cpu import bfloat16_paths
from moefication_cli.runtime.layer import MoEFFN

CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class Case:
    """A layer's shape."""

    name: str
    d_model: int
    neurons: int
    experts: int
    activation: str
    gated: bool = False


CASES = [
    Case("t5-base", 768, 3072, 96, "relu"),
    Case("bert-large", 1024, 4096, 128, "relu"),
    Case("llama-7b", 4096, 11008, 86, "silu", True),
    Case("t5-base/16", 768, 3072, 192, "relu"),
    Case("t5-base/8", 768, 3072, 384, "relu"),
    Case("bert-large/16", 1024, 4096, 256, "relu"),
    Case("bert-large/8", 1024, 4096, 512, "relu"),
    Case("llama-7b/16", 4096, 11008, 688, "silu", True),
    Case("bert-base-gelu", 768, 3072, 96, "gelu"),
    Case("small-384", 384, 1536, 192, "relu"),
    Case("small-256", 256, 1024, 128, "relu"),
    Case("small-64", 64, 172, 43, "silu", True),
]


class Dense(nn.Module):
    """A stock FFN."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__()
        scale = case.d_model**-0.5
        self.act = ACTIVATIONS[case.activation]
        bias = not case.gated
        self.up = nn.Linear(case.d_model, case.neurons, bias=bias, dtype=dtype)
        self.down = nn.Linear(case.neurons, case.d_model, bias=bias, dtype=dtype)
        self.gate = nn.Linear(case.d_model, case.neurons, bias=False, dtype=dtype) if case.gated else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.normal_(0.0, scale)
        if bias and case.activation == "relu":
            self.up.bias.data.fill_(-1.0364)  # a unit normal exceeds 1.0364 with probability 0.15

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(self.act(self.gate(x)) * self.up(x))
        return self.down(self.act(self.up(x)))


def moe(dense: Dense, case: Case, fraction: float, backend: str) -> tuple[MoEFFN, int]:
    """The same weights as a MoE, and how many experts a token gets."""
    ffn = FFNWeights(
        dense.up.weight.data,
        dense.down.weight.data.t().contiguous(),
        None if dense.gate is None else dense.gate.weight.data,
        None if dense.up.bias is None else dense.up.bias.data,
        None,
        None if dense.down.bias is None else dense.down.bias.data,
        case.activation,
    )
    top_k = max(1, round(fraction * case.experts))
    router = TwoLayerRouter(torch.randn(case.experts, case.d_model))
    return MoEFFN(ExpertWeights(ffn, case.experts), router, TopK(top_k), backend), top_k


def bound(case: Case, tokens: int, top_k: int, dtype: torch.dtype) -> float:
    """The best ratio the layer's arithmetic and bytes allow: the larger cost of dense over the larger cost of the MoE."""
    if top_k == case.experts:
        return 1.0  # nothing to choose: no router runs
    neuron, router = case.d_model * (3 if case.gated else 2), case.experts * case.d_model
    touched = 1.0 - (1.0 - top_k / case.experts) ** tokens
    arithmetic = case.neurons * neuron / (case.neurons * neuron * top_k / case.experts + router)
    size = dtype.itemsize
    read = case.neurons * neuron * size / (case.neurons * neuron * size * touched + router * 4)
    return max(arithmetic, read) if tokens > 1 else min(arithmetic, read)


def row(
    case: Case,
    tokens: int,
    fraction: float,
    dtype: torch.dtype,
    backend: str,
    repeats: int,
    budget: float,
    clock: str = "wall",
) -> dict[str, Any]:
    """One row of the table."""
    layer_bytes = case.neurons * case.d_model * (3 if case.gated else 2) * dtype.itemsize
    layers = max(2, -(-CACHE_BYTES // layer_bytes)) if tokens <= 64 else 2
    stock = [Dense(case, dtype) for _ in range(layers)]
    experts = [moe(layer, case, fraction, backend) for layer in stock]
    top_k = experts[0][1]
    x_LTD = torch.randn(layers, tokens, case.d_model, dtype=dtype)
    dense_turns, moe_turns = count(0), count(layers // 2)

    def dense_call() -> None:
        turn = next(dense_turns) % layers
        stock[turn](x_LTD[turn])

    def moe_call() -> None:
        turn = next(moe_turns) % layers
        experts[turn][0](x_LTD[turn])

    with torch.inference_mode():
        calls = [Call(dense_call), Call(moe_call)]
        cpu = torch.device("cpu")
        dense_s, moe_s = alternate(calls, repeats=repeats, seconds=budget, warmup=layers, device=cpu, clock=clock)
    limit = bound(case, tokens, top_k, dtype)
    return {
        "case": case.name, "d_model": case.d_model, "neurons": case.neurons, "experts": case.experts, "top_k": top_k,
        "activation": case.activation, "gated": case.gated, "tokens": tokens, "fraction": fraction, "dtype": str(dtype)[6:],
        "threads": torch.get_num_threads(), "backend": experts[0][0].last_backend, "bound": limit,
        "speedup_of_minima": min(dense_s) / min(moe_s),
    } | Paired(dense_s, moe_s).summary()  # fmt: skip


def main() -> None:
    """Runs the rows asked for and prints a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--tokens", default="1,8,64,512,2048")
    parser.add_argument("--fractions", default="0.2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bfloat16-path", choices=bfloat16_paths.PATHS, help="other than this machine's default")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per row")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a busy machine, with one thread"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.bfloat16_path:
        bfloat16_paths.default_path = lambda: options.bfloat16_path
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = []
    if not options.json:
        print(
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        )
        print("case            tokens  frac  dense ms   moe ms  speedup  of minima  bound  backend")
    for case in [c for c in CASES if c.name in options.cases.split(",")]:
        for tokens in map(int, options.tokens.split(",")):
            for fraction in map(float, options.fractions.split(",")):
                r = row(
                    case,
                    tokens,
                    fraction,
                    getattr(torch, options.dtype),
                    options.backend,
                    options.repeats,
                    options.budget,
                    options.clock,
                )
                rows.append(r)
                if not options.json:
                    print(
                        f"{r['case']:<15} {tokens:>6} {fraction:>5} {1e3 * r['dense_seconds']:>9.3f} {1e3 * r['moe_seconds']:>8.3f} "
                        f"{r['speedup']:>7.2f}x {r['speedup_of_minima']:>9.2f}x {r['bound']:>5.2f}x  {r['backend']}",
                        flush=True,
                    )
    if options.json:
        print(json.dumps({"ok": True, "machine": platform.machine(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
