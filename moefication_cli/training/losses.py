"""What fine-tuning can minimise: distances of the converted model's outputs to the dense model's, and the task's own loss.

Axes: P predictions, C classes or vocabulary, T real tokens, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.conversion.learnable import distance
from moefication_cli.runs.data import flat_predictions
from moefication_cli.tasks.examples import Batch, Examples


def _kl(found: Any, dense: Any, batch: Batch, examples: Examples) -> Tensor:
    """Mean KL(dense || converted) per prediction, in nats; of embeddings 1 - cosine."""
    dense_PC, found_PC = (flat_predictions(batch.answers(outputs), batch) for outputs in (dense, found))
    return distance(dense_PC, found_PC, batch)


def _hidden(found: Any, dense: Any, batch: Batch, examples: Examples) -> Tensor:
    """Squared distance of the hidden states of real tokens relative to the dense ones' squares, averaged over the layers.

    As in the hidden-state distillation of TinyBERT (arXiv 1909.10351, section 3.1, L_hidn), made free of scale.
    """
    return torch.stack([
        (mine_TD - other_TD).square().sum() / other_TD.square().sum()
        for mine_TD, other_TD in zip(_states(found, batch), _states(dense, batch), strict=True)
    ]).mean()  # fmt: skip


def _states(outputs: Any, batch: Batch) -> list[Tensor]:
    """Every layer's hidden states at real tokens, [T, D], the encoder's first; embeddings are left out."""
    found = []
    for name, stack in (("hidden_states", "encoder"), ("encoder_hidden_states", "encoder"),
                        ("decoder_hidden_states", "decoder")):  # fmt: skip
        for state in (getattr(outputs, name, None) or ())[1:]:
            real = batch.mask_of(stack)  # type: ignore[arg-type]
            found.append(state.float() if real is None else state[real.to(state.device).bool()].float())
    return found


def _task(found: Any, dense: Any, batch: Batch, examples: Examples) -> Tensor:
    """Cross-entropy with the data's labels, masked or next tokens, per prediction, in nats."""
    logits_PC = flat_predictions(batch.answers(found), batch)
    return functional.cross_entropy(logits_PC, examples.targets(batch).to(logits_PC.device))


LOSSES: dict[str, Callable[[Any, Any, Batch, Examples], Tensor]] = {"kl": _kl, "hidden": _hidden, "task": _task}


def total_loss(names: Sequence[str], found: Any, dense: Any, batch: Batch, examples: Examples) -> Tensor:
    """The sum of the losses named."""
    return torch.stack([LOSSES[name](found, dense, batch, examples) for name in dict.fromkeys(names)]).sum()
