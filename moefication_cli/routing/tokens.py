"""Tokens of one layer as routers and calibration read them. Axes: T tokens, D model width. Pure tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """FFN inputs, how much each token's FFN output matters, and which sequence it came from.

    `weight_T` is in nats per squared unit of output (the Fisher information of `models.sensitivity`), or 1 for every
    token where it was not measured; within a layer only ratios count. Without `sequence_T` every token is its own.
    """

    x_TD: Tensor
    weight_T: Tensor
    sequence_T: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_TD)

    def pick(self, chosen_T: Tensor) -> "Tokens":
        """These tokens, by index or mask."""
        sequence_T = None if self.sequence_T is None else self.sequence_T[chosen_T]
        return Tokens(self.x_TD[chosen_T], self.weight_T[chosen_T], sequence_T)

    def to(self, device: torch.device) -> "Tokens":
        """The same tokens on another device."""
        sequence_T = None if self.sequence_T is None else self.sequence_T.to(device)
        return Tokens(self.x_TD.to(device), self.weight_T.to(device), sequence_T)

    def split_heldout(self, fraction: float, seed: int) -> "tuple[Tokens, Tokens]":
        """(training, held-out) tokens, divided by sequence so that no sentence is on both sides."""
        sequence_T = torch.arange(len(self)) if self.sequence_T is None else self.sequence_T
        ids = torch.unique(sequence_T)
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        if len(ids) < 2:
            held_T = torch.arange(len(self)) >= int(len(self) * (1 - fraction))
        else:
            held_T = torch.isin(sequence_T, order[: max(1, round(fraction * len(ids)))])
        return self.pick(~held_T), self.pick(held_T)

    def sample(self, count: int, seed: int) -> "Tokens":
        """At most `count` tokens drawn at random."""
        if count >= len(self):
            return self
        return self.pick(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values)
