"""What `bench` sets side by side: a stock model, the same as a mixture of experts, and single FFNs of both.

Dense stays what transformers made: the MoE is a twin that shares parameters until it repacks its own `down`. Random
routers have the form and width of trained ones and their scores are standardised per expert, so that experts are
selected about equally often. Axes as in `ffn`; R router width.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.benchmark.bounds import FFNCost
from moefication_cli.benchmark.int8 import dynamic_twin
from moefication_cli.benchmark.peers import Beside, peer_ffns
from moefication_cli.benchmark.shapes import set_firing, share
from moefication_cli.config import BenchConfig
from moefication_cli.ffn import ACTIVATIONS, Compensation, ExpertWeights
from moefication_cli.models.installed import FFNLayer
from moefication_cli.models.int8 import quantise_model
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import FFNSite
from moefication_cli.models.surgery import install, live_weights, pack
from moefication_cli.routing.cost import overhead_flops
from moefication_cli.routing.router import Router, TwoLayerRouter
from moefication_cli.routing.rules import Rule, TopK
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.split.partition import check_divides

_WIDTH_SHARE = 8  # hidden width of random routers is d_model / 8, at least 16, as train-router makes them
_MOST_LAYERS = 256
SAMPLE = 256  # tokens on which biases and random routers are set and firing neurons counted


@dataclass(frozen=True)
class LayerSetup:
    """How one FFN becomes experts."""

    num_experts: int
    num_shared: int
    router: Router
    rule: Rule
    compensation: Compensation | None = None

    def install(self, model: nn.Module, site: FFNSite, backend: str, mask: TokenMask | None = None) -> MoEFFN:
        """Puts the MoE in place of the FFN of a twin; the original keeps its weights as they are."""
        pack(model, site)
        weights = ExpertWeights(live_weights(model, site), self.num_experts, self.num_shared, self.compensation)
        layer = MoEFFN(weights, self.router, self.rule, backend=backend)
        install(model, site, layer, mask)
        return layer

    def rule_at(self, fraction: float | None) -> Rule:
        """The best `max(1, round(fraction * E))` experts; None keeps the rule there is."""
        return self.rule if fraction is None else TopK(max(1, round(fraction * self.num_experts)))


def setup_of(layer: MoEFFN) -> LayerSetup:
    """The setup of a layer that is loaded."""
    assert layer.router is not None and layer.rule is not None
    weights = layer.weights
    return LayerSetup(weights.num_experts, weights.num_shared, layer.router, layer.rule, weights.compensation)


def random_setup(site: FFNSite, config: BenchConfig, expert_size: int, x_TD: Tensor, seed: int) -> LayerSetup:
    """A random router for one FFN. Raises ConfigError where the experts do not divide the neurons."""
    size = config.expert_size or expert_size
    num_experts = config.num_experts or max(1, site.num_neurons // size)
    if config.num_experts is None and site.num_neurons % size:
        num_experts = 0 if config.expert_size else _nearest_divisor(site.num_neurons, num_experts)
    check_divides(site.num_neurons, num_experts)
    width = max(16, site.d_model // _WIDTH_SHARE) if config.router_width is None else config.router_width
    router = _random_router(site.d_model, num_experts, width, x_TD.float().cpu(), seed)
    return LayerSetup(num_experts, 0, router.to(x_TD.device), TopK(1))  # float32, as trained ones


def _nearest_divisor(num_neurons: int, wanted: int) -> int:
    return min((n for n in range(1, num_neurons + 1) if num_neurons % n == 0), key=lambda n: abs(n - wanted))


def _random_router(d_model: int, num_experts: int, width: int, x_TD: Tensor, seed: int) -> Router:
    generator = torch.Generator().manual_seed(seed)
    w_in_RD = torch.randn(width or num_experts, d_model, generator=generator) / d_model**0.5
    if width:
        w_out_ER = torch.randn(num_experts, width, generator=generator) / width**0.5
        scores_TE = (x_TD @ w_in_RD.t()).relu() @ w_out_ER.t()
    else:
        scores_TE = x_TD @ w_in_RD.t()
    mean_E = scores_TE.mean(0)
    scale_E = scores_TE.std(0, unbiased=False).clamp(min=1e-6)
    if not width:
        return TwoLayerRouter(w_in_RD / scale_E[:, None], -mean_E / scale_E)
    return TwoLayerRouter(
        w_in_RD, torch.zeros(width), w_out_ER / scale_E[:, None], -mean_E / scale_E, activation="relu"
    )


class FFN(nn.Module):
    """One FFN made of a model's own modules, in the order its block calls them."""

    def __init__(self, model: nn.Module, site: FFNSite) -> None:
        super().__init__()
        self.up, self.down = model.get_submodule(site.up), model.get_submodule(site.down)
        self.gate = None if site.gate is None else model.get_submodule(site.gate)
        self.act = attrgetter(site.act)(model) if site.act else ACTIVATIONS[site.activation]
        self.fused = site.fused  # dynamic quantisation replaces a module that has two names by two

    def forward(self, x: Tensor) -> Tensor:
        """y[..., D] of x[..., D]."""
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            y: Tensor = self.down(self.act(gate) * up)
        elif self.gate is None:
            y = self.down(self.act(self.up(x)))
        else:
            y = self.down(self.act(self.gate(x)) * self.up(x))
        return y


@dataclass
class Layers:
    """FFNs alone, in rotation: as many different ones as do not fit in cache. `inputs_TD`: what reaches each."""

    dense: list[FFN]
    moe: list[FFN]
    experts: list[MoEFFN]
    setups: list[LayerSetup]
    inputs_TD: list[Tensor]
    site: FFNSite
    peer: list[Any] = field(default_factory=list)  # dense under torch's dynamic quantisation, of int8
    beside: list[Beside] = field(default_factory=list)


def rotation(
    model: nn.Module,
    sites: Sequence[FFNSite],
    setups: Sequence[LayerSetup],
    inputs_TD: Sequence[Tensor],
    backend: str,
    cold_bytes: int,
    weights: str | None = None,
    peers: Sequence[str] = (),
) -> Layers:
    """FFNs of the model, of the kind there is most of, copied until they exceed `cold_bytes` (256 at most)."""
    shapes = [(site.d_model, site.num_neurons, site.gated) for site in sites]
    common = max(shapes, key=shapes.count)
    chosen = [i for i, shape in enumerate(shapes) if shape == common]
    first = sites[chosen[0]]
    item = 1 if weights == "int8" else model.get_submodule(first.up).weight.element_size()  # type: ignore[operator]
    one = first.num_parameters * item
    count = min(_MOST_LAYERS, max(2, len(chosen), -(-cold_bytes // one)))
    found, stock = Layers([], [], [], [], [], first), []
    for number in range(count):
        index = chosen[number % len(chosen)]
        dense = FFN(model, sites[index])
        if number >= len(chosen):
            dense = copy.deepcopy(dense)
        moe = share(dense)
        stock.append(dense)
        if weights == "int8":
            quantise_model(moe, [_alone(sites[index])])
            peer = dynamic_twin(dense)
            found.peer += [] if peer is None else [peer]
            dense = share(dense)
            quantise_model(dense, [])
        found.dense.append(dense)
        found.moe.append(moe)
        found.experts.append(setups[index].install(moe, _alone(sites[index]), backend))
        found.setups.append(setups[index])
        found.inputs_TD.append(inputs_TD[index])
    if peers:
        found.beside = peer_ffns(peers, stock, found.inputs_TD)
    return found


def _alone(site: FFNSite) -> FFNSite:
    values = site.__dict__ | {
        "up": "up",
        "down": "down",
        "gate": "up" if site.fused else site.gate and "gate",
        "act": "act",
    }
    return FFNSite(**values)


@torch.no_grad()
def sample_inputs(model: nn.Module, sites: Sequence[FFNSite], forward: Any, firing: float | None) -> list[Tensor]:
    """At most SAMPLE inputs x_TD of every FFN in one pass of `forward()`; with `firing`, sets biases on the way."""
    taken: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TD = args[0].detach().reshape(-1, args[0].shape[-1])
            taken[name] = x_TD[:: max(1, len(x_TD) // SAMPLE)][:SAMPLE].clone()
            if firing is not None:
                set_firing(module, taken[name], firing)

        return hook

    handles = [model.get_submodule(site.up).register_forward_pre_hook(look(site.name)) for site in sites]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [taken[site.name] for site in sites]


def is_relu(activation: str) -> bool:
    """Whether neurons are exactly zero where their input is negative."""
    return activation in ("relu", "relu2")


def firing_share(model: nn.Module, sites: Sequence[FFNSite], inputs_TD: Sequence[Tensor]) -> float | None:
    """Share of neurons above zero; None where the activation has no zeros."""
    if not is_relu(sites[0].activation):
        return None
    shares = []
    for site, x_TD in zip(sites, inputs_TD, strict=True):
        ffn = live_weights(model, site)
        reads, bias = (ffn.w_up_FD, ffn.b_up_F) if ffn.w_gate_FD is None else (ffn.w_gate_FD, ffn.b_gate_F)
        h_TF = ACTIVATIONS[site.activation](nn.functional.linear(x_TD[:64], reads, bias))
        shares.append(float((h_TF > 0).float().mean()))
    return sum(shares) / len(shares)


@dataclass
class Recorder:
    """What MoE layers select in one pass, to count the experts that a batch touches."""

    costs: dict[str, FFNCost] = field(default_factory=dict)

    @contextmanager
    def watch(self, layers: dict[str, MoEFFN]) -> Iterator[None]:
        """Records every selection inside; the layers' own routers decide."""
        before = {name: layer.backend for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.select, layer.backend = self._spy(name, layer), "torch"  # `dense` would not ask for a selection
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.select, layer.backend = None, before[name]

    def _spy(self, name: str, layer: MoEFFN) -> Any:
        def select(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
            assert layer.router is not None and layer.rule is not None
            selected = layer.rule.select(layer.router.scores(x_TD))
            self.costs[name] = cost_of(layer, selected)
            return selected

        return select


def cost_of(layer: MoEFFN, selected: Tensor) -> FFNCost:
    """The layer's arithmetic and bytes for tokens that selected `ids_TK | mask_TE`."""
    weights, ffn = layer.weights, layer.weights.ffn
    num_experts = weights.num_experts
    if selected.dtype == torch.bool:
        per_token = float(selected.float().sum(1).mean())
        touched = int(selected.any(0).sum())
    else:
        per_token = float(selected.shape[1])
        touched = int(selected.unique().numel())
    assert layer.router is not None
    overhead = overhead_flops(layer.router, weights.compensation)
    return FFNCost(
        tokens=len(selected),
        d_model=ffn.d_model,
        num_neurons=ffn.num_neurons,
        projections=3 if ffn.gated else 2,
        item_bytes=ffn.w_up_FD.element_size(),
        num_shared=weights.num_shared,
        num_experts=num_experts,
        experts_per_token=per_token,
        experts_touched=touched,
        overhead=overhead,
        overhead_bytes=overhead * next(iter(layer.router.tensors().values())).element_size(),
    )


def fixed_cost(site: FFNSite, layer: PrunedFFN | None, tokens: int, item_bytes: int) -> FFNCost:
    """An FFN that chooses nothing: left dense (None), or only its shared neurons, always."""
    dense = FFNCost(tokens, site.d_model, site.num_neurons, 3 if site.gated else 2, item_bytes)
    if layer is None:
        return dense
    weights, extra = layer.weights, overhead_flops(None, layer.weights.compensation)
    kept = {"num_shared": weights.num_shared, "num_experts": weights.num_experts, "overhead": extra}
    return replace(dense, experts_per_token=0.0, experts_touched=0.0, overhead_bytes=extra * item_bytes, **kept)


def to_moe(model: nn.Module, sites: Sequence[FFNSite], setups: Sequence[LayerSetup], backend: str) -> Any:
    """A twin of the model whose FFNs are experts."""
    twin = share(model)
    mask = TokenMask(twin)
    for site, setup in zip(sites, setups, strict=True):
        setup.install(twin, site, backend, mask)
    return twin


def held_bytes(model: nn.Module, layers: Iterable[FFNLayer] = ()) -> int:
    """Memory of a loaded model: parameters, buffers, and all that its MoE layers keep, shared storage once."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("moefication_cli."):
            for item in vars(value).values():
                add(item)

    for tensor in [*model.parameters(), *model.buffers()]:
        add(tensor)
    for layer in layers:
        add(layer)
    return sum(seen.values())
