"""Runs transformers' `Trainer` over a module that makes its own loss: checkpoints, resumption, schedule, accumulation.

A checkpoint counts only once it is marked, after everything in it is on disk: a process killed while it saves goes on from
the one before. Trainer writes optimizer and random states with torch.save, into the stage's scratch folder, and reads them
through weights_only loading; nothing of that gets into a result.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moefication_cli.errors import NonFiniteError, RunAgainError
from moefication_cli.runs.control import Control
from moefication_cli.store import files
from moefication_cli.tasks.examples import Batch

_MARK = "complete"
_LEAST_RATE = 0.05  # of the learning rate, at the last step
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A loss of one kind of data never explodes from one step to the next but where the step is too long
_MOST_GRADIENT = 1.0


@dataclass(frozen=True)
class Schedule:
    """How a training runs: `warmup` is a share of the steps, after which the rate falls to a twentieth or to zero."""

    steps: int
    accumulate: int
    warmup: float
    save_steps: int
    autocast: Literal["none", "bfloat16"] = "none"
    decay: Literal["cosine", "linear"] = "cosine"
    name: str = "finetune"  # of the progress


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
    control: Control,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Train `module`, whose forward takes `batch=` and returns {"loss": ...}; returns the step it went on from, 0 for none.

    All batches are taken in random order, then again in another one. Raises RunAgainError at a checkpoint made early because
    `control.stop` asked, NonFiniteError where loss or gradients stop being finite; `folder` then holds the last good
    checkpoint.
    """
    steps = schedule.steps
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": _LEAST_RATE}}
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": schedule.accumulate,
        **(cosine if schedule.decay == "cosine" else {"lr_scheduler_type": "linear"}),
        "warmup_steps": round(schedule.warmup * steps),
        "max_grad_norm": _MOST_GRADIENT,
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": schedule.save_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": control.seed,
        "data_seed": control.seed,
        "use_cpu": device.type == "cpu",
        "bf16": schedule.autocast == "bfloat16",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    last = last_checkpoint(folder)
    if last is not None and _number(last) >= steps:  # killed after the last step: Trainer would make another one
        module.load_state_dict(load_file(last / "model.safetensors"))
        return _number(last)
    module.register_state_dict_post_hook(_contiguous)
    watch = _Watch(module, folder, schedule.name, control)
    with _alone(), torch.random.fork_rng(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        made = TrainingArguments(**arguments)
        made._n_gpu = min(made.n_gpu, 1)  # one device, also where there are several
        trainer = Trainer(
            model=module,
            args=made,
            data_collator=_one,
            train_dataset=list(batches),  # type: ignore[arg-type]
            optimizers=(optimizer, None),
            callbacks=[watch, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for results
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except NonFiniteError as error:
            at = trainer.state.global_step + 1
            raise NonFiniteError(f"step {at} of {steps}: {error.message}", error.hint) from None
        finally:
            watch.close()
        if trainer.state.global_step < steps:
            raise RunAgainError
    return 0 if last is None else _number(last)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint; what a killed process left half-written is deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=_number)
    for path in found:
        if not (path / _MARK).exists():
            files.remove(path)
    whole = [path for path in found if path.exists()]
    return whole[-1] if whole else None


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _contiguous(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """safetensors takes contiguous tensors only; down-projections may lie neuron-major (`surgery.pack`)."""
    for name in state:
        state[name] = state[name].contiguous()


def _one(items: Sequence[Batch]) -> dict[str, Batch]:
    (batch,) = items
    return {"batch": batch}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows progress, refuses gradients that are not finite, marks checkpoints as complete."""

    def __init__(self, module: nn.Module, folder: Path, name: str, control: Control) -> None:
        self._module, self._folder, self._name, self._control = module, folder, name, control
        self._progress: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = range(state.global_step, state.max_steps)
        self._progress = iter(self._control.track(left, self._name, len(left)))
        next(self._progress, None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients: list[Tensor] = [p.grad for p in self._module.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise NonFiniteError("gradients are not finite", SMALLER)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._control.stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        else:
            next(self._progress, None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._folder / f"checkpoint-{state.global_step}"
        for path in sorted(folder.iterdir()):
            files.fsync(path)
        files.atomic_write(folder / _MARK, b"")

    def close(self) -> None:
        close = getattr(self._progress, "close", None)
        if close is not None:
            close()


SMALLER = "use a smaller --learning-rate, or --autocast none; what was there before stays as it is"


@contextmanager
def _alone() -> Iterator[None]:
    """Hide torchrun's variables: this stage is done by one process, and accelerate would wait for the others."""
    hidden = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
