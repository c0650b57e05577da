"""What each stage would take: the figures of --dry-run, counted from the model and the options before anything is made.

Floating point operations are multiply-adds times two. Tokens that are not collected yet are `--max-tokens`, or a third of
the bytes of a local data file where that is less.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from moefication_cli.config import (
    ApplyConfig,
    CollectConfig,
    FinetuneConfig,
    GraphConfig,
    RelufyConfig,
    RouterConfig,
    SplitConfig,
)
from moefication_cli.routing.routers import router_kind
from moefication_cli.runs.inputs import RunModel, tokens_in_memory
from moefication_cli.split.methods import expert_counts

_FLOAT = 4
_BYTES_PER_TOKEN = 3  # of text, at least: so many tokens a file holds at most
_CANDIDATES = 65  # of a calibration curve with three routers
_BACKWARD = 1.3  # of a forward pass: what the gradients of every 32nd batch add
_STATES = 34  # floats of one token and layer that autograd keeps, in units of the model's width, about
_SEQUENCES, _LENGTH = 1000, 128  # of evaluation data that cannot be looked at
_SWAP_FLOPS = 500  # per pair of neurons and start of balanced k-means
# What stages work with:
GRADIENT_TOKENS = 4096  # per backward pass, padding included: what autograd keeps of them bounds the stage's memory
SHARD_BYTES = 256 * 2**20  # of stored inputs, over all layers: what is redone after a kill
FIT_TOKENS = 16384  # behind a compensation
STEP_TOKENS = 2048  # of one step of refinement
HELDOUT_TOKENS = 12288  # to settle thresholds and to judge on
_REFINE_PASSES = 15  # over the held-out sequences: thresholds of three shapes, of the first quarter and of the end


@dataclass(frozen=True)
class Cost:
    """Bytes read or written beside the model's weights, floating point operations, and the peak of memory in bytes.

    `written` are bytes that a stage leaves on disk at most, `certain` at least.
    """

    num_bytes: float
    flops: float
    memory: float
    written: float = 0.0
    certain: float = 0.0


def collect_cost(model: RunModel, config: CollectConfig) -> Cost:
    """collect-activations: the model over the data, forwards, and backwards on a part of it."""
    tokens = calibration_tokens(config)
    width = sum(site.d_model for site in model.sites)
    stored = tokens * width * getattr(torch, config.storage_dtype).itemsize
    memory = _FLOAT * (model_parameters(model) + GRADIENT_TOKENS * _STATES * width * config.sensitivity)
    work = forward_flops(model) * tokens * (_BACKWARD if config.sensitivity else 1.0)
    return Cost(stored, work, memory + min(stored, SHARD_BYTES), written=stored)


def calibration_tokens(config: CollectConfig) -> int:
    """Tokens that will be collected, at most."""
    return min(config.max_tokens, _text_tokens(config.data) or config.max_tokens)


def _text_tokens(data: str | None) -> int | None:
    """Tokens that a local file can hold; None for other data."""
    path = None if data is None else Path(data)
    return None if path is None or not path.is_file() else max(1, path.stat().st_size // _BYTES_PER_TOKEN)


def graph_cost(model: RunModel, config: GraphConfig, tokens: int) -> Cost:
    """build-graph: products of all pairs of neurons over the collected tokens."""
    tokens, neurons, layers = min(tokens, config.max_tokens or tokens), _most_neurons(model), len(model.sites)
    edges = neurons * (config.neighbours or neurons)
    work = total_ffn_flops(model, tokens) + layers * tokens * neurons**2
    num_bytes = 8.0 * edges * layers
    return Cost(num_bytes, work, ffn_bytes(model) + 4.0 * neurons**2 + 16.0 * edges, written=num_bytes)


def split_cost(model: RunModel, config: SplitConfig) -> Cost:
    """split: distances of all pairs of neurons, and swaps."""
    neurons, layers = _most_neurons(model), len(model.sites)
    width = config.profile_tokens if config.method == "activation" else model.sites[0].d_model
    work = layers * neurons**2 * (2.0 * width + _SWAP_FLOPS * config.restarts)
    certain = 4.0 * sum(site.num_neurons for site in model.sites)
    memory = ffn_bytes(model) + 4.0 * neurons * (neurons + width)
    return Cost(4.0 * neurons * layers, work, memory, certain, certain)


def num_experts(model: RunModel, config: SplitConfig) -> int:
    """The largest expert count of a split that has not been made. Raises ConfigError where experts do not divide an FFN."""
    return max(expert_counts(site.num_neurons, config, model.device.type)[0] for site in model.sites)


def router_cost(model: RunModel, config: RouterConfig, collected: int, experts: int) -> Cost:
    """train-router: targets from the whole FFN, steps of training, and the candidates of the calibration curve."""
    d_model, neurons, layers = max(site.d_model for site in model.sites), _most_neurons(model), len(model.sites)
    tokens = min(collected, config.max_tokens or tokens_in_memory(d_model, experts))
    width = config.width or d_model // 6  # of a narrow and a wide one together
    calibrating = 2.0 * _CANDIDATES * config.calibration_tokens * d_model * (d_model + neurons)
    work = total_ffn_flops(model, tokens)
    work += 6.0 * tokens * width * (d_model + experts) * (config.epochs or 6) * layers
    work += calibrating * layers if router_kind(config.router).calibrated else 0.0
    memory = 2 * ffn_bytes(model) + 8.0 * tokens * (d_model + experts)
    return Cost(4.0 * width * (d_model + experts) * layers, work, memory)


def apply_cost(model: RunModel, config: ApplyConfig, activations: bool) -> Cost:
    """apply: compensations fitted on calibration tokens, the checkpoint written; refinement where it is asked for."""
    size = float(sum(path.stat().st_size for path in model.checkpoint.files))
    d_model = max(site.d_model for site in model.sites)
    memory = 2 * ffn_bytes(model) + (16.0 * FIT_TOKENS * d_model if activations else 0.0)
    work = total_ffn_flops(model, FIT_TOKENS) if activations else 0.0
    if config.refine:
        work += refine_flops(model) * config.refine + forward_flops(model) * HELDOUT_TOKENS * _REFINE_PASSES
        memory = max(memory, refine_memory(model))
    if config.weights is not None:  # the files mapped, the int8 matrices made of them, and those read again to compare
        memory = max(memory, size + 2.0 * model_parameters(model))
    return Cost(2 * size, work, memory, size, size)


def refine_flops(model: RunModel) -> float:
    """Of one step of refinement: the dense model, the converted one, and its gradient; embeddings cost nothing."""
    return 4.0 * STEP_TOKENS * forward_flops(model)


def refine_memory(model: RunModel) -> float:
    """Bytes: the model, what it keeps for the gradient of one batch, and what is learned with its optimiser's state."""
    return 4.0 * model_parameters(model) * _FLOAT


def finetune_cost(model: RunModel, config: FinetuneConfig) -> Cost:
    """finetune: the dense model, the converted one and its gradient; two models, gradients and the optimiser's state."""
    tokens = config.steps * config.accumulate * config.tokens
    work = 4.0 * forward_flops(model) * tokens + forward_flops(model) * HELDOUT_TOKENS * _REFINE_PASSES
    return Cost(_FLOAT * model_parameters(model), work, 5.0 * _FLOAT * model_parameters(model))


def relufy_cost(model: RunModel, config: RelufyConfig, batch_tokens: int | None = None) -> Cost:
    """relufy: training of every weight, the teacher's outputs, and three looks at the data to measure on.

    `batch_tokens` of the largest batch, padding included, where the data has been read.
    """
    size, forward = model_parameters(model), forward_flops(model)
    length = min(config.max_length or _LENGTH, _LENGTH)
    rows = _SEQUENCES * length if config.limit is None else config.limit * length
    tokens = config.epochs * min(_text_tokens(config.data) or rows, config.limit * length if config.limit else 1 << 60)
    if config.steps is not None:
        tokens = config.steps * config.accumulate * config.batch_size * length
    kept = (batch_tokens or config.batch_size * length) * _STATES * sum(site.d_model for site in model.sites)
    work = (3.0 + (config.teacher is not None)) * forward * tokens + 3.0 * forward * _SEQUENCES * length
    return Cost(_FLOAT * size, work, relufy_fixed_memory(model, config) + _FLOAT * kept, written=5.0 * _FLOAT * size)


def relufy_fixed_memory(model: RunModel, config: RelufyConfig) -> float:
    """Bytes whatever the batch: weights, gradients and the optimiser's two states, and the teacher's weights."""
    return (4.0 + (config.teacher is not None)) * _FLOAT * model_parameters(model)


def eval_cost(model: RunModel, data: str | None, limit: int | None, rows: int, weights: str | None = None) -> Cost:
    """eval: the dense model and every row over the evaluation data; in memory two models, and with int8 `weights` two of
    a quarter of the size, the second made from a float one.
    """
    tokens = min(_text_tokens(data) or _SEQUENCES * _LENGTH, (limit or _SEQUENCES**2) * _LENGTH)
    models = 2.0 if weights is None else 3.5
    rows += 0 if weights is None else 2
    return Cost(1e5, forward_flops(model) * tokens * (1 + rows), models * _FLOAT * model_parameters(model))


def model_parameters(model: RunModel) -> float:
    """All parameters, embeddings too."""
    return float(model.checkpoint.describe()["parameters"])


def forward_flops(model: RunModel) -> float:
    """Of one token through the whole model: two per parameter that is multiplied with, which embeddings are not."""
    return 2.0 * model.checkpoint.multiplied_parameters()


def total_ffn_flops(model: RunModel, tokens: float) -> float:
    """Of all FFNs over that many tokens."""
    return 2.0 * tokens * sum(site.num_parameters for site in model.sites)


def ffn_bytes(model: RunModel) -> float:
    """Float32 bytes of the largest FFN."""
    return float(max(site.num_parameters for site in model.sites) * _FLOAT)


def _most_neurons(model: RunModel) -> int:
    return max(site.num_neurons for site in model.sites)
