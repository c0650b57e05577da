"""Which FFNs does a model have? Rows of `families` matched against the module tree, checked and described.

Works on any model, also one on the meta device: nothing here reads weight values. Axes as in `ffn`: D model
width, F neurons. Does not change the model (`surgery`) and does not read files (`checkpoint`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from moefication_cli.errors import UnsupportedModelError
from moefication_cli.ffn import ACTIVATIONS, FFNWeights, flops_per_neuron
from moefication_cli.models.families import ACT_NAMES, FAMILIES, FFNSpec, custom_spec

_BY_HAND = 'describe its FFNs by hand: --ffn "up=layers.*.mlp.up,gate=layers.*.mlp.gate,down=layers.*.mlp.down"'


@dataclass(frozen=True)
class ParamSlice:
    """Where a model keeps one tensor of an FFN: `start` <= i < `stop` of a parameter's axis that runs over neurons.

    The down projection's bias has no such axis: None. `kind` is "weight" or "bias".
    """

    parameter: str
    part: Literal["up", "gate", "down"]
    kind: Literal["weight", "bias"]
    axis: int | None
    start: int = 0
    stop: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice as a view of the parameter."""
        return tensor if self.axis is None else tensor.narrow(self.axis, self.start, self.stop - self.start)


@dataclass(frozen=True)
class FFNSite:
    """One FFN of a model. `name` keys artifacts; `up`, `gate`, `down`, `act` are full paths in the model searched; `act` is empty
    where the model's code calls the activation without keeping it.

    `stack` says which mask tells its real tokens: 'encoder' is `attention_mask` (also of decoder-only models),
    'decoder' the `decoder_attention_mask` of an encoder-decoder.
    """

    index: int
    name: str
    family: str
    up: str
    down: str
    gate: str | None
    act: str
    d_model: int
    num_neurons: int
    activation: str
    bias_up: bool
    bias_gate: bool
    bias_down: bool
    conv1d: bool
    stack: Literal["encoder", "decoder"]

    @property
    def gated(self) -> bool:
        """Whether act(gate) multiplies up."""
        return self.gate is not None

    @property
    def fused(self) -> bool:
        """Whether gate and up are halves of one projection."""
        return self.gate == self.up

    @property
    def flops_per_neuron(self) -> int:
        """Multiply-adds per token of one neuron."""
        return flops_per_neuron(self.d_model, self.gated)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the projections."""
        matrices = self.num_neurons * self.flops_per_neuron
        return matrices + self.num_neurons * (self.bias_up + self.bias_gate) + self.d_model * self.bias_down

    def slices(self) -> list[ParamSlice]:
        """Every tensor of the FFN."""
        F, reads = self.num_neurons, 1 if self.conv1d else 0
        found = []
        parts: list[tuple[Literal["up", "gate"], str | None, bool]] = [
            ("up", self.up, self.bias_up),
            ("gate", self.gate, self.bias_gate),
        ]
        for part, path, bias in parts:
            if path is not None:
                start = F if self.fused and part == "up" else 0
                found.append(ParamSlice(f"{path}.weight", part, "weight", reads, start, start + F))
                if bias:
                    found.append(ParamSlice(f"{path}.bias", part, "bias", 0, start, start + F))
        found.append(ParamSlice(f"{self.down}.weight", "down", "weight", 1 - reads, 0, F))
        if self.bias_down:
            found.append(ParamSlice(f"{self.down}.bias", "down", "bias", None))
        return found

    def weights_of(self, tensor_of: Callable[[ParamSlice], torch.Tensor]) -> FFNWeights:
        """The FFN's weights, neuron-major; `tensor_of` gives each slice as it lies in its parameter."""
        found: dict[tuple[str, str], torch.Tensor] = {}
        for piece in self.slices():
            tensor = tensor_of(piece)
            found[piece.part, piece.kind] = tensor.t() if piece.kind == "weight" and piece.axis == 1 else tensor
        return FFNWeights(
            w_up_FD=found["up", "weight"],
            w_down_FD=found["down", "weight"],
            w_gate_FD=found.get(("gate", "weight")),
            b_up_F=found.get(("up", "bias")),
            b_gate_F=found.get(("gate", "bias")),
            b_down_D=found.get(("down", "bias")),
            activation=self.activation,
        )

    def parameter_orders(self, order_F: torch.Tensor) -> dict[str, tuple[int, torch.Tensor]]:
        """Parameter -> (axis, order along the whole of it) that puts neuron order_F[i] in position i of every slice."""
        orders: dict[str, tuple[int, list[torch.Tensor]]] = {}
        for piece in sorted(self.slices(), key=lambda piece: piece.start):
            if piece.axis is not None:
                orders.setdefault(piece.parameter, (piece.axis, []))[1].append(order_F + piece.start)
        return {name: (axis, torch.cat(parts)) for name, (axis, parts) in orders.items()}


def find_sites(model: nn.Module, ffn: str | None = None) -> list[FFNSite]:
    """All FFNs of the model in execution order (encoder first); `ffn` is a `--ffn` text used instead of the table.

    Raises UnsupportedModelError, naming what was found, for unknown architectures, quantised weights, models that
    already are mixtures of experts, shared FFNs and activations no backend knows; ConfigError for a bad `ffn`.
    """
    _refuse_packed(model)
    specs = (custom_spec(ffn),) if ffn else FAMILIES
    sites = []
    for path, block in model.named_modules():
        for spec in specs:
            if spec.matches(path, type(block).__name__) and all(
                _resolves(block, p) for p in (spec.up, spec.down, spec.gate) if p
            ):
                sites.append(_describe(model, path, block, spec))
                break
    if not sites:
        raise _unknown(model, ffn)
    _refuse_shared(model, sites)
    sites.sort(key=lambda site: site.stack == "decoder")
    return [FFNSite(**{**site.__dict__, "index": index}) for index, site in enumerate(sites)]


def ffn_share(model: nn.Module, sites: Sequence[FFNSite]) -> float:
    """The FFNs' part of one token's multiply-adds in the linear layers of a dense model; attention scores are not counted."""
    linear = {id(part.weight): part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear | Conv1D)}  # type: ignore[union-attr]
    return sum(site.num_neurons * site.flops_per_neuron for site in sites) / sum(linear.values())


def activation_name(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The name in `ACTIVATIONS` of a callable, by what it computes: transformers has many classes for one function."""
    x = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = function(x.clone())
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.device != x.device:
            return None
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    for name, known in ACTIVATIONS.items():
        if torch.allclose(y.double(), known(x), rtol=0, atol=1e-6):
            return name
    return None


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or a transformers Conv1D."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _resolves(block: nn.Module, path: str) -> bool:
    try:
        return isinstance(block.get_submodule(path), (nn.Linear, Conv1D))
    except AttributeError:
        return False


def _describe(model: nn.Module, path: str, block: nn.Module, spec: FFNSpec) -> FFNSite:
    join = (path + "." if path else "").__add__
    up, down = block.get_submodule(spec.up), block.get_submodule(spec.down)
    gate = block.get_submodule(spec.gate) if spec.gate else None
    (d_model, neurons), parts = projection_shape(up), [up, down] + ([gate] if gate is not None else [])
    sizes_fit = gate is None or projection_shape(gate) == (d_model, neurons)
    if gate is up:
        sizes_fit &= neurons % 2 == 0
        neurons //= 2
    sizes_fit &= projection_shape(down) == (neurons, d_model)
    conv1d = isinstance(up, Conv1D)
    if not sizes_fit or any(isinstance(part, Conv1D) != conv1d for part in parts):
        shapes = ", ".join("x".join(map(str, projection_shape(part))) for part in parts)
        raise UnsupportedModelError(f"{path}: the projections ({shapes}) do not form an FFN", _BY_HAND)
    act = _find_activation(block, spec)
    if act is None:
        hint = 'name where it is, --ffn "...,act=layers.*.mlp.act_fn", or what the code calls: act=gelu, act=silu, ...'
        raise UnsupportedModelError(f"{path}: no activation found beside {spec.up}", hint)
    function = ACTIVATIONS[spec.act] if not act else attrgetter(act)(block)
    function = getattr(function, "stands_for", function)  # `installed.Bypass`, where experts are installed
    activation = activation_name(function)
    if activation is None:
        kind = getattr(function, "__name__", type(function).__name__)
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(f"{path}: activation {kind} is not one of {known}", "use a model with one of these")
    return FFNSite(
        index=-1,
        name=_strip_prefix(model, path),
        family=spec.name,
        up=join(spec.up),
        down=join(spec.down),
        gate=join(spec.gate) if gate is not None else None,
        act=join(act) if act else "",
        d_model=d_model,
        num_neurons=neurons,
        activation=activation,
        bias_up=up.bias is not None,
        bias_gate=gate is not None and gate.bias is not None,
        bias_down=down.bias is not None,
        conv1d=conv1d,
        stack="decoder" if _is_encoder_decoder(model) and re.search(r"(^|\.)decoder\.", path) else "encoder",
    )


def _find_activation(block: nn.Module, spec: FFNSpec) -> str | None:
    """The activation's path, "" where `spec.act` is the name of one that the code calls; None: not found."""
    candidates = spec.act.split("|") if spec.act else []
    if not candidates:
        parent = spec.up
        while parent:
            parent = parent.rpartition(".")[0]
            candidates += [f"{parent}.{name}".lstrip(".") for name in ACT_NAMES]
    for path in candidates:
        try:
            if callable(attrgetter(path)(block)):
                return path
        except AttributeError:
            continue
    return "" if spec.act in ACTIVATIONS else None


def _strip_prefix(model: nn.Module, path: str) -> str:
    """Artifacts are keyed without the head's prefix, so that `BertModel` and a classifier on it share them."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return path.removeprefix(f"{prefix}.")
    return path


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refuse_quantised(config: Any, where: str) -> None:
    """Packed weights cannot be permuted: UnsupportedModelError if the configuration says the model is quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        entries = quantisation if isinstance(quantisation, dict) else vars(quantisation)
        method = getattr(entries.get("quant_method"), "value", entries.get("quant_method")) or "unknown method"
        raise UnsupportedModelError(
            f"{where} is quantised ({method}): packed weights cannot be permuted", "convert first, quantise after"
        )


def _refuse_packed(model: nn.Module) -> None:
    refuse_quantised(getattr(model, "config", None), type(model).__name__)
    for path, module in model.named_modules():
        # Mixtral, Qwen-MoE, DeepSeek, Switch, gpt-oss: all keep their experts in an attribute of this name
        if "experts" in module._modules or "experts" in module._parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} already is a mixture of experts ({path}.experts)", "start from a dense model"
            )


def _refuse_shared(model: nn.Module, sites: list[FFNSite]) -> None:
    seen: dict[int, str] = {}
    for site in sites:
        for path in dict.fromkeys((site.up, site.gate, site.down)):
            if path is None:
                continue
            other = seen.setdefault(id(model.get_submodule(path).weight), path)
            if other != path:
                raise UnsupportedModelError(f"{path} and {other} share one weight", "use a model without shared layers")


def _unknown(model: nn.Module, ffn: str | None) -> UnsupportedModelError:
    """Names the linear layers of one block, so that a user can write `--ffn` from the message alone."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "model_type", "") == "albert":
        return UnsupportedModelError(f"{kind} calls one FFN at every depth", "use a model without shared layers")
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        block = re.match(r"(.*?\.\d+)\.(.+)", path)
        if block and isinstance(module, (nn.Linear, Conv1D)):
            d_in, d_out = projection_shape(module)
            found.setdefault(block[1], []).append(f"{block[2]} {d_in}->{d_out}")
    if not found:
        return UnsupportedModelError(f"{kind} has no numbered blocks with linear layers", _BY_HAND)
    # The widest block is the likeliest to hold an FFN; the first of its kind is enough
    name, layers = max(found.items(), key=lambda item: len(item[1]))
    text = f"{name} of {kind} has: {', '.join(layers)}"
    if ffn:
        return UnsupportedModelError(f"--ffn {ffn!r} matches nothing. {text}", _BY_HAND)
    return UnsupportedModelError(f"no known FFN family fits. {text}", _BY_HAND)
