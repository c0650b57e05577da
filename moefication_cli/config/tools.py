"""The options of the commands that put stages together, measure, and look after runs."""

from dataclasses import dataclass
from typing import Literal

from moefication_cli.config.option import Options, option
from moefication_cli.config.stages import TaskName


@dataclass(frozen=True)
class RunConfig(Options):
    """run: what the whole pipeline takes besides the options of its stages."""

    eval_data: str | None = option(
        None, "Data to evaluate on, one or several as in eval; without it the run ends with RUN/model"
    )
    eval_split: str | None = option(None, "Split of --eval-data")
    eval_limit: int | None = option(None, "Evaluate on at most this many examples, sampled uniformly", minimum=1)
    recipe: Literal["default", "paper"] = option("default", "paper: published split and router, defects mended")


@dataclass(frozen=True)
class DemoConfig(Options):
    """demo: the shipped model, converted and measured on standard-library modules it never saw."""

    fractions: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.5), "What an FFN may compute, as shares of dense", above=0, maximum=1
    )


@dataclass(frozen=True)
class TuneConfig(Options):
    """tune: every combination of these, judged on held-out calibration data. All are comma lists."""

    methods: tuple[Literal["activation", "kmeans", "random"], ...] = option(
        ("activation", "kmeans"), "Splits: activation, kmeans, random"
    )
    expert_sizes: tuple[int, ...] = option((4, 16, 32), "Neurons per expert", minimum=1)
    routers: tuple[Literal["regression", "linear", "quadratic"], ...] = option(
        ("regression",), "regression, linear, quadratic"
    )
    budgets: tuple[Literal["auto", "uniform"], ...] = option(("auto",), "auto, uniform")
    compensations: tuple[Literal["auto", "mean", "none"], ...] = option(("auto", "none"), "auto, mean, none")
    fractions: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.5), "What an FFN may compute, as shares of dense", above=0, maximum=1
    )
    max_tokens: int = option(32768, "Tokens every router is trained on", minimum=1)
    heldout_tokens: int = option(16384, "Tokens to judge on", minimum=64)
    batch_size: int = option(32, "Sequences per forward pass", minimum=1)


@dataclass(frozen=True)
class BenchConfig(Options):
    """bench: time of the MoE beside the dense model, and how fast it could be."""

    shape: Literal["t5-base", "bert-large", "opt-1.3b", "llama-7b-layer"] | None = option(
        None, "Random weights of this architecture instead of MODEL_OR_RUN"
    )
    mode: tuple[Literal["ffn", "prefill", "decode"], ...] | None = option(
        None, "Comma list of ffn, prefill, decode (default: all the model has)"
    )
    tokens: tuple[int, ...] = option((1, 8, 64, 512), "ffn: tokens per call, a comma list", minimum=1)
    batch: tuple[int, ...] = option((1,), "prefill, decode: sequences at once, a comma list", minimum=1)
    seq: tuple[int, ...] = option((128,), "prefill: tokens per sequence, a comma list", minimum=1)
    prompt_tokens: int = option(32, "decode: tokens before the first generated one", minimum=1)
    new_tokens: int = option(32, "decode: tokens generated before starting again from the prompt", minimum=1)
    fractions: tuple[float, ...] | None = option(
        None,
        "Active share of the experts, a comma list (default: 0.2; of a run, what RUN/model does)",
        above=0,
        maximum=1,
    )
    expert_size: int | None = option(
        None, "Neurons per expert of random routers (default: 32; llama-7b-layer 128)", minimum=1
    )
    num_experts: int | None = option(None, "Experts per FFN, instead of --expert-size", minimum=1)
    router_width: int | None = option(
        None, "Hidden width of random routers, 0 for linear ones (default: as train-router's)", minimum=0
    )
    firing: float = option(
        0.15, "--shape: share of ReLU neurons that fire, by a bias of the random weights", minimum=0.001, maximum=1.0
    )
    activation: str | None = option(None, "--shape: another activation, e.g. gelu (default: relu; llama silu)")
    backend: str = option("auto", "Backend of the MoE")
    dtype: str | None = option(None, "float32 or bfloat16 (default: float32 on CPU, the checkpoint's on CUDA)")
    threads: int | None = option(None, "CPU threads (default: what torch takes)", minimum=1)
    clock: Literal["wall", "cpu"] = option(
        "wall", "cpu: count what one thread computes, so that other programs disturb less (with --threads 1)"
    )
    repeats: int = option(100, "Dense and MoE take turns at most so many times per row", minimum=1)
    seconds: float = option(5.0, "Seconds per row, about; 5 turns at least", minimum=0.0)
    revision: str | None = option(None, "Revision of a hub model")
    ffn: str | None = option(None, 'FFN described by hand: "up=...,gate=...,down=..." with * for the layer number')
    task: TaskName | None = option(None, "classification, text2text or lm; guessed from the architecture")
