"""The models that `bench` sets side by side: a converted run, a plain model with random routers, or random weights.

Axes as in `ffn`. Everything here loads and builds; nothing is timed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.benchmark.bounds import Rates
from moefication_cli.benchmark.calls import random_ids, whole_forward
from moefication_cli.benchmark.layers import (
    SAMPLE,
    LayerSetup,
    is_relu,
    random_setup,
    sample_inputs,
    setup_of,
    to_moe,
)
from moefication_cli.benchmark.shapes import find_shape, set_firing, shape_model
from moefication_cli.benchmark.timing import cache_bytes
from moefication_cli.config import BenchConfig
from moefication_cli.errors import ConfigError, MissingArtifactError
from moefication_cli.models.folder.moe_folder import FOLDER, read_moe_folder
from moefication_cli.models.installed import FFNLayer
from moefication_cli.models.loading import load, load_model, load_widened, resolve_dtype, stored_as_int8
from moefication_cli.models.sites import FFNSite, find_sites
from moefication_cli.models.surgery import installed_layers
from moefication_cli.runs.control import Control
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.tasks.encoding import position_limit

MODES = ("ffn", "prefill", "decode")
_EXPERT_SIZE = 32
CACHES = 4  # weights in rotation are so many times the cache, and 128 MiB at least
COLD_BYTES = 128 << 20
_PROMPT = (8, 32)  # sequences and tokens that FFN inputs are sampled from


@dataclass
class BenchCase:
    """What is measured: a dense model, its MoE twin where whole models are timed, and what both are made of."""

    modes: list[str]
    dense: Any
    sites: list[FFNSite]
    setups: list[LayerSetup]
    inputs_TD: list[Tensor]
    moe: Any = None
    fraction: float | None = None  # what RUN/model was written with

    @property
    def installed(self) -> dict[str, FFNLayer]:
        """What stands in for the MoE's FFNs, by site name."""
        return {} if self.moe is None else installed_layers(self.moe)

    @property
    def experts(self) -> dict[str, MoEFFN]:
        """Those of them that route; `sites` are theirs."""
        return {name: layer for name, layer in self.installed.items() if isinstance(layer, MoEFFN)}


@dataclass
class Setting:
    """One run of the command: what was asked for, and what was found so far."""

    config: BenchConfig
    control: Control
    device: torch.device
    modes: list[str] | None
    tokens: list[int]
    batches: list[int]
    seqs: list[int]
    fractions: list[float] | None
    peers: list[str] = field(default_factory=list)
    rates: Rates | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)


def _check_modes(asked: list[str] | None, possible: Sequence[str], name: str) -> list[str]:
    """What was asked for, or all there is."""
    missing = [mode for mode in asked or () if mode not in possible]
    if missing:
        raise ConfigError(f"{name} has no mode {missing[0]}", f"use --mode {','.join(possible)}")
    return list(possible) if asked is None else asked


def cases(state: Setting, target: str | None) -> Iterator[BenchCase]:
    """The models, one at a time in memory."""
    if target is None:
        yield from _shape_cases(state)
        return
    folder = Path(target)
    for converted in (folder / "model", folder):
        if (converted / FOLDER).is_dir():
            yield _converted(state, converted)
            return
    if (folder / "run.json").is_file():
        raise MissingArtifactError(f"{folder} has no converted model yet", f"moefication apply {folder}")
    yield _plain(state, target)


def _shape_cases(state: Setting) -> Iterator[BenchCase]:
    config, name = state.config, str(state.config.shape)
    shape = find_shape(name)
    modes = _check_modes(state.modes, shape.modes, name)
    dtype = resolve_dtype(config.dtype, state.device) or torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "device": state.device, "seed": state.control.seed}
    options["activation"] = config.activation
    if "ffn" in modes:
        count = max(2, min(shape.layers, -(-cold_bytes(state) // (shape.ffn_parameters * dtype.itemsize))))
        model = shape_model(name, ffn_layers=count, **options)
        sites = [site for site in find_sites(model) if site.stack == "encoder"]
        generator = torch.Generator().manual_seed(state.control.seed)
        inputs_TD = [torch.randn(SAMPLE, site.d_model, generator=generator).to(state.device, dtype) for site in sites]
        firing = _firing(state, sites)
        for site, x_TD in zip(sites, inputs_TD, strict=True):
            if firing is not None:
                set_firing(model.get_submodule(site.up), x_TD, firing)
        sites = [site for site in find_sites(model) if site.stack == "encoder"]
        setups = _random_setups(state, sites, inputs_TD, shape.expert_size)
        yield BenchCase(["ffn"], model, sites, setups, inputs_TD)
        del model
    whole = [mode for mode in modes if mode != "ffn"]
    if whole:
        state.control.say(f"{name}: making random weights")
        yield _twins(state, whole, shape_model(name, **options), shape.expert_size, random=True)


def _plain(state: Setting, target: str) -> BenchCase:
    config = state.config
    loaded = load_model(
        target,
        task=config.task,
        device=state.device,
        dtype=config.dtype,
        revision=config.revision,
        trust_remote_code=state.control.trust_remote_code,
        tokenizer=False,
        quiet=True,
    )
    modes = _check_modes(state.modes, _possible(loaded.model), target)
    state.control.say(f"{target}: no converted model, so routers are random and choose experts at random")
    return _twins(state, modes, loaded.model, _EXPERT_SIZE, random=False)


def _possible(model: Any) -> list[str]:
    if not isinstance(getattr(model.config, "vocab_size", None), int):
        return ["ffn"]
    return [*MODES[:2], *(["decode"] if model.can_generate() else [])]


def _twins(state: Setting, modes: list[str], model: Any, expert_size: int, *, random: bool) -> BenchCase:
    model.requires_grad_(False)
    sites = find_sites(model, state.config.ffn)
    firing = _firing(state, sites) if random else None
    inputs_TD = sample_inputs(model, sites, _sampling(state, model), firing)
    sites = find_sites(model, state.config.ffn)
    setups = _random_setups(state, sites, inputs_TD, expert_size)
    moe = to_moe(model, sites, setups, state.config.backend) if set(modes) - {"ffn"} else None
    return BenchCase(modes, model, sites, setups, inputs_TD, moe)


def _converted(state: Setting, folder: Path) -> BenchCase:
    config = state.config
    options: dict[str, Any] = {"device": state.device, "dtype": config.dtype, "task": config.task}
    options["trust_remote_code"] = state.control.trust_remote_code
    written = read_moe_folder(folder)
    moe = load(folder, backend=config.backend, **options).requires_grad_(False)
    if stored_as_int8(folder):
        state.config = config = replace(config, weights="int8")
        state.control.say(f"{folder} holds int8 weights: dense is its model in int8 too, as with --weights int8")
        like = {name: options[name] for name in ("task", "trust_remote_code")}
        dense = load_widened(folder, written, **like).requires_grad_(False)
    else:
        dense = load_model(folder, tokenizer=False, quiet=True, **options).model.requires_grad_(False)
    modes = _check_modes(state.modes, _possible(dense), str(folder))
    sites = find_sites(dense, written.settings.get("ffn"))
    experts = {name: layer for name, layer in installed_layers(moe).items() if isinstance(layer, MoEFFN)}
    if not experts:
        raise ConfigError(f"{folder}: no layer has a router", "convert some: moefication apply RUN --force")
    routed = [site for site in sites if site.name in experts]
    inputs_TD = sample_inputs(dense, routed, _sampling(state, dense), None)
    setups = [setup_of(experts[site.name]) for site in routed]
    return BenchCase(modes, dense, routed, setups, inputs_TD, moe, written.settings.get("fraction"))


def _sampling(state: Setting, model: Any) -> Any:
    limit = position_limit(model.config) or _PROMPT[1]
    ids_BS = random_ids(model.config, _PROMPT[0], min(_PROMPT[1], limit), state.control.seed, state.device)
    return whole_forward(model, ids_BS).run


def _firing(state: Setting, sites: Sequence[FFNSite]) -> float | None:
    """The share random weights are given; only in a ReLU FFN without a gate are neurons exactly zero."""
    return state.config.firing if is_relu(sites[0].activation) and not sites[0].gated else None


def _random_setups(
    state: Setting, sites: Sequence[FFNSite], inputs_TD: Sequence[Tensor], expert_size: int
) -> list[LayerSetup]:
    seed = state.control.seed
    return [
        random_setup(site, state.config, expert_size, x_TD, seed + site.index)
        for site, x_TD in zip(sites, inputs_TD, strict=True)
    ]


def cold_bytes(state: Setting) -> int:
    """Weights in rotation: so many that none is still in a cache when its turn comes again."""
    return max(COLD_BYTES, CACHES * cache_bytes(state.device))
