"""Train a model whose activation has become ReLU, on its task or on text, perhaps against a teacher and for sparsity.

The published preparation of BERT and T5 (MoEfication, arXiv 2110.01786, section 4.1) is the task's loss alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.config import RelufyConfig
from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.models.capture import capture
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.sites import FFNSite
from moefication_cli.runs.control import Control
from moefication_cli.tasks.examples import Batch, Examples, Summary, summarise
from moefication_cli.training.alternate import Alternation, Phase
from moefication_cli.training.losses import LOSSES
from moefication_cli.training.sparsity import Penalty
from moefication_cli.training.trainer import SMALLER, Schedule, train

SPARSITY_WEIGHT = 1e-4  # that of D2DMoE's published scripts for BERT


@dataclass(frozen=True)
class Measured:
    """A model on the data it is judged by, and the share of each FFN's neurons whose activation is not zero."""

    summary: Summary
    active: list[float]

    def row(self) -> dict[str, Any]:
        """For the record."""
        return {"value": self.summary.value, "stderr": self.summary.stderr}


@torch.inference_mode()
def measure(
    loaded: LoadedModel, sites: Sequence[FFNSite], examples: Examples, batch_size: int, control: Control, what: str
) -> Measured:
    """The task's metric, and active neurons over real tokens. Raises NonFiniteError, UnsupportedModelError (see `capture`)."""
    fired = dict.fromkeys((site.index for site in sites), 0.0)
    seen = dict.fromkeys(fired, 0)

    def listen(site: FFNSite, h_TF: Tensor) -> None:
        fired[site.index] += float((h_TF != 0).double().sum())
        seen[site.index] += h_TF.numel()

    loaded.model.eval()
    scores = []
    with capture(loaded.model, sites, on_hidden=listen):
        for batch in control.track(examples.batches(batch_size), what):
            outputs = loaded.model(**batch.to(loaded.device).inputs)
            scores.append(examples.score(batch.answers(outputs), batch))
    return Measured(summarise(examples.metric, scores), [fired[i] / max(1, seen[i]) for i in sorted(fired)])


class Learner(nn.Module):
    """What `Trainer` trains and saves: the model's parameters, tied ones once; `tokens` counts what was read.

    `partitions` are saved with them.
    """

    tokens: Tensor

    def __init__(
        self,
        loaded: LoadedModel,
        sites: Sequence[FFNSite],
        examples: Examples,
        config: RelufyConfig,
        teacher: LoadedModel | None,
        partitions: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._device, self._examples, self._config = loaded.device, examples, config
        self._models = (loaded.model, None if teacher is None else teacher.model)  # a tuple: not modules of this one
        self._penalty = None if config.sparsity is None else Penalty(loaded.model, sites, config.sparsity)
        named = loaded.model.named_parameters()
        self.tensors = nn.ParameterDict({n.replace(".", "/"): p for n, p in named if p.requires_grad})
        self.partitions = partitions
        self.register_buffer("tokens", torch.tensor(0, dtype=torch.int64))

    def train(self, mode: bool = True) -> "Learner":
        """Dropout of the model follows; the teacher has none."""
        self._models[0].train(mode)
        return super().train(mode)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": task + teacher + sparsity, each times its weight}. Raises NonFiniteError."""
        config, (model, teacher), batch = self._config, self._models, batch.to(self._device)
        found = model(**batch.inputs)
        losses = []
        if config.task_weight:
            losses.append(config.task_weight * LOSSES["task"](found, None, batch, self._examples))
        if teacher is not None:
            with torch.no_grad():
                dense = teacher(**batch.inputs)
            losses.append(config.teacher_weight * LOSSES["kl"](found, dense, batch, self._examples))
        if self._penalty is not None and (penalty := self._penalty.take()) is not None:
            losses.append((config.sparsity_weight or SPARSITY_WEIGHT) * penalty)
        loss = torch.stack(losses).sum()
        if not bool(loss.isfinite()):
            raise NonFiniteError("the loss is not finite", SMALLER)
        self.tokens += batch.num_tokens
        return {"loss": loss}


@dataclass(frozen=True)
class Trained:
    """What a training took: steps in all, those of a killed one that were not made again, tokens read, and its phases
    (`Alternation.report`).
    """

    steps: int
    resumed: int
    tokens: int
    phases: list[dict[str, Any]]


def train_batches(examples: Examples, config: RelufyConfig, source: str) -> list[Batch]:
    """The data as batches of sequences of similar length. Raises ConfigError where it does not fill one step."""
    batches = list(examples.calibration(None, 0, config.batch_size))
    sequences, wanted = sum(len(batch.example_B) for batch in batches), config.batch_size * config.accumulate
    if sequences < wanted:
        raise ConfigError(
            f"{source}: {sequences} sequences are left to train on, and one step takes {wanted}",
            "name more data, or use a smaller --batch-size or --accumulate",
        )
    return batches


def num_steps(config: RelufyConfig, batches: int) -> int:
    """Steps of the training: those asked for, or of so many passes (the last step of a pass may be of fewer batches)."""
    return config.steps or max(1, math.ceil(config.epochs * math.ceil(batches / config.accumulate)))


def train_relu(
    loaded: LoadedModel,
    sites: Sequence[FFNSite],
    examples: Examples,
    batches: Sequence[Batch],
    teacher: LoadedModel | None,
    config: RelufyConfig,
    folder: Path,
    control: Control,
    phases: Sequence[Phase] = (),
) -> Trained:
    """Train `loaded.model` in place; checkpoints go to `folder`. With `phases`, alternately sparse and dense.

    Raises NonFiniteError, RunAgainError.
    """
    steps = num_steps(config, len(batches))
    alternation = Alternation(loaded.model, sites, phases, config, control.seed) if phases else None
    kept, callbacks = (None, []) if alternation is None else (alternation.partitions, [alternation])
    learner = Learner(loaded, sites, examples, config, teacher, kept)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = Schedule(
        steps, config.accumulate, config.warmup, config.save_steps, config.autocast, decay="linear", name="relufy"
    )
    resumed = train(learner, optimizer, batches, schedule, folder, loaded.device, control, callbacks)
    loaded.model.eval()
    report = [] if alternation is None else alternation.report()
    return Trained(steps, resumed, int(learner.tokens), report)
