"""Listens to the FFNs of a running model: their inputs and activations, real tokens only.

Axes as in `ffn`. Stores nothing; what is delivered is gone with the next forward pass unless the listener
keeps it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite
from moefication_cli.models.surgery import is_installed, live_weights

Listener = Callable[[FFNSite, Tensor], None]


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[FFNSite],
    on_input: Listener | None = None,
    on_hidden: Listener | None = None,
    token_mask: TokenMask | None = None,
    verify: bool = True,
) -> Iterator[TokenMask]:
    """While open, every forward pass of the (dense) model delivers each FFN's real tokens, padding never.

    `on_input(site, x_TD)`: what the FFN reads; `on_hidden(site, h_TF)`: its activations. Both are detached views or
    copies in the model's dtype and on its device, in the order the sites run. Where a mixture of experts is installed,
    only `on_input` makes sense.
    With `verify` the first pass compares a few activations with `FFNWeights.hidden` and raises UnsupportedModelError if
    the module computes something else than its family's row says.
    """
    mask = token_mask or TokenMask(model)
    handles: list[RemovableHandle] = []
    for site in sites:
        listener = _Listener(model, site, mask, on_input, on_hidden, verify and not model.training)
        handles.append(model.get_submodule(site.up).register_forward_pre_hook(listener.input))
        if on_hidden is not None or listener.verify:
            handles.append(model.get_submodule(site.down).register_forward_pre_hook(listener.hidden))
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()
        if token_mask is None:
            mask.remove()


class _Listener:
    """The two hooks on one FFN."""

    def __init__(
        self,
        model: nn.Module,
        site: FFNSite,
        mask: TokenMask,
        on_input: Listener | None,
        on_hidden: Listener | None,
        verify: bool,
    ) -> None:
        self.model, self.site, self.mask = model, site, mask
        self.on_input, self.on_hidden = on_input, on_hidden
        self.verify = verify and not is_installed(model, site)
        self.sample: Tensor | None = None

    def input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.verify:
            self.sample = args[0].detach().reshape(-1, self.site.d_model)[:4]
        if self.on_input is not None:
            self.on_input(self.site, self._real(args[0]))

    def hidden(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.verify and self.sample is not None:
            self._check(args[0].detach().reshape(-1, self.site.num_neurons)[: len(self.sample)])
        if self.on_hidden is not None:
            self.on_hidden(self.site, self._real(args[0]))

    def _real(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1])
        real_T = self.mask.mask_for(self.site.stack, x.shape[:-1])
        # index_select: several times faster than indexing with the mask
        return flat if real_T is None else flat.index_select(0, real_T.to(flat.device).nonzero().squeeze(1))

    def _check(self, seen_TF: Tensor) -> None:
        self.verify = False
        assert self.sample is not None
        weights = live_weights(self.model, self.site)
        if weights.w_up_FD.device.type == "meta":  # offloaded: nothing to compare with
            return
        with torch.no_grad():
            expected_TF = weights.hidden(self.sample.to(weights.w_up_FD.dtype)).float()
        error = (expected_TF - seen_TF.float()).abs().max()
        tolerance = 0.05 if self.sample.dtype.itemsize < 4 or weights.w_up_FD.dtype.itemsize < 4 else 1e-3
        # NaN compares false: non-finite activations are reported by whoever collects them
        if error > tolerance * (1e-3 + expected_TF.abs().max()):
            raise UnsupportedModelError(
                f"{self.site.name}: this FFN does not compute act(x W + b) as family {self.site.family!r} does",
                'describe it by hand with --ffn "up=...,gate=...,down=...,act=...", or use another model',
            )
