"""What stands in for one FFN of a loaded model at run time: the layer, and the weights and tokens it is given. See `surgery`."""

import copy
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moefication_cli.ffn import ExpertWeights
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.projections import pack_parts, rows_of, same_memory, views, without_memory
from moefication_cli.models.sites import FFNSite


class FFNLayer(Protocol):
    """What can stand in for an FFN, such as `runtime.layer.MoEFFN`: x[..., D], real tokens [...] -> y[..., D]."""

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor: ...


class Bypass(nn.Identity):
    """In the place of an FFN's activation while a layer computes the FFN; `stands_for` is that activation."""

    def __init__(self, stands_for: Any) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", stands_for)  # unseen by the state dict


class Installed:
    """What one swapped FFN needs at run time. Lives in the `__dict__` of `up`, unseen by the state dict."""

    def __init__(
        self,
        up: nn.Module,
        gate: nn.Module | None,
        down: nn.Module,
        act_parent: nn.Module | None,
        act_name: str,
        site: FFNSite,
        layer: FFNLayer,
        token_mask: TokenMask | None,
        placed: list[Any],
    ) -> None:
        self.placed = placed  # projections that accelerate has placed; `up` is the first, if any
        self.up, self.gate, self.down, self.site = up, gate, down, site
        self.act_parent, self.act_name = act_parent, act_name
        self.act = None if act_parent is None else getattr(act_parent, act_name)
        self.block: Any = None  # what answers for all of it
        self.parts = (up, down) if gate is None else (up, down, gate)
        self.held: Tensor | None = None  # between `up` and a `down` that recalls it
        self.layer, self.token_mask = layer, token_mask
        self.seen = 0  # address of the weights that the layer's views were derived from; 0: derive them

    def __call__(self, x: Tensor) -> Tensor:
        y = self._run(x)
        if self.act_parent is None:
            self.held = y
        return y

    def answers_for(self, block: nn.Module) -> bool:
        """Whether the block hands the FFN its own input and gives back what that computed, seen with an FFN that cannot be guessed."""
        weight = self.up._parameters["weight"]
        if weight is None or weight.is_meta:
            return False
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        x = torch.linspace(-2, 3, 3 * self.site.d_model, dtype=dtype, device=weight.device).view(1, 3, -1)
        y, seen = x.flip(-1) * 0.75, list[Tensor]()

        def guess(given: Tensor, token_mask: Tensor | None = None) -> Tensor:
            seen.append(given)
            return y

        before = self.layer, self.token_mask, self.seen
        self.layer, self.token_mask = guess, None  # type: ignore[assignment]
        try:
            with torch.no_grad():
                found = block(x)
        except Exception:  # it takes something else; its own code may raise anything
            return False
        finally:
            (self.layer, self.token_mask, self.seen), self.held = before, None
        same = isinstance(found, Tensor) and found.shape == y.shape and torch.equal(found, y)
        return same and len(seen) == 1 and torch.equal(seen[0], x)

    def watched(self) -> bool:
        """Whether somebody looks at the projections' calls, which then have to happen."""
        for part in self.parts:
            if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
                return True
        return False

    def recall(self) -> Tensor:
        """What the last call computed, once."""
        y, self.held = self.held, None
        assert y is not None, f"{self.site.name}: its down projection was called without the up projection"
        return y

    def _run(self, x: Tensor) -> Tensor:
        if not self.placed:
            return self.compute(x)
        up, *others = self.placed
        offloaded = any(part._hf_hook.offload for part in self.placed)
        y = x
        try:
            for part in others:
                part._hf_hook.pre_forward(part)
            (x,), _ = up._hf_hook.pre_forward(up, x)
            if offloaded:
                self.seen = 0  # memory that was given back can lie at the same address again
            y = self.compute(x)
        finally:
            for part in others:
                part._hf_hook.post_forward(part, None)
            y = up._hf_hook.post_forward(up, y)
            if offloaded and isinstance(weights := getattr(self.layer, "weights", None), ExpertWeights):
                self.layer.weights = without_memory(weights)  # type: ignore[attr-defined]
        return y

    def compute(self, x: Tensor) -> Tensor:
        """The layer's y of x, with weights where they are now; for what accelerate has placed see `_run`."""
        weight: Tensor = self.up._parameters["weight"]  # type: ignore[assignment]
        learns = weight.requires_grad and torch.is_grad_enabled()
        # Views belong to the parameters' storage of the moment; under autograd also to one graph
        if learns or self.seen != weight.data_ptr():
            self._renew(learns, moved=self.seen != 0)
            self.seen = 0 if learns else weight.data_ptr()
        mask = None
        if self.token_mask is not None and self.token_mask.hides:
            mask = self.token_mask.mask_for(self.site.stack, x.shape[:-1])
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        if x.dtype != dtype:
            x = x.to(dtype)
        return self.layer(x) if mask is None else self.layer(x, mask.to(x.device).view(x.shape[:-1]))

    def _renew(self, learns: bool, moved: bool) -> None:
        weights = getattr(self.layer, "weights", None)
        if not isinstance(weights, ExpertWeights):
            return
        if not (rows_of(self.up, True).is_contiguous() and rows_of(self.down, False).is_contiguous()):
            pack_parts(self.up, self.gate, self.down)
        ffn = views(self.up, self.gate, self.down, self.site)
        # Installed before (`eval` takes layers in turns): what the layer has prepared stays good. Not where memory moved under
        # the views as well, as `share_memory` and sending to another process do: what is prepared holds the old addresses.
        if not learns and not moved and same_memory(ffn, weights.ffn):
            return
        if not learns:
            detached: dict[str, Any] = {k: v.detach() for k, v in vars(ffn).items() if isinstance(v, Tensor)}
            ffn = replace(ffn, **detached)
        device = ffn.w_up_FD.device
        extra = None if weights.compensation is None else weights.compensation.to(device)
        self.layer.weights = replace(weights, ffn=ffn, compensation=extra)  # type: ignore[attr-defined]
        router = getattr(self.layer, "router", None)
        if router is not None:
            self.layer.router = router.to(device)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the layer's weights are views on parameters that are copied as well, so they are left out
        (tensors without memory stand for them) and derived anew on the first call.
        """
        layer: Any = copy.copy(self.layer)
        weights = getattr(layer, "weights", None)
        if isinstance(weights, ExpertWeights):
            layer.weights = without_memory(weights)
        return {**self.__dict__, "layer": layer, "seen": 0, "held": None}
