"""One FFN on a GPU: dense, the Triton kernels and grouped products, launched from Python and replayed as a CUDA graph.

    python tests/benchmarks/bench_cuda_layer.py [few | many]

Random weights in bfloat16, random routers of width D / 16, a fifth of the experts unless said; so many layers in turn that no
weight is still in the cache. Microseconds per layer: medians of five rounds. Figures and what they mean: cuda.md.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch

from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Rule, Threshold, TopK, quantile
from moefication_cli.runtime.layer import MoEFFN

# d_model, neurons, gated, activation
SHAPES = {
    "t5-base": (768, 3072, False, "relu"),
    "bert-large": (1024, 4096, False, "gelu"),
    "opt-1.3b": (2048, 8192, False, "relu"),
    "llama-7b": (4096, 11008, True, "silu"),
}
FRACTION, ROUNDS = 0.2, 5
COLD_BYTES = 400e6
Layer = tuple[ExpertWeights, TwoLayerRouter]


def make(shape: str, expert_size: int, seed: int) -> Layer:
    D, F, gated, activation = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def rand(*sides: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*sides, generator=generator, device="cuda") * scale

    up, down, gate = rand(F, D, scale=D**-0.5), rand(F, D, scale=F**-0.5), rand(F, D, scale=D**-0.5)
    ffn = FFNWeights(up, down, gate if gated else None, activation=activation).to(torch.bfloat16)
    R, E = D // 16, F // expert_size
    router = TwoLayerRouter(rand(R, D, scale=D**-0.5), rand(R), rand(E, R, scale=R**-0.5), rand(E), "relu")
    return ExpertWeights(ffn, E), router


def rule_of(name: str, layer: Layer, share: float = FRACTION) -> Rule:
    router = layer[1]
    if name == "top_k":
        return TopK(max(1, round(share * router.num_experts)))
    probe_TD = torch.randn(64, router.d_model, device="cuda")
    return Threshold(quantile(router.scores(probe_TD), 1 - share))


def eager(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Microseconds per call, launched one after another."""
    taken = []
    for _ in range(ROUNDS + 1):  # the first compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        for number in range(repeats):
            calls[number % len(calls)]()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) / repeats * 1e6)
    return sorted(taken[1:])[ROUNDS // 2]


def graphed(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Microseconds per call, all of them captured in one CUDA graph. They must have run before."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / repeats / len(calls))
    return sorted(taken)[ROUNDS // 2]


def calls_of(
    layers: Sequence[Layer], backend: str, rule: str, tokens: int, share: float = FRACTION
) -> list[Callable[[], object]]:
    calls = []
    for layer in layers:
        moe = MoEFFN(*layer, rule_of(rule, layer, share), backend=backend)
        x_TD = torch.randn(tokens, layer[1].d_model, device="cuda").bfloat16()
        calls.append(lambda moe=moe, x_TD=x_TD: moe(x_TD))
    return calls


def few() -> None:
    for shape, (D, F, gated, _) in SHAPES.items():
        count = max(2, min(40, int(COLD_BYTES / (D * F * (3 if gated else 2) * 2)) + 1))
        for expert_size in (32, 4) if shape == "llama-7b" else (32,):
            layers = [make(shape, expert_size, seed) for seed in range(count)]
            for tokens in (1, 4, 16):
                found = []
                for backend, rule in (("dense", "top_k"), ("triton", "top_k"), ("triton", "threshold")):
                    calls = calls_of(layers, backend, rule, tokens)
                    found.append(f"{backend} {rule}: eager {eager(calls, 60):6.1f} graph {graphed(calls):6.1f}")
                print(f"{shape} experts of {expert_size} tokens {tokens:2}  " + "  ".join(found), flush=True)


def many() -> None:
    for shape, sizes in (("llama-7b", (128, 688, 64, 32)), ("opt-1.3b", (128,))):
        for expert_size in sizes:
            layers = [make(shape, expert_size, seed) for seed in range(2)]
            for tokens in (512, 1024, 2048, 4096, 16384):
                paths = [("dense", FRACTION), ("triton", FRACTION), ("triton", 0.35)]
                if tokens == 4096:
                    paths.append(("grouped", FRACTION))
                found = []
                for backend, share in paths:
                    calls = calls_of(layers, backend, "threshold", tokens, share)
                    taken = eager(calls, 10)  # first, because it compiles
                    graph = f" graph {graphed(calls, 5):7.1f}" if backend != "grouped" else ""
                    found.append(f"{backend} {share}: eager {taken:7.1f}{graph}")
                print(f"{shape} experts of {expert_size} tokens {tokens:5}  " + "  ".join(found), flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA GPU here: nothing was run")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: microseconds per FFN")
    with torch.inference_mode():
        for part in (few, many):
            if sys.argv[1:] in ([], [part.__name__]):
                part()


if __name__ == "__main__":
    main()
