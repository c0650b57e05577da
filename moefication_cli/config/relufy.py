"""The options of `relufy`."""

from dataclasses import dataclass
from typing import Literal

from moefication_cli.config.option import CONTROL, INPUT, option
from moefication_cli.config.stages import DataConfig, ModelConfig, TaskConfig


@dataclass(frozen=True)
class RelufyConfig(ModelConfig, TaskConfig, DataConfig):
    """relufy: a model with ReLU in place of its FFNs' activation, trained until it works again."""

    model: str | None = option(None, "Hub id or local folder of the dense model", compared=False, panel=INPUT)
    eval_data: str | None = option(
        None, "Data to measure on (default: a twentieth of the data, held out)", compared=False, panel=INPUT
    )
    eval_split: str | None = option(None, "Split of --eval-data", panel=INPUT)
    eval_limit: int | None = option(
        None, "Measure on at most this many examples of --eval-data, sampled uniformly", minimum=1, panel=INPUT
    )
    classes: tuple[str, ...] | None = option(
        None,
        "For a pre-trained model without a classifier: names of the classes of a new one, in label order",
        panel=INPUT,
    )
    intermediate_bias: bool = option(
        True, "Keep the biases before the activation; the published BERT recipe trains without: they are zero then"
    )
    sparsity: Literal["l1", "hoyer"] | None = option(
        None, "Penalty on activations: l1, sum of magnitudes; hoyer, its square over the sum of squares, free of scale"
    )
    sparsity_weight: float | None = option(
        None, "--sparsity: weight of the penalty, a mean over tokens and FFNs (default: 0.0001)", above=0
    )
    # Its weights are compared, as an input
    teacher: str | None = option(
        None,
        "Also match outputs (KL): original, or a model of the same vocabulary or classes, hub id or folder",
        compared=False,
        panel=INPUT,
    )
    teacher_weight: float = option(1.0, "--teacher: weight of the KL", above=0)
    task_weight: float = option(
        1.0,
        "Weight of the loss on labels, masked or next tokens; 0 with --teacher needs no labels to train",
        minimum=0.0,
    )
    schedule: str | None = option(
        None,
        "Train alternately: sparse:dense, steps of phases in which FFNs run as experts and of dense ones, e.g. 300:300; "
        "the last phase is dense",
    )
    sparse_fraction: float | None = option(
        None, "--schedule: FLOPs of an FFN in sparse phases, router included (default: 0.3)", above=0, maximum=0.95
    )
    expert_size: int | None = option(
        None, "--schedule: neurons per expert (default: the divisor of an FFN's neurons nearest to 32)", minimum=1
    )
    epochs: float = option(3.0, "Passes over the data", above=0, maximum=10_000)
    steps: int | None = option(None, "Training steps, instead of --epochs", minimum=1)
    batch_size: int = option(32, "Sequences per batch", minimum=1)
    accumulate: int = option(1, "Batches whose gradients make one step", minimum=1)
    learning_rate: float = option(2e-5, "AdamW's step; it falls linearly to zero", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", minimum=0.0)
    warmup: float = option(0.06, "Share of the steps in which the learning rate rises", minimum=0, maximum=1)
    autocast: Literal["none", "bfloat16"] = option(
        "none", "Compute in bfloat16 where that is safe, weights in float32", panel=CONTROL
    )
    save_steps: int = option(
        200, "Steps between checkpoints, from which a killed training goes on", minimum=1, compared=False, panel=CONTROL
    )
