"""What makes an FFN sparser: penalties on the activations a ReLU lets through. Axes: T real tokens, F neurons.

D2DMoE (Szatkowski et al., arXiv 2310.04361, section 3.1) trains with the squared Hoyer measure, which does not care how large
activations are; l1 pulls all of them towards zero alike. Averaged over tokens, then over FFNs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.models.masking import TokenMask
from moefication_cli.models.relu import activation_modules
from moefication_cli.models.sites import FFNSite

_EPSILON = 1e-15  # of the published code: a token at which no neuron fires counts nothing


def l1(a_TF: Tensor) -> Tensor:
    """Sum of magnitudes of a token's activations, in the mean over tokens."""
    return a_TF.abs().sum(-1).mean()


def hoyer(a_TF: Tensor) -> Tensor:
    """(sum of magnitudes)^2 / sum of squares, between 1 (one neuron fires) and F, in the mean over tokens."""
    return (a_TF.abs().sum(-1).square() / (a_TF.square().sum(-1) + _EPSILON)).mean()


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "hoyer": hoyer}


class Penalty:
    """Listens to the activations of all FFNs of a model; `take` gives the penalty of the forward pass that just ended."""

    def __init__(self, model: nn.Module, sites: Sequence[FFNSite], kind: str) -> None:
        self._of, self._mask = PENALTIES[kind], TokenMask(model)
        self._found: list[Tensor] = []
        for site, module in zip(sites, activation_modules(model, sites), strict=True):
            module.register_forward_hook(self._listener(site))

    def _listener(self, site: FFNSite) -> Callable[..., None]:
        def listen(module: nn.Module, args: Any, output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            a_TF = output.reshape(-1, output.shape[-1]).float()
            real_T = self._mask.mask_for(site.stack, output.shape[:-1])
            self._found.append(self._of(a_TF if real_T is None else a_TF[real_T.to(a_TF.device)]))

        return listen

    def take(self) -> Tensor | None:
        """The mean over FFNs; None where all of them ran as experts, whose activations are not to be had."""
        found, self._found = self._found, []
        return torch.stack(found).mean() if found else None
