"""Which tensors fine-tuning trains, under which names and in what steps; and the module around them that `Trainer` sees.

Routers and corrections are those of `straight_through`; weights are the model's own parameters. Step sizes are relative to a
tensor's root mean square, so that one number serves all tensors; by width they fall as 1 / sqrt(d), because Adam's steps should
fall as 1 / d and weights are of size 1 / sqrt(d) (Tensor Programs V, arXiv 2203.03466, table 3).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.config import FinetuneConfig
from moefication_cli.conversion.learnable import Conversion
from moefication_cli.conversion.refine import LEARNING_RATE, signal
from moefication_cli.errors import NonFiniteError
from moefication_cli.tasks.examples import Batch, Examples
from moefication_cli.training.losses import total_loss
from moefication_cli.training.trainer import SMALLER

_WEIGHT_RATE = 0.08  # times 1 / sqrt(d)


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained, and Adam's step as a share of its size; `size` where the tensor starts at zero."""

    tensor: nn.Parameter
    rate: float
    size: float | None = None

    def group(self) -> dict[str, Any]:
        """The optimizer's group."""
        size = self.size or float(self.tensor.detach().float().square().mean().sqrt()) or 1e-3
        return {"params": [self.tensor], "lr": self.rate * size}


@dataclass(frozen=True)
class Rates:
    """Adam's steps, as shares of the size of what they move, for routers and corrections and for weights."""

    selection: float
    weights: float


def rates(conversion: Conversion, config: FinetuneConfig, batch: Batch) -> Rates:
    """The rates asked for, or the defaults, which are smaller where a batch like this one makes few predictions."""
    part = min(1.0, signal(conversion, batch) * config.accumulate)
    asked, d_model = config.learning_rate, conversion.plans[0].layer.site.d_model
    of_router = asked if config.train == "router" else None
    return Rates(of_router or LEARNING_RATE * part, asked or _WEIGHT_RATE / math.sqrt(d_model) * part)


def selection_tensors(conversion: Conversion, rate: float) -> dict[str, Trained]:
    """Routers (with thresholds) and corrections of every layer, made parameters. Call after the model has run once."""
    found = {}
    for number, layer in conversion.layers.items():
        for name, tensor in layer.parameters.items():
            size = layer.step_size(name)
            layer.parameters[name] = parameter = nn.Parameter(tensor.detach())
            found[f"{number}.{name}"] = Trained(parameter, rate, size)
    return found


def weight_tensors(conversion: Conversion, train: str, rate: float) -> dict[str, Trained]:
    """The model's own parameters that `--train` names, by their names in the model; none for router and lora."""
    net = conversion.loaded.model
    in_ffns = {piece.parameter for plan in conversion.plans for piece in plan.layer.site.slices()}
    wanted = {"ffn": lambda name: name in in_ffns, "all": lambda name: True}.get(train, lambda name: False)
    found = {}
    for name, parameter in net.named_parameters():
        if wanted(name) and parameter.is_floating_point():
            parameter.requires_grad_(True)
            found[name] = Trained(parameter, rate)
    return found


class Learner(nn.Module):
    """What `Trainer` trains and saves: the trained tensors and the price of compute; the model itself is not in it.

    `forward` gives the loss of one batch. The price follows what is spent as in refinement, one batch after another.
    """

    price: Tensor
    average: Tensor

    def __init__(
        self,
        conversion: Conversion,
        trained: dict[str, Trained],
        examples: Examples,
        config: FinetuneConfig,
        target: float,
        price: float,
    ) -> None:
        super().__init__()
        self._conversion, self._examples, self._losses = conversion, examples, config.loss
        self._target, self._share = target, 1 / config.accumulate
        self.tensors = nn.ParameterDict({name.replace(".", "/"): entry.tensor for name, entry in trained.items()})
        self.register_buffer("price", torch.tensor(price, dtype=torch.float64))
        self.register_buffer("average", torch.tensor(target, dtype=torch.float64))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": losses + price of the share of dense that was computed}. Raises NonFiniteError."""
        hidden = "hidden" in self._losses
        with torch.no_grad():
            dense = self._conversion.outputs(batch, dense=True, hidden=hidden)
        found = self._conversion.outputs(batch, hidden=hidden)
        spent = self._conversion.spent()
        loss = total_loss(self._losses, found, dense, batch, self._examples) + float(self.price) * spent
        if not bool(loss.isfinite()):
            raise NonFiniteError("the loss is not finite", SMALLER)
        with torch.no_grad():
            self.average += 0.1 * self._share * (float(spent) - self.average)
            self.price *= torch.exp(self._share * (self.average / self._target - 1).clamp(-0.1, 0.1))
        return {"loss": loss}
