"""Write a converted model as an ordinary checkpoint of a native MoE format, one decoder layer in memory at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.conversion.plan import LayerPlan
from moefication_cli.errors import ConfigError
from moefication_cli.export.formats import FORMATS, Format, Layer, Shape
from moefication_cli.export.gguf_shape import EMBED, choose_host, filled
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import MoEFolder, MoELayer
from moefication_cli.models.folder.permuted import copy_side_files
from moefication_cli.models.sites import FFNSite
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import TopK
from moefication_cli.store import files, jsonio
from moefication_cli.store.tensorfile import write_tensors

# Router weights times this make logits of standard deviation 2^-11.5: probabilities equal to 2e-4 of themselves, and
# still apart in float32 (2^-16 and below tie, and the wrong experts win)
_LOGIT_SPREAD = 2.0**-11.5
_AGAIN = "moefication apply RUN --for FORMAT plans a model that it can hold"


def check_hostable(name: str, config: Mapping[str, Any], plans: Sequence[LayerPlan]) -> None:
    """Raise ConfigError where the format `name` cannot hold these plans of a model of that configuration."""
    shapes = {plan.layer.name: _shape(plan.layer.site, plan, name) for plan in plans}
    _check_shapes(name, config, shapes)


def check_source(
    name: str, config: Mapping[str, Any], sites: Sequence[FFNSite], counts: Sequence[tuple[int, int]]
) -> None:
    """What `check_hostable` says of any plan, before one is made; `counts` are (experts, shared neurons) of each FFN.

    Raises ConfigError where the format cannot hold a model of that configuration or experts of these sizes.
    """
    shapes = {
        site.name: Shape(experts, (site.num_neurons - shared) // experts, shared, 1)
        for site, (experts, shared) in zip(sites, counts, strict=True)
    }
    _check_shapes(name, config, shapes)


def common_shape(checkpoint: Checkpoint, moe: MoEFolder, name: str) -> Shape:
    """What all layers of a converted folder have in common. Raises ConfigError where the format cannot hold them."""
    shapes = {site.name: _shape(site, layer, name) for site, layer in zip(checkpoint.sites, moe.layers, strict=True)}
    return _check_shapes(name, checkpoint.config.to_dict(), shapes)


def _check_shapes(name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Shape:
    (first, shape), *others = shapes.items()
    for layer, other in others:
        if other != shape:
            raise ConfigError(
                f"{name} has one number and size of experts and one k for all layers; {layer} has {other}, {first} {shape}",
                _AGAIN,
            )
    if name == "gguf":
        choose_host(config, shape)
    elif error := refusal(name, config, shape):
        raise error
    return shape


def _shape(site: FFNSite, made: LayerPlan | MoELayer, name: str) -> Shape:
    layer, rule, router = site.name, made.rule, made.router
    if rule is None or router is None:
        raise ConfigError(f"{layer} runs the same neurons for every token, which {name} cannot say", _AGAIN)
    if not isinstance(rule, TopK):
        raise ConfigError(f"{layer} runs a varying number of experts per token; {name} has a fixed k", _AGAIN)
    if not isinstance(router, TwoLayerRouter) or set(router.tensors()) != {"w_in_RD"} or router.normalise:
        raise ConfigError(
            f"{layer}: {name} holds a linear router without a bias, and this one is more than that",
            "moefication train-router RUN --router native, then moefication apply RUN --router native --for FORMAT",
        )
    if made.compensation is not None:
        raise ConfigError(f"{layer} has a correction for dropped experts, which {name} cannot hold", _AGAIN)
    size = (site.num_neurons - made.num_shared) // made.num_experts
    return Shape(made.num_experts, size, made.num_shared, rule.top_k)


def refusal(name: str, config: Mapping[str, Any], shape: Shape) -> ConfigError | None:
    """Why the format cannot hold the model, naming those that can; None if it can."""
    why = FORMATS[name].refusal(config, shape)
    if why is None:
        return None
    others = [other for other, row in FORMATS.items() if row.refusal(config, shape) is None]
    hint = f"it can be exported to {', '.join(others)}" if others else "no native format can hold it"
    return ConfigError(
        f"{name} cannot hold this {config['model_type']} model: {why}",
        f"{hint}; {EMBED}",
    )


def write_native(
    checkpoint: Checkpoint, moe: MoEFolder, name: str, spreads: Sequence[float], out: Path, multiple: int = 1
) -> list[Path]:
    """Write the folder `out`, which must be empty: config.json, one weight file per layer, index, tokenizer; synced.

    `checkpoint` and `moe` are of the converted folder, `spreads` the standard deviation of each layer's router logits. Experts
    are filled with zero neurons to a multiple of `multiple`. Raises ConfigError where the format cannot hold the model.
    """
    row, config = FORMATS[name], checkpoint.config.to_dict()
    shape = common_shape(checkpoint, moe, name if multiple == 1 else "gguf")
    whole = shape if multiple == 1 else filled(shape, name, multiple)
    files.make_dirs(out)
    copy_side_files(checkpoint.folder, out, code=False)
    jsonio.write(out / "config.json", row.config_json(config, whole))
    index: dict[str, str] = {}
    total, written = 0, []
    count = len(moe.layers) + 1
    for number, tensors in enumerate(_shards(checkpoint, moe, row, (shape, whole), spreads), 1):
        target = out / f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(target, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, target.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        written.append(target)
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    jsonio.write(out / "model.safetensors.index.json", listed)
    return written


def _shards(
    checkpoint: Checkpoint, moe: MoEFolder, row: Format, shapes: tuple[Shape, Shape], spreads: Sequence[float]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each decoder layer, then everything else."""
    left = checkpoint.tensors()
    for site, layer, spread in zip(checkpoint.sites, moe.layers, spreads, strict=True):
        own = {checkpoint.locate(piece.parameter)[1] for piece in site.slices()}
        prefix = next(iter(own)).split(".mlp.")[0]
        ffn = with_zero_neurons(checkpoint.read_ffn(site, dtype=None), *shapes)
        assert isinstance(layer.router, TwoLayerRouter)
        power = 2.0 ** round(math.log2(_LOGIT_SPREAD / max(spread, 1e-12)))
        made = row.layer(Layer(ffn, layer.router.w_in_RD.float() * power, shapes[1]))
        found = {f"{prefix}.{key}": tensor for key, tensor in made.items()}
        for key in [key for key in left if key.startswith(f"{prefix}.")]:
            file = left.pop(key)
            if key not in own:
                found[key] = file.get(key)
        if row.zero_biases:
            for part in "qkv":
                weight = f"{prefix}.self_attn.{part}_proj.weight"
                found.setdefault(weight.replace(".weight", ".bias"), found[weight].new_zeros(len(found[weight])))
        yield found
    rest = {key: file.get(key) for key, file in left.items()}
    if row.untied and "lm_head.weight" not in rest:
        rest["lm_head.weight"] = rest["model.embed_tokens.weight"].clone()
    yield rest


def with_zero_neurons(ffn: FFNWeights, shape: Shape, whole: Shape) -> FFNWeights:
    """An FFN without biases, in expert order, its shared part and experts filled up to the sizes of `whole`."""
    if whole == shape:
        return ffn

    def grown(w_FD: Tensor) -> Tensor:
        shared_SD, rest_FD = w_FD[: shape.num_shared], w_FD[shape.num_shared :]
        experts_END = rest_FD.unflatten(0, (shape.num_experts, shape.expert_size))
        more_shared, more = whole.num_shared - shape.num_shared, whole.expert_size - shape.expert_size
        pad = torch.nn.functional.pad
        return torch.cat([pad(shared_SD, (0, 0, 0, more_shared)), pad(experts_END, (0, 0, 0, more)).flatten(0, 1)])

    assert ffn.w_gate_FD is not None
    return replace(ffn, w_up_FD=grown(ffn.w_up_FD), w_gate_FD=grown(ffn.w_gate_FD), w_down_FD=grown(ffn.w_down_FD))


def logit_spreads(moe: MoEFolder, inputs: Sequence[Tensor]) -> list[float]:
    """Standard deviation of each layer's router logits on these FFN inputs [T, D]; 1 where there is no router."""
    routers = [layer.router for layer in moe.layers]
    return [1.0 if router is None else float(router.scores(x).std()) for router, x in zip(routers, inputs, strict=True)]


def random_inputs(checkpoint: Checkpoint, tokens: int = 512) -> list[Tensor]:
    """FFN inputs as the norm before it leaves them, of random directions, for models without calibration data."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, site.d_model, generator=generator) for site in checkpoint.sites]
