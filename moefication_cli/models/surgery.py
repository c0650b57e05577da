"""Puts a mixture of experts in place of one FFN of a loaded model, without changing names, shapes or other modules.

`install` swaps the classes of the FFN's own projections, because transformers keeps BERT's, BART's and OPT's FFNs
inline and there often is no module to replace: `up` computes the whole FFN, `gate` and the activation become neutral,
`down` passes through; where the activation is called by the model's code and cannot be made neutral, `down` ignores its
input and gives what `up` computed. Where gate and up are one projection (Phi-3, ModernBERT), that projection answers with ones for the
gate and the FFN's output for up: what the block does next, split, activate, multiply, gives the output, and no forward of
a model is replaced, whatever else it does. Where the projections have a module of their own that does nothing else (`LlamaMLP`, T5's
`DenseReluDense`), that one also answers at once, without the calls of its parts: of a small model they are most of the FFN's time.
The state dict, `save_pretrained`, `.to()`, `deepcopy`, pickle and
`torch.compile` go on working; dense and sparse execution share one copy of the weights, stored neuron-major behind the
dense names. Axes as in `ffn`. In training, dropout that sat between activation and `down` (T5, BART, ModernBERT) acts on
the FFN's output instead; evaluation is unaffected.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.installed import Bypass, FFNLayer, Installed
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.projections import pack_parts, views
from moefication_cli.models.sites import FFNSite

_STATE = "_moefication"  # in the __dict__ of an installed FFN's `up`
_FROM = "_moefication_from"  # the same, in that of a `down` that gives what `up` computed
_WHOLE = "_moefication_whole"  # the same, in that of a module that is the FFN and nothing else


def live_weights(model: nn.Module, site: FFNSite) -> FFNWeights:
    """The FFN's weights as views on the model's parameters, neuron-major: changing one changes the other.

    Derive them again after `.to()`, `deepcopy` or anything else that replaces parameters (`install` does so by itself).
    """
    return views(_part(model, site.up), _part(model, site.gate), _part(model, site.down), site)


def pack(model: nn.Module, site: FFNSite) -> None:
    """Stores all projections neuron-major behind their dense names and shapes, one FFN's worth of extra memory at most.

    `down` of shape [D, F] gets strides (1, D): `F.linear` is as fast as before, and an expert is one contiguous block.
    Projections of different dtypes (float16 T5 keeps `wo` in float32) get the widest of them.
    """
    pack_parts(_part(model, site.up), _part(model, site.gate), _part(model, site.down))


def permute_in_place(model: nn.Module, site: FFNSite, order_F: Tensor) -> None:
    """Reorders the neurons of one FFN; the model computes the same function. Position i becomes neuron order_F[i]."""
    with torch.no_grad():
        for name, (axis, order) in site.parameter_orders(order_F).items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def ffn_twin(model: nn.Module, sites: Sequence[FFNSite]) -> nn.Module:
    """A copy of the model that has FFN weights of its own and shares every other tensor with it."""
    own = {part.parameter for site in sites for part in site.slices()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in tensors.items() if name not in own})


def install(model: nn.Module, site: FFNSite, layer: FFNLayer, token_mask: TokenMask | None = None) -> None:
    """Lets `layer` compute this FFN, in place; called on an installed FFN it exchanges the layer.

    With `token_mask` the layer is told which tokens are real. A layer with an attribute `weights: ExpertWeights` gets
    its views renewed whenever the model's parameters have moved (device, dtype, deepcopy).
    What accelerate has spread over devices or offloaded (a `device_map`) works: the FFN takes over the hooks of its projections.
    Raises UnsupportedModelError where one FFN's projections are to compute on several devices, or do not run their own `forward`.
    """
    up, gate, down = _part(model, site.up), _part(model, site.gate), _part(model, site.down)
    state = up.__dict__.get(_STATE)
    if isinstance(state, Installed):
        state.layer, state.token_mask = layer, token_mask
        state.seen = 0
        return
    placed = _placements(model, site)
    pack(model, site)
    for part in placed:  # the hooks stay, for `save_pretrained`; `Installed` calls them for all projections at once
        del part.forward, part._old_forward
    parent, name = _owner(model, site.act) if site.act else (None, "")
    state = Installed(up, gate, down, parent, name, site, layer, token_mask, placed)
    object.__setattr__(up, _STATE, state)
    last = _PassThrough if parent is not None else _Recall
    swaps: list[tuple[Any, Any]] = [(up, _Experts), (down, last), (gate, _One)]
    if site.fused:
        swaps = [(up, _FusedExperts), (down, last)]
    for part, mixin in swaps:
        if part is not None:
            part.__class__ = _subclass(part.__class__, mixin)
    if parent is not None:
        setattr(parent, name, Bypass(state.act))
    else:
        object.__setattr__(down, _FROM, state)
    if not placed:
        _shorten(model, state)


def _shorten(model: nn.Module, state: Installed) -> None:
    """Lets the module that holds the projections answer for them, if that is all it does."""
    paths = [path for path in (state.site.up, state.site.gate, state.site.down) if path is not None]
    owners = {path.rpartition(".")[0] for path in paths}
    if len(owners) > 1 or "" in owners:
        return
    block: Any = model.get_submodule(owners.pop())
    parts = {id(part) for part in state.parts}
    known = all(id(part) in parts or isinstance(part, nn.Dropout | nn.Identity) for part in block.children())
    alone = known and not block._parameters and not block._buffers and not block.training
    if alone and "forward" not in block.__dict__ and state.answers_for(block):
        state.block = block
        object.__setattr__(block, _WHOLE, state)
        block.__class__ = _subclass(block.__class__, _Block)


def uninstall(model: nn.Module, site: FFNSite) -> None:
    """Gives the FFN its dense computation back; the weights stay packed, which changes nothing to a caller."""
    state = _part(model, site.up).__dict__.pop(_STATE, None)
    if not isinstance(state, Installed):
        return
    for part in {id(part): part for part in state.parts}.values():
        part.__class__ = type(part).__bases__[1]
    if state.placed:
        from accelerate.hooks import add_hook_to_module  # which placed them
    for part in state.placed:
        add_hook_to_module(part, part._hf_hook)
    state.down.__dict__.pop(_FROM, None)
    if state.block is not None:
        del state.block.__dict__[_WHOLE]
        state.block.__class__ = type(state.block).__bases__[1]
    if state.act_parent is not None:
        setattr(state.act_parent, state.act_name, state.act)


def is_installed(model: nn.Module, site: FFNSite) -> bool:
    """Whether something stands in for this FFN."""
    return _STATE in model.get_submodule(site.up).__dict__


def installed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers standing in for FFNs, by site name, in execution order."""
    states = [module.__dict__[_STATE] for module in model.modules() if _STATE in module.__dict__]
    return {state.site.name: state.layer for state in sorted(states, key=lambda state: state.site.index)}


class _Swapped:
    """A projection of an installed FFN. Its class is made at run time, so pickle is told what it is made of."""

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, kind = type(self).__bases__
        return swapped_module, (kind, mixin), self.__dict__


class _Experts(_Swapped):
    def forward(self, x: Tensor) -> Tensor:
        state = self.__dict__[_STATE]
        # Routing and compiled kernels are no graph for torch.compile: it calls them between its own graphs
        return _outside_of_graphs(state, x) if torch.compiler.is_compiling() else state(x)


class _Block(_Swapped):
    """A module that is the FFN and nothing else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[_WHOLE]
        # In training there may be dropout
        if kwargs or len(args) != 1 or self.__dict__["training"] or state.watched():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _outside_of_graphs(state.compute, *args) if torch.compiler.is_compiling() else state.compute(*args)


class _FusedExperts(_Experts):
    """Both halves of a fused projection: ones for the gate, on which the activation is the identity, and y for up."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([torch.ones_like(y), y], dim=-1)


class _PassThrough(_Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _Recall(_Swapped):
    """What `up` computed, whatever the activation made of it on the way."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.__dict__[_FROM]
        return _outside_of_graphs(state.recall) if torch.compiler.is_compiling() else state.recall()


class _One(_Swapped):
    """The gate's share of identity(1) * y."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_graphs(call: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return call(*given)


@cache
def _subclass(kind: Any, mixin: Any) -> type:
    # One class per pair, so that compiled code sees equal layers as equal
    return type(f"{mixin.__name__[1:]}{kind.__name__}", (mixin, kind), {})


def swapped_module(kind: Any, mixin: Any) -> Any:
    """What copies and pickles call for a projection of an installed FFN, before they set its state: pickled models name it."""
    made = _subclass(kind, mixin)
    return made.__new__(made)  # type: ignore[call-overload]


def _placements(model: nn.Module, site: FFNSite) -> list[Any]:
    """The projections that accelerate has placed, `up` first. Raises UnsupportedModelError, see `install`."""
    paths = list(dict.fromkeys(path for path in (site.up, site.gate, site.down) if path is not None))
    placed = [path for path in paths if "forward" in model.get_submodule(path).__dict__]
    hooks = {path: model.get_submodule(path).__dict__.get("_hf_hook") for path in placed}
    for path, hook in hooks.items():
        if not hasattr(hook, "execution_device"):
            raise UnsupportedModelError(
                f"{path} is wrapped and does not run its own forward", "wrap the loaded mixture"
            )
    devices = {str(hook.execution_device) for hook in hooks.values()}  # type: ignore[union-attr]
    if placed and (len(devices) > 1 or placed != paths):
        raise UnsupportedModelError(
            f"{site.name}: its projections are placed on several devices: {', '.join(sorted(devices))}",
            "place whole layers, as device_map='auto' does, or {'model.layers.0': 0, 'model.layers.1': 1, ...}",
        )
    return [model.get_submodule(path) for path in placed]


def _part(model: nn.Module, path: str | None) -> Any:
    return None if path is None else model.get_submodule(path)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
