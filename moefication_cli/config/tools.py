"""The options of the commands that put stages together, measure, and look after runs."""

from dataclasses import dataclass
from typing import Literal

from moefication_cli.config.option import CONTROL, INPUT, OUTPUT, Options, option
from moefication_cli.config.stages import OBJECTIVE, OBJECTIVE_TOKENS, TASK_HELP, FormatName, TaskName
from moefication_cli.errors import ConfigError

Train = Literal["router", "ffn", "lora", "all"]
_RECIPES = ("default", "paper")


@dataclass(frozen=True)
class RunConfig(Options):
    """run: what the whole pipeline takes besides the options of its stages."""

    eval_data: str | None = option(
        None, "Data to evaluate on, one or several as in eval; without it the run ends with RUN/model", panel=INPUT
    )
    eval_split: str | None = option(None, "Split of --eval-data", panel=INPUT)
    eval_limit: int | None = option(
        None, "Evaluate on at most this many examples, sampled uniformly", minimum=1, panel=INPUT
    )
    recipe: str = option(
        "default",
        "paper: published split and router, defects mended; or a file (.toml, or with a / in it) as --print-recipe writes it",
    )
    print_recipe: bool = option(
        False,
        "Print the recipe of RUN as it is: options, seeds and digests of all its stages; nothing is run",
        panel=CONTROL,
    )
    finetune: int | None = option(
        None, "Steps of `finetune` on the calibration data after the conversion (default: none)", minimum=0
    )
    train: Train = option("ffn", "--finetune: what is trained, as in `finetune`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in _RECIPES and not self.recipe_is_file:
            raise ConfigError(
                f"--recipe {self.recipe!r} is neither one of {', '.join(_RECIPES)} nor a file",
                "the name of a file ends in .toml or has a / in it",
            )

    @property
    def recipe_is_file(self) -> bool:
        return self.recipe not in _RECIPES and (self.recipe.endswith(".toml") or "/" in self.recipe)


@dataclass(frozen=True)
class FinetuneConfig(Options):
    """finetune: train the converted model, its selection in the loop, against the original dense one."""

    name: str = option("default", "Keeps several fine-tunings apart: RUN/finetuned/NAME", compared=False, panel=OUTPUT)
    train: Train = option(
        "ffn",
        "router: routers, thresholds and corrections alone; with them ffn: the FFNs' weights; lora: low-rank adapters of all "
        "linear layers (needs peft); all: every weight",
    )
    loss: tuple[Literal["kl", "hidden", "task"], ...] = option(
        ("kl",),
        "Comma list, summed: kl to the dense model; hidden: its hidden states; task: the data's labels, masked or next tokens",
    )
    steps: int = option(300, "Training steps", minimum=1)
    tokens: int = option(2048, "Calibration tokens per batch", minimum=2)
    accumulate: int = option(1, "Batches whose gradients make one step", minimum=1)
    learning_rate: float | None = option(
        None,
        "Adam's step as a share of each trained tensor's size (default: 0.03 for router, else 0.08 / sqrt(d); less where a "
        "batch makes few predictions)",
        above=0,
    )
    warmup: float = option(
        0.05, "Share of the steps in which the learning rate rises; then it falls", maximum=1, minimum=0
    )
    price: float = option(
        1.0, "Price of compute at the start, relative to the KL; then it follows what is spent", minimum=0.0
    )
    lora_rank: int = option(8, "lora: rank of each adapter", minimum=1)
    autocast: Literal["none", "bfloat16"] = option(
        "none", "Compute in bfloat16 where that is safe, weights in float32", panel=CONTROL
    )
    save_steps: int = option(
        50, "Steps between checkpoints, from which a killed training goes on", minimum=1, compared=False, panel=CONTROL
    )


@dataclass(frozen=True)
class ExportConfig(Options):
    """export: a native MoE checkpoint of the converted model, or a file for llama.cpp."""

    to: FormatName | None = option(None, "Native MoE format to write; gguf: a file for llama.cpp", panel=OUTPUT)
    out: str | None = option(
        None,
        "Folder to write, which must be empty or not there; of gguf a file, or a folder that gets one",
        panel=OUTPUT,
    )
    quantise: Literal["f32", "f16", "q8_0", "q4_k"] | None = option(
        None, "gguf: how matrices are stored (default: f16; q4_k needs llama-cpp-python)", panel=OUTPUT
    )


@dataclass(frozen=True)
class ReportConfig(Options):
    """report: one page about one run or several."""

    out: str | None = option(
        None, "Folder to write (default: RUN/report; several runs need one)", compared=False, panel=OUTPUT
    )


@dataclass(frozen=True)
class StatusConfig(Options):
    """status: the state of every stage."""

    exit_code: bool = option(False, "Exit with 0 all current, 3 stale or missing, 4 corrupt, 5 running", panel=OUTPUT)
    watch: bool = option(False, "Show it again every few seconds until interrupted", panel=OUTPUT)


@dataclass(frozen=True)
class CleanConfig(Options):
    """clean: what to delete besides the stage that is named."""

    partial: bool = option(False, "What interrupted work has left; it could have been resumed")
    trials: bool = option(False, "The splits and routers that `tune` keeps")


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
    objective: Literal["flops", "time"] = option("flops", OBJECTIVE.replace("--fraction is", "--fractions are"))
    objective_tokens: int = option(512, OBJECTIVE_TOKENS, minimum=1)
    max_tokens: int = option(32768, "Tokens every router is trained on", minimum=1, panel=INPUT)
    heldout_tokens: int = option(16384, "Tokens to judge on", minimum=64, panel=INPUT)
    batch_size: int = option(32, "Sequences per forward pass", minimum=1, panel=CONTROL)


PeerName = Literal["all", "float32", "bfloat16", "compile", "dynamic-int8", "llama.cpp", "openvino-int8"]


@dataclass(frozen=True)
class BenchConfig(Options):
    """bench: time of the MoE beside the dense model, and how fast it could be."""

    shape: Literal["t5-base", "bert-large", "opt-1.3b", "llama-7b-layer"] | None = option(
        None, "Random weights of this architecture instead of MODEL_OR_RUN", panel=INPUT
    )
    experts: str | None = option(
        None,
        "Instead of MODEL_OR_RUN: a stock MoE, timed under transformers' experts and under this package's kernels",
        panel=INPUT,
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
    backend: str = option("auto", "Backend of the MoE", panel=CONTROL)
    dtype: str | None = option(
        None, "float32 or bfloat16 (default: float32 on CPU, the checkpoint's on CUDA)", panel=CONTROL
    )
    weights: Literal["int8"] | None = option(
        None, "int8: dense and MoE with int8 weights, on the CPU; dense is the faster of two ways", panel=CONTROL
    )
    peers: tuple[PeerName, ...] | None = option(
        None,
        "Time in the same turns what needs no conversion, a comma list of float32, bfloat16, compile, dynamic-int8, "
        "llama.cpp (Q8_0), openvino-int8, or all; CPU; each may hold the weights once more",
        panel=CONTROL,
    )
    threads: int | None = option(None, "CPU threads (default: what torch takes)", minimum=1, panel=CONTROL)
    clock: Literal["wall", "cpu"] = option(
        "wall",
        "cpu: count what one thread computes, so that other programs disturb less (with --threads 1)",
        panel=CONTROL,
    )
    repeats: int = option(100, "Dense and MoE take turns at most so many times per row", minimum=1, panel=CONTROL)
    seconds: float = option(5.0, "Seconds per row, about; 5 turns at least", minimum=0.0, panel=CONTROL)
    revision: str | None = option(None, "Revision of a hub model", panel=INPUT)
    ffn: str | None = option(
        None, 'FFN described by hand: "up=...,gate=...,down=..." with * for the layer number', panel=INPUT
    )
    task: TaskName | None = option(None, TASK_HELP, panel=INPUT)
