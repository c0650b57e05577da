"""The options of the six stages, and those that every command has."""

from dataclasses import dataclass, replace
from typing import Literal

from moefication_cli.config.option import CONTROL, INPUT, LAYERS, OUTPUT, Options, option

TaskName = Literal["classification", "text2text", "lm", "mlm", "embedding"]
TASK_HELP = (
    "classification, text2text, lm, mlm (masked language model) or embedding (encoder without a head); guessed from the "
    "architecture"
)
FormatName = Literal["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared", "glm4_moe", "gguf"]
Score = Literal["activation", "contribution", "norm"]
OBJECTIVE = (
    "What --fraction is a share of, and compute is shared out by: the dense FFNs' multiply-adds, or their time on this machine "
    "(CPU, float32, the present number of threads), measured once and kept"
)
OBJECTIVE_TOKENS = "--objective time: tokens per call, 1 for generation, many for prompts and batches"
FRACTION_OF = "What fractions bound: flops (everything counted, router included) or neurons (the paper's reading)"


@dataclass(frozen=True)
class ControlConfig(Options):
    """What every stage takes and no result depends on, `seed` apart."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N", compared=False, panel=CONTROL)
    seed: int = option(0, "Seed; each layer derives its own from it", minimum=0, panel=CONTROL)
    layers: tuple[int, ...] | None = option(
        None, "Only these layers, e.g. 0,3-7 (batch arrays)", compared=False, kind=LAYERS, panel=CONTROL
    )
    force: bool = option(False, "Redo the stage even if it is up to date", compared=False, panel=CONTROL)
    dry_run: bool = option(
        False, "Say what would be read, written and how long it would take; do nothing", compared=False, panel=CONTROL
    )
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the model; never remembered, each command needs it anew",
        compared=False,
        panel=CONTROL,
    )
    json: bool = option(False, "Print exactly one JSON object on stdout", compared=False, panel=CONTROL)
    progress: Literal["auto", "plain", "json", "none"] = option(
        "auto",
        "How stderr shows progress: a bar on a terminal, else a plain line a minute at most; json: one object per line",
        compared=False,
        panel=CONTROL,
    )
    quiet: bool = option(False, "No progress on stderr, only warnings and errors", compared=False, panel=CONTROL)


@dataclass(frozen=True)
class ModelConfig(Options):
    """Which model; remembered in run.json by the first stage that names it. Stages compare its fingerprint, not its name."""

    model: str | None = option(
        None, "Hub id or local folder; later stages find it in run.json", compared=False, panel=INPUT
    )
    revision: str | None = option(None, "Revision of a hub model", compared=False, panel=INPUT)
    ffn: str | None = option(
        None,
        'FFN described by hand: "up=...,gate=...,down=..." with * for the layer number',
        compared=False,
        panel=INPUT,
    )


@dataclass(frozen=True)
class RunModelConfig(ModelConfig):
    """The model of a run, which may be a file with weights alone."""

    model_config: str | None = option(
        None,
        "Where --model is a file with weights alone: the folder with its config.json and tokenizer; RUN/source is made of both",
        compared=False,
        panel=INPUT,
    )


@dataclass(frozen=True)
class TaskConfig(Options):
    """How text becomes model input; remembered in run.json."""

    task: TaskName | None = option(None, TASK_HELP, panel=INPUT)
    prompt: str | None = option(
        None, 'text2text: a template such as "sst2 sentence: {sentence}", or a GLUE task name', panel=INPUT
    )
    label_words: tuple[str, ...] | None = option(
        None, "text2text: the words of the labels, in label order: negative,positive", panel=INPUT
    )
    text_field: tuple[str, ...] | None = option(None, "Field with the text; a,b for a sentence pair", panel=INPUT)
    label_field: str | None = option(None, "Field with the label; embedding: with the score of a pair", panel=INPUT)
    max_length: int | None = option(
        None, "Tokens per sequence (default: the model's limit, at most 512)", minimum=2, panel=INPUT
    )


@dataclass(frozen=True)
class DataConfig(Options):
    """Where rows come from."""

    # Its content is compared, as an input of the stage, and not its name
    data: str | None = option(
        None,
        "Hub dataset (NAME, NAME/CONFIG or OWNER/NAME/CONFIG: glue/sst2) or local .tsv/.csv/.jsonl/.parquet/.txt file; "
        "to calibrate also generated:N, N tokens that the language model itself writes",
        compared=False,
        panel=INPUT,
    )
    split: str | None = option(
        None, "Split of the dataset (default: train to calibrate, validation to evaluate)", panel=INPUT
    )
    header: bool = option(
        True, "The first row of a .tsv/.csv names its fields; else fields are column numbers from 0", panel=INPUT
    )
    documents: Literal["auto", "file", "line"] = option(
        "auto", "In .txt data, one document per file or per line", panel=INPUT
    )
    stream: int | None = option(
        None,
        "Hub data too large to download: read its first so many rows as a stream; they are kept in the cache of datasets",
        minimum=1,
        compared=False,  # the rows are, as the content of the data
        panel=INPUT,
    )
    limit: int | None = option(None, "Use at most this many examples, sampled uniformly", minimum=1, panel=INPUT)


@dataclass(frozen=True)
class CollectConfig(RunModelConfig, TaskConfig, DataConfig):
    """collect-activations: run the model over data, store each FFN's inputs and its neurons' statistics."""

    max_tokens: int = option(
        131072, "Real tokens to keep; sequences are sampled uniformly over all data", minimum=1, panel=INPUT
    )
    storage_dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "How inputs are stored", panel=OUTPUT)
    dtype: str | None = option(None, "Model dtype (default: float32 on CPU, the checkpoint's on CUDA)", panel=CONTROL)
    batch_size: int = option(32, "Sequences per forward pass", minimum=1, compared=False, panel=CONTROL)
    sensitivity: bool = option(
        True, "Also measure how much each token's FFN output matters (a backward pass); routers and budgets use it"
    )
    offload: bool = option(
        False, "Model larger than memory: let accelerate place and offload it", compared=False, panel=CONTROL
    )


@dataclass(frozen=True)
class GraphConfig(Options):
    """build-graph: which neurons fire together."""

    weights: Literal["sum", "count"] = option("sum", "Edge weight: sum of products of positive activations, or count")
    neighbours: int = option(64, "Strongest edges kept per neuron; 0 keeps all", minimum=0)
    max_tokens: int | None = option(None, "Use at most this many of the collected tokens", minimum=1, panel=INPUT)
    export_metis: str | None = option(None, "Also write plain METIS graph files here", compared=False, panel=OUTPUT)


@dataclass(frozen=True)
class SplitConfig(RunModelConfig):
    """split: which expert does each neuron belong to?"""

    method: Literal["random", "kmeans", "graph", "activation"] = option(
        "activation", "random; kmeans: weight rows; graph: METIS on co-activation; activation: contribution profiles"
    )
    num_experts: int | None = option(None, "Experts per FFN; must divide its neurons", minimum=1)
    expert_size: int | None = option(None, "Neurons per expert, instead of --num-experts", minimum=1)
    shared_fraction: float = option(0.0, "Share of neurons that is always on", minimum=0.0, maximum=0.95)
    solver: Literal["swap", "constrained"] = option("swap", "Balanced k-means: ours, or k-means-constrained")
    restarts: int = option(4, "Balanced k-means starts; the best is kept", minimum=1)
    projection: Literal["auto", "up", "gate"] = option("auto", "kmeans: rows to cluster (auto: gate rows where gated)")
    profile: Literal["contribution", "pattern"] = option(
        "contribution", "activation: how much a neuron writes at each token, or whether it is among the top fifth there"
    )
    profile_tokens: int = option(4096, "activation: tokens that make up a neuron's profile", minimum=1)
    from_partition: str | None = option(
        None,
        "Folder or file pattern, one file per layer: gpmetis .part.N, or the published code's param_split",
        panel=INPUT,
    )
    init: str | None = option(
        None, "Warm start from the split of this run directory; the better of warm and cold stays", panel=INPUT
    )


@dataclass(frozen=True)
class RouterConfig(Options):
    """train-router: which experts does this token need?"""

    router: Literal["regression", "mlp", "linear", "quadratic", "native", "similarity", "random"] = option(
        "regression",
        "regression: low-rank, predicts contribution; mlp: the paper's; linear; quadratic; native: linear without a bias, "
        "for export; similarity",
    )
    score: Score | None = option(None, "What an expert is worth (default: activation for mlp, norm otherwise)")
    width: int | None = option(
        None, "Hidden width of regression and quadratic routers (default: d/24 and d/8, budgets choose)", minimum=1
    )
    calibration_tokens: int = option(4096, "Tokens behind each calibration curve, fitted and held out", minimum=64)
    epochs: int | None = option(None, "Passes over the tokens (default: 4; mlp may stop earlier)", minimum=1)
    batch_size: int | None = option(
        None, "Tokens per training step (default: 1024, for mlp 2048)", minimum=1, panel=CONTROL
    )
    learning_rate: float | None = option(None, "Adam's step (default: by router)", minimum=0.0)
    patience: int = option(3, "Epochs without improvement before stopping", minimum=1)
    heldout_fraction: float = option(
        0.1, "Share of sequences held out to measure and to stop", minimum=0.01, maximum=0.9
    )
    max_tokens: int | None = option(None, "Use at most this many of the collected tokens", minimum=1, panel=INPUT)
    fractions: tuple[float, ...] = option(
        (0.05, 0.1, 0.2, 0.3, 0.5),
        "Active fractions the captured share is reported at",
        above=0,
        maximum=1,
        panel=OUTPUT,
    )
    recipe: Literal["default", "paper"] = option("default", "paper: the published training (30 epochs, batch 512)")


@dataclass(frozen=True)
class ApplyConfig(Options):
    """apply: write RUN/model, a normal Hugging Face folder that is also the MoE."""

    router: str | None = option(None, "Which trained router (default: the one there is)")
    fraction: float = option(
        0.2,
        "Share of the dense FFN that may be computed, in the mean over calibration data (other data: about as much)",
        minimum=0.0,
        maximum=1.0,
    )
    fraction_of: Literal["flops", "neurons"] = option("flops", FRACTION_OF)
    objective: Literal["flops", "time"] = option("flops", OBJECTIVE)
    objective_tokens: int = option(512, OBJECTIVE_TOKENS, minimum=1)
    target_kl: float | None = option(
        None,
        "Instead of --fraction: the least compute whose KL to dense on calibration data is at most this (nats)",
        minimum=0.0,
    )
    top_k: int | None = option(None, "Experts per token, instead of --fraction", minimum=1)
    rule: Literal["threshold", "top_k", "max_ratio", "cumulative"] | None = option(
        None,
        "Experts per token: all above a calibrated threshold; a fixed number; all near the token's best; the fewest that "
        "hold a share of its scores (default: by router)",
    )
    budget: Literal["auto", "uniform"] | None = option(
        None,
        "auto: share the compute between layers by what it saves; uniform: the same everywhere (default: by router)",
    )
    compensation: Literal["auto", "mean", "none"] = option(
        "auto", "What stands in for dropped experts: their mean, or the best low-rank correction as well"
    )
    keep_dense: tuple[int, ...] | None = option(None, "Layers left as they are, e.g. 0,11", kind=LAYERS)
    refine: int | None = option(
        None,
        "Steps that fit routers, thresholds and corrections to the whole model on calibration data; its own weights stay "
        "(apply: 0; run: by model size)",
        minimum=0,
    )
    host: FormatName | None = option(
        None,
        "Plan what this native MoE format can hold, for `export --to`: a fixed number of experts, router native; gguf: what "
        "llama.cpp runs",
        names=("--for",),
    )
    # The stage's digest is compared, as an input, and not its name
    finetuned: str | None = option(
        None,
        "Write what `finetune` made: RUN/finetuned/NAME, at its budget; options of the conversion are its own",
        compared=False,
        panel=INPUT,
    )
    weights: Literal["int8"] | None = option(
        None,
        "int8: write int8 weights in place of the float ones, a quarter of float32's size; moefication_cli.load, eval and bench "
        "read them, on the CPU, plain transformers does not",
        panel=OUTPUT,
    )
    embed_code: bool = option(
        False, "Write code into RUN/model: with trust_remote_code=True transformers loads the MoE", panel=OUTPUT
    )

    def hosted(self) -> "ApplyConfig":
        """With what `--for` leaves no choice of."""
        if self.host is None:
            return self
        return replace(self, rule="top_k", budget="uniform", compensation="none", refine=None)


@dataclass(frozen=True)
class EvalConfig(TaskConfig, DataConfig):
    """eval: quality and time of the MoE beside the dense model, oracles and baselines."""

    # Other help than calibration's, so that `run` keeps the two apart (it has --eval-data)
    data: str | None = option(
        None,
        "Hub dataset or local file as in collect-activations; several: valid=valid.txt,other=other.txt",
        compared=False,
        panel=INPUT,
    )
    selection: tuple[str, ...] | None = option(
        None,
        "Comma list of groundtruth,neuron,random,static,paper,teal,cmoe and routers, or all (default: all but paper)",
    )
    fractions: tuple[float, ...] | None = option(
        None, "Comma list (default: the fraction of RUN/model)", above=0, maximum=1
    )
    seeds: int = option(1, "Rows of random selection, each with a seed of its own", minimum=1)
    fraction_of: Literal["flops", "neurons"] = option("flops", FRACTION_OF)
    name: str = option("default", "Keeps several evaluations apart", compared=False, panel=OUTPUT)
    backend: str = option("auto", "Backend of the MoE rows; `reference` masks a dense FFN", panel=CONTROL)
    # Of the next three the content is compared, as an input of RUN/harness/NAME
    lm_eval: tuple[str, ...] | None = option(
        None,
        "Instead: dense and RUN/model on these tasks of lm-evaluation-harness, a comma list (needs lm-eval)",
        compared=False,
    )
    include_path: str | None = option(
        None, "--lm-eval: folder with task files of your own", compared=False, panel=INPUT
    )
    num_fewshot: int | None = option(
        None, "--lm-eval: examples in the prompt (default: the task's)", minimum=0, compared=False
    )
    weights: Literal["int8"] | None = option(
        None, "int8: also rows of the dense model and of RUN/model with int8 weights, on the CPU", panel=CONTROL
    )
    batch_size: int = option(32, "Sequences per forward pass", minimum=1, panel=CONTROL)
    dtype: str | None = option(None, "Model dtype (default: float32 on CPU, the checkpoint's on CUDA)", panel=CONTROL)
