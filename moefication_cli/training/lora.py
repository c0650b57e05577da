"""Low-rank adapters through peft (LoRA, arXiv 2106.09685) on every linear layer of a model with learnable FFNs installed.

Layers that run their own forward get peft's adapters in place. The projections of an installed FFN do not: its layer asks for
their weights, so the adapters sit on stand-ins that share the parameters, and the layer is given weight + B A.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moefication_cli.conversion.learnable import Conversion
from moefication_cli.errors import ConfigError
from moefication_cli.models.sites import FFNSite
from moefication_cli.training.trained import Trained


class Adapters:
    """LoRA adapters on every linear layer but the one into the vocabulary; `merge` adds them to the weights."""

    def __init__(self, conversion: Conversion, rank: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        net: nn.Module = conversion.loaded.model
        self.names = dict(net.named_parameters(remove_duplicate=False))
        sites = [conversion.plans[number].layer.site for number in conversion.layers]
        within = {path for site in sites for path in (site.up, site.gate, site.down) if path is not None}
        linear = {path: part for path, part in net.named_modules() if isinstance(part, nn.Linear | Conv1D)}
        head = getattr(net, "get_output_embeddings", lambda: None)()
        outside = [path for path, part in linear.items() if path not in within and part is not head]
        self._stand_ins = nn.ModuleDict({path.replace(".", "/"): _stand_in(linear[path]) for path in sorted(within)})

        def adapted(paths: list[str]) -> Any:
            return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=paths)

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sees by itself how Conv1D stores weights
            torch.manual_seed(seed)
            inject_adapter_in_model(adapted(list(self._stand_ins)), self._stand_ins)
            if outside:
                inject_adapter_in_model(adapted(outside), net)
        self._layers: dict[str, Any] = {path: net.get_submodule(path) for path in outside}
        self._layers |= {path: self._stand_ins[path.replace(".", "/")] for path in sorted(within)}
        for number, learnable in conversion.layers.items():
            learnable.adapted = _Effective(self, conversion.plans[number].layer.site)
        self._conversion = conversion

    def tensors(self, rate: float) -> dict[str, Trained]:
        """A and B of every adapter, with steps that move B A as much, relative to the weight, as full training moves it."""
        found = {}
        for path, layer in self._layers.items():
            a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
            size_a, size = (float(t.detach().float().square().mean().sqrt()) for t in (a, weight))
            found[f"{path}.lora_A"] = Trained(a.requires_grad_(True), rate)
            found[f"{path}.lora_B"] = Trained(
                b.requires_grad_(True), rate, size / max(1e-6, size_a * math.sqrt(len(a)))
            )
        return found

    def weight(self, name: str) -> Tensor:
        """A parameter of the model with what its adapter adds."""
        path, _, kind = name.rpartition(".")
        if kind != "weight" or path not in self._layers:
            return self.names[name]
        layer = self._layers[path]
        return self.names[name] + layer.get_delta_weight("default").to(self.names[name].dtype)

    @torch.no_grad()
    def merge(self) -> set[str]:
        """Add the adapters to the weights, in place; returns the names of the weights."""
        for layer in self._layers.values():
            layer.merge()
        for learnable in self._conversion.layers.values():
            learnable.adapted = None
        return {f"{path}.weight" for path in self._layers}


class _Effective:
    """The weights of one FFN with its adapters, made anew for every call."""

    def __init__(self, adapters: Adapters, site: FFNSite) -> None:
        self._adapters, self._site = adapters, site

    def __call__(self) -> Any:
        return self._site.weights_of(lambda piece: piece.of(self._adapters.weight(piece.parameter)))


def _stand_in(part: Any) -> nn.Module:
    """A linear layer that shares its parameters with one whose forward is exchanged."""
    kind = Conv1D if isinstance(part, Conv1D) else nn.Linear
    if type(part) is not kind and not issubclass(type(part), kind):
        raise ConfigError(f"--train lora: {type(part).__name__} is no plain linear layer", "use --train ffn")
    with torch.device("meta"):
        rows, columns = part.weight.shape
        made: Any = Conv1D(columns, rows) if kind is Conv1D else nn.Linear(columns, rows, bias=part.bias is not None)
    made.weight, made.bias = part.weight, part.bias
    return made  # type: ignore[no-any-return]
