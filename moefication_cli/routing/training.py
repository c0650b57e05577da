"""What kinds of routers share: their sample, their training options, the table's row, and steps of gradient descent.

Axes: T tokens, D model width, E experts, R router width. Pure tensors; saves nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from moefication_cli.config import RouterConfig, Score
from moefication_cli.errors import NonFiniteError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import Router, TwoLayerRouter
from moefication_cli.routing.scores import captured_share

Loss = Callable[[Tensor, Tensor], Tensor]
R = TypeVar("R", bound=Router)
WATCH_FRACTION = 0.2  # the captured share at this active fraction decides the best epoch
START_TOKENS = 20000  # enough for the closed-form start
_WARM_SHARE, _WARM_STEPS = 0.1, 1.5  # of a one-cycle schedule: the rate rises over this share, or so many steps if more


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained; `published`: as MoEfication's code does, from centroids and with its schedule.

    `width` is the hidden width asked for, None for what the kind chooses.
    """

    epochs: int = 4  # six lower a BERT's predicted error by 0.4 % at a fifth of its FLOPs, by 1.7 % at a tenth
    batch_size: int = 1024
    learning_rate: float = 1e-2
    patience: int = 3
    seed: int = 0
    width: int | None = None
    published: bool = False


@dataclass(frozen=True)
class RouterSample:
    """Tokens of one layer: FFN inputs x_TD and expert scores target_TE, for training and held out by sequence."""

    x_TD: Tensor
    target_TE: Tensor
    heldout_x_TD: Tensor
    heldout_target_TE: Tensor


@dataclass(frozen=True)
class TrainedRouter:
    """A router and its held-out measure after each epoch (0 = before training): captured share, or squared error."""

    router: Router
    history: list[float] = field(default_factory=list)
    best_epoch: int = 0


@dataclass(frozen=True)
class RouterKind:
    """A row of `routers.ROUTERS`: everything the rest of the package asks of a kind of router.

    train       (weights, sample, training) -> routers for budgets to choose from, the dearest first; without a
                calibration curve the last one is used
    form        class that reads what is stored
    defaults    training options where the user names none
    calibrated  its scores predict contributions in one unit for all tokens: a threshold, a budget shared between
                layers and a compensation can be calibrated on them
    learns      it is fitted to tokens; others need none
    score       what an expert is worth, where the user does not say
    """

    train: Callable[[ExpertWeights, RouterSample, RouterTraining], list[TrainedRouter]]
    form: type[Router] = TwoLayerRouter
    defaults: RouterTraining = RouterTraining()
    calibrated: bool = False
    learns: bool = True
    score: Score = "activation"

    def training(self, config: RouterConfig, seed: int) -> RouterTraining:
        """The options of `config`, this kind's where it names none, the paper's under `recipe="paper"`."""
        if config.recipe == "paper":
            return replace(PUBLISHED, seed=seed, width=config.width)
        return RouterTraining(
            epochs=config.epochs or self.defaults.epochs,
            batch_size=config.batch_size or self.defaults.batch_size,
            learning_rate=config.learning_rate or self.defaults.learning_rate,
            patience=config.patience,
            seed=seed,
            width=config.width,
        )


# The published training (github.com/thunlp/MoEfication), its defects mended as `routers.mlp` says.
PUBLISHED = RouterTraining(epochs=30, batch_size=512, learning_rate=1e-2, patience=30, published=True)


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Rises to `rate` over the first tenth of the steps and falls to almost nothing.

    The rise takes 1.5 steps at least: torch divides by its length less one step, which is zero for 9 steps.
    """
    total = steps + 1
    warm = max(_WARM_SHARE, min(1.0, _WARM_STEPS / total))
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=warm)


def parameters_of(router: Router) -> dict[str, Tensor]:
    """Copies of a router's tensors that gradients are computed for."""
    return {name: tensor.clone().requires_grad_() for name, tensor in router.tensors().items()}


def trained_copy(like: R, parameters: dict[str, Tensor]) -> R:
    """The router of these parameters as they stand, cut off from autograd."""
    return like.with_tensors({name: tensor.detach().clone() for name, tensor in parameters.items()})


def step_through(
    parameters: dict[str, Tensor],
    like: TwoLayerRouter,
    x_TD: Tensor,
    target_TE: Tensor,
    batches: Sequence[Tensor | slice],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One optimiser step per batch of token indices; inputs come normalised where the router normalises.

    Raises NonFiniteError when the last batch's loss is not finite.
    """
    router = like.with_tensors(parameters)
    for index_B in batches:
        value = loss(router.scores_of(x_TD[index_B]), target_TE[index_B])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        scheduler.step()
    if not torch.isfinite(value):
        raise NonFiniteError("the router's loss is not finite", "lower --learning-rate or check the activations")


def watched_share(router: Router, sample: RouterSample) -> float:
    """Captured share of the held-out targets at WATCH_FRACTION of the experts."""
    top_k = max(1, round(WATCH_FRACTION * router.num_experts))
    with torch.inference_mode():
        return captured_share(router.scores(sample.heldout_x_TD), sample.heldout_target_TE, top_k)
