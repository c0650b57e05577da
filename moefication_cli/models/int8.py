"""int8 weights of a loaded model: its FFNs' matrices for the kernels of `runtime.cpu`, other linear layers for torch's, embeddings.

Made from the float model in memory, one matrix after the other, so that at most one float copy is alive beside the int8 ones. Every matrix
is symmetric per row (`ffn.quantise_rows`); of FFNs a row is a neuron, also of the down projection, whose scale multiplies the
neuron's activation, and of embeddings a token, so that a tied head shares its embedding's matrix. Norms, biases, routers and
compensations stay as they are, and so do embeddings with code of their own (most of positions). CPU and float32 activations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import quantise_rows
from moefication_cli.models.projections import SCALE
from moefication_cli.models.sites import FFNSite

WEIGHTS = ("int8",)  # what `load(weights=...)` takes


class Rounded:
    """An int8 matrix [R, C]: `rows`, and the scale [R] of each."""

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = nn.Parameter(rows, requires_grad=False), scale

    @classmethod
    def of(cls, weight: Tensor) -> "Rounded":
        """A float matrix made int8."""
        return cls(*quantise_rows(weight))


class Int8Embedding(nn.Embedding):
    """The rows of an int8 matrix that ids [...] name, as float32 [..., D]."""

    def __init__(self, weight: Rounded, padding_idx: int | None) -> None:
        nn.Module.__init__(self)  # as below
        self.num_embeddings, self.embedding_dim = weight.rows.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = weight.rows
        self.register_buffer(SCALE, weight.scale)

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., D]; as in torch, an id out of range raises IndexError."""
        return self.weight[input].float() * self.get_buffer(SCALE)[input][..., None]


class Int8Linear(nn.Linear):
    """y = x W^T + b for an int8 W, the tokens rounded to int8 too, symmetric per token; sums are exact, in int32 (`torch._int_mm`).

    Rounding tokens one by one and not all together is what torchao's `Int8DynamicActivationInt8WeightConfig` does.
    """

    def __init__(self, weight: "Rounded", bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a float matrix first
        self.out_features, self.in_features = weight.rows.shape
        self.weight = weight.rows
        self.register_buffer(SCALE, weight.scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """y[..., out] of x[..., in]; NaN and infinity in a token make its row NaN."""
        x_TD = x.reshape(-1, self.in_features)
        scale_T1 = x_TD.abs().amax(dim=1, keepdim=True) / 127
        steps_TD = (x_TD / scale_T1.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        y = torch._int_mm(steps_TD, self.weight.t()).float().mul_(scale_T1).mul_(self.get_buffer(SCALE))
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], self.out_features)


def check_weights_option(weights: str | None, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises ConfigError for weights of another kind, a dtype that int8 does not go with, UnavailableError for a device."""
    if weights is None:
        return
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}", 'load(PATH, weights="int8")')
    if device.type != "cpu":
        raise UnavailableError(
            f"int8 weights are computed on the CPU, not on {device}", "use device cpu, or leave int8 out"
        )
    if dtype != torch.float32:
        raise ConfigError(f"int8 weights go with float32 activations, not {dtype}", "leave out the dtype")


def quantise_model(model: nn.Module, experts: list[FFNSite], stored: Callable[[str], Rounded] | None = None) -> None:
    """Makes all matrices int8 in place and everything else float32, and the model one for inference only.

    FFNs in `experts` keep their modules, which then need a layer installed that reads int8; all other linear layers become `Int8Linear`,
    embeddings `Int8Embedding`. `stored` gives the int8 matrix of the module of that name, instead of its float one.
    """
    model.requires_grad_(False)
    taken: set[int] = set()
    for site in experts:
        _quantise_ffn(model, site, stored)
        taken |= {id(model.get_submodule(path)) for path in (site.up, site.down, site.gate) if path is not None}
    made: dict[int, nn.Module] = {}  # a fused projection and an embedding may have two names
    rounded: dict[int, Rounded] = {}  # by the float matrix: tied ones stay one

    def weight_of(part: Any, path: str) -> Rounded:
        if stored is not None:
            return stored(path)
        number = id(part.weight)
        if number not in rounded:
            matrix: Tensor = part.weight.detach()
            rounded[number] = Rounded.of(matrix.t() if isinstance(part, Conv1D) else matrix)
        return rounded[number]

    for prefix, parent in list(model.named_modules()):
        for name, part in list(parent._modules.items()):
            if id(part) in taken or isinstance(part, Int8Linear | Int8Embedding):
                continue
            path = f"{prefix}.{name}" if prefix else name
            if id(part) not in made and isinstance(part, nn.Linear | Conv1D):
                made[id(part)] = Int8Linear(weight_of(part, path), part.bias)
            elif id(part) not in made and type(part) is nn.Embedding and part.max_norm is None:
                made[id(part)] = Int8Embedding(weight_of(part, path), part.padding_idx)
            if id(part) in made:
                setattr(parent, name, made[id(part)])
    model.float()  # norms and biases of a model in half precision; int8 matrices are no floats
    if getattr(model, "config", None) is not None:
        model.config.dtype = torch.float32


def _quantise_ffn(model: nn.Module, site: FFNSite, stored: Callable[[str], Rounded] | None) -> None:
    for path in dict.fromkeys((site.up, site.gate, site.down)):
        if path is None:
            continue
        part: Any = model.get_submodule(path)
        if not part.weight.is_floating_point():  # was made int8 before
            continue
        neurons_first = (path == site.down) == isinstance(part, Conv1D)
        rows = part.weight.detach() if neurons_first else part.weight.detach().t()
        rounded = Rounded.of(rows) if stored is None else stored(path)
        part.weight = rounded.rows if neurons_first else nn.Parameter(rounded.rows.t(), requires_grad=False)
        part.register_buffer(SCALE, rounded.scale)


def linear_bytes(model: nn.Module) -> int:
    """Bytes of all weight matrices of linear layers and of their scales."""
    total = 0
    for part in model.modules():
        if isinstance(part, nn.Linear | Conv1D | Int8Linear):
            for held in (part.weight, part._buffers.get(SCALE)):
                total += 0 if held is None else held.numel() * held.element_size()  # type: ignore[operator,union-attr]
    return total
