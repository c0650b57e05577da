"""The rows of `bench`: dense and MoE in turns, with the bound of each row.

Modes: `ffn`, one FFN alone, different layers in turn so that weights come from memory; `prefill`, the whole model over
batch x seq (the encoder of an encoder-decoder); `decode`, one generated token per sequence with a KV cache. Axes: T
tokens, D model width. Prompts are random ids without padding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moefication_cli.benchmark.bounds import FFNCost, ffn_bound, whole_bound
from moefication_cli.benchmark.calls import Decoder, ffn_call, prefill_call, random_ids, rotation_call
from moefication_cli.benchmark.int8 import dynamic_twin, fastest
from moefication_cli.benchmark.layers import (
    Layers,
    Recorder,
    cost_of,
    firing_share,
    fixed_cost,
    held_bytes,
    rotation,
)
from moefication_cli.benchmark.peers import Beside, checked, peer_ffn_call, peer_models, peer_row
from moefication_cli.benchmark.shapes import without_ffns
from moefication_cli.benchmark.subjects import BenchCase, Setting, cold_bytes
from moefication_cli.benchmark.timing import Call, Paired, alternate
from moefication_cli.models.int8 import quantise_model
from moefication_cli.models.sites import find_sites
from moefication_cli.runtime.backends import NEVER_WAITING
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN


def _fractions(state: Setting, case: BenchCase) -> list[float | None]:
    if state.fractions is not None:
        return [*state.fractions]
    return [None] if case.moe is not None and case.fraction is not None else [0.2]


def rows_of(state: Setting, case: BenchCase) -> Iterator[dict[str, Any]]:
    """Every row of one case, as JSON has it; memory goes to `state.memory` after the last."""
    if "ffn" in case.modes:
        yield from _ffn_rows(state, case)
    whole = [mode for mode in case.modes if mode != "ffn"]
    if not whole:
        return
    firing = firing_share(case.dense, case.sites, case.inputs_TD)
    peer, ids_BS = None, random_ids(case.dense.config, 1, 8, state.control.seed, state.device)
    beside = peer_models(state.peers, case.dense, ids_BS) if state.peers else []
    if state.config.weights == "int8":
        peer = dynamic_twin(case.dense)
        quantise_model(case.dense, [])
        experts = [site for site in find_sites(case.moe, state.config.ffn) if site.name in case.installed]
        quantise_model(case.moe, experts)
    other = without_ffns(case.dense, find_sites(case.dense, state.config.ffn))
    for fraction in _fractions(state, case):
        for site, setup in zip(case.sites, case.setups, strict=True):
            case.experts[site.name].rule = setup.rule_at(fraction)
        for mode in whole:
            for batch in state.batches:
                for seq in state.seqs if mode == "prefill" else [state.config.prompt_tokens]:
                    with torch.inference_mode():
                        row = _whole_row(state, case, other, peer, beside, mode, batch, seq)
                    shown = case.fraction if fraction is None else fraction
                    yield _complete(state, case, row | {"fraction": shown, "firing": firing})
    _remember(state, "model", held_bytes(case.dense), held_bytes(case.moe, case.installed.values()))


def _ffn_rows(state: Setting, case: BenchCase) -> Iterator[dict[str, Any]]:
    layers = rotation(
        case.dense,
        case.sites,
        case.setups,
        case.inputs_TD,
        state.config.backend,
        cold_bytes(state),
        state.config.weights,
        state.peers,
    )
    firing = firing_share(case.dense, case.sites, case.inputs_TD)
    for fraction in _fractions(state, case):
        for layer, setup in zip(layers.experts, layers.setups, strict=True):
            layer.rule = setup.rule_at(fraction)
        for tokens in state.tokens:
            with torch.inference_mode():
                row = _ffn_row(state, layers, tokens)
            shown = case.fraction if fraction is None else fraction
            yield _complete(state, case, row | {"fraction": shown, "firing": firing})
    sizes = [
        held_bytes(nn.ModuleList(modules), held) for modules, held in ((layers.dense, ()), (layers.moe, layers.experts))
    ]
    _remember(state, "ffn", *sizes)


def _ffn_row(state: Setting, layers: Layers, tokens: int) -> dict[str, Any]:
    """One FFN; the MoE runs half a rotation behind the dense FFN, whose weights it partly shares."""
    assert state.rates is not None
    count = len(layers.dense)
    costs = []
    for layer, x_TD in zip(layers.experts[:4], layers.inputs_TD, strict=False):
        assert layer.router is not None and layer.rule is not None
        x_TD = x_TD.repeat(-(-tokens // len(x_TD)), 1)[:tokens]
        costs.append(cost_of(layer, layer.rule.select(layer.router.scores(x_TD))))
    peers: list[dict[str, Any]] = []
    launch, at = None, ((layers.dense, 0), (layers.moe, count // 2))
    calls = [ffn_call(modules, layers.inputs_TD, tokens, start) for modules, start in at]
    if state.device.type == "cuda":
        for call in calls:
            for _ in range(count):
                call.run()
        graph = {layer.last_backend for layer in layers.experts} <= NEVER_WAITING
        launch = "graph" if graph else "eager"
        calls = [rotation_call(modules, layers.inputs_TD, tokens, start, graph) for modules, start in at]
        taken = _alternate(state, calls, warmup=2)
        dense, moe = ([seconds / count for seconds in times] for times in taken)
    else:
        if layers.peer:
            calls.append(ffn_call(layers.peer, layers.inputs_TD, tokens, 0))
        own = len(calls)
        timed = _checked(layers.beside, "ffn", lambda one: peer_ffn_call(one, layers.inputs_TD, tokens))
        taken = _alternate(state, [*calls, *timed.values()], warmup=count)
        dense, moe = fastest([taken[0], *taken[2:own]]), taken[1]
        peers = _peer_rows(layers.beside, "ffn", dict(zip(timed, taken[own:], strict=True)), moe)
    names = {layer.last_backend for layer in layers.experts}
    row = {"mode": "ffn", "tokens": tokens, "batch": None, "seq": None, "layers": count, "other_seconds": None}
    row |= {"launch": launch, "peers": peers}
    return row | measured(costs, [], names) | Paired(dense, moe).summary() | {"bound": ffn_bound(costs, state.rates)}


def _whole_row(
    state: Setting,
    case: BenchCase,
    other: Any,
    peer: Any,
    beside: list[Beside],
    mode: str,
    batch: int,
    seq: int,
) -> dict[str, Any]:
    assert state.rates is not None
    longest = seq + (0 if mode == "prefill" else state.config.new_tokens)
    random_ids(case.dense.config, 1, longest, 0, state.device)  # too long is said before anything is timed
    ids_BS = random_ids(case.dense.config, batch, seq, state.control.seed, state.device)

    def call(model: Any) -> Call:
        return (
            prefill_call(model, ids_BS) if mode == "prefill" else Decoder(model, ids_BS, state.config.new_tokens).call()
        )

    recorder, watched = Recorder(), call(case.moe)
    watched.prepare()
    with recorder.watch(case.experts):
        watched.run()
    subjects = [case.dense, case.moe, other, *([] if peer is None else [peer])]
    timed, own = _checked(beside, mode, lambda one: call(one.runs)), len(subjects)
    taken = _alternate(state, [*(call(subject) for subject in subjects), *timed.values()], warmup=2)
    paired = Paired(fastest([taken[0], *taken[3:own]]), taken[1]).summary()
    paired["peers"] = _peer_rows(beside, mode, dict(zip(timed, taken[own:], strict=True)), taken[1])
    other_seconds = sorted(taken[2])[len(taken[2]) // 2]
    tokens = batch * seq if mode == "prefill" else batch
    costs = list(recorder.costs.values())
    fixed, names = _fixed(state, case, mode, tokens)
    names |= {case.experts[name].last_backend for name in recorder.costs}
    of_ffns = ffn_bound([*costs, *fixed], state.rates)
    row = {"mode": mode, "tokens": tokens, "batch": batch, "seq": seq, "layers": len(costs) + len(fixed)}
    row |= {"other_seconds": other_seconds, "bound": whole_bound(paired["dense_seconds"], other_seconds, of_ffns)}
    return row | measured(costs, fixed, names) | paired


def _checked(beside: Sequence[Beside], mode: str, call: Callable[[Beside], Call]) -> dict[str, Call]:
    """The calls of the peers that run, by name."""
    found = {one.name: checked(one, call(one)) for one in beside if one.can(mode)}
    return {name: made for name, made in found.items() if made is not None}


def _peer_rows(
    beside: Sequence[Beside], mode: str, taken: dict[str, list[float]], moe: Sequence[float]
) -> list[dict[str, Any]]:
    return [peer_row(one, mode, taken.get(one.name), moe) for one in beside]


def _fixed(state: Setting, case: BenchCase, mode: str, tokens: int) -> tuple[list[FFNCost], set[str]]:
    """FFNs of the timed stack without a router, left dense or pruned to their shared neurons, and the paths they took."""
    encoder_decoder = bool(getattr(case.dense.config, "is_encoder_decoder", False))
    stack = "decoder" if encoder_decoder and mode == "decode" else "encoder"
    costs, names = [], set()
    for site in find_sites(case.dense, state.config.ffn):
        layer = case.installed.get(site.name)
        if site.stack == stack and not isinstance(layer, MoEFFN):
            always = layer if isinstance(layer, PrunedFFN) else None
            size = 1 if state.config.weights == "int8" else case.dense.dtype.itemsize
            costs.append(fixed_cost(site, always, tokens, size))
            names.add("dense" if always is None else always.last_backend)
    return costs, names


def _alternate(state: Setting, calls: list[Call], warmup: int) -> list[list[float]]:
    config = state.config
    return alternate(
        calls, repeats=config.repeats, seconds=config.seconds, warmup=warmup, device=state.device, clock=config.clock
    )


def measured(routed: Sequence[FFNCost], fixed: Sequence[FFNCost], backends: set[str]) -> dict[str, Any]:
    """Means over the FFNs; `top_k` over those with a router, None without any."""
    costs = [*routed, *fixed]
    first = costs[0]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "backend": "+".join(sorted(backends - {""})),
        "top_k": mean([cost.experts_per_token for cost in routed]) if routed else None,
        "active_fraction": mean([cost.active_share for cost in costs]),
        "touched_fraction": mean([cost.touched_share for cost in costs]),
        "num_experts": first.num_experts,
        "expert_size": (first.num_neurons - first.num_shared) // first.num_experts,
        "d_model": first.d_model,
        "num_neurons": first.num_neurons,
        "gated": first.projections == 3,
        "router_flops_fraction": first.overhead / (first.num_neurons * first.d_model * first.projections),
    }


def _complete(state: Setting, case: BenchCase, row: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a case share."""
    row["dtype"] = str(case.dense.dtype).removeprefix("torch.")
    row["weights"] = state.config.weights
    row["activation"] = case.sites[0].activation
    row["device"], row["threads"], row["clock"] = str(state.device), torch.get_num_threads(), state.config.clock
    row["of_bound"] = row["speedup"] / row["bound"]
    row["fastest"] = fastest_way(row)
    return row


def fastest_way(row: dict[str, Any]) -> str:
    """What took least in the median of this row: `moe`, `dense` or the name of a peer. Equals go to the MoE, then to dense."""
    seconds = {"moe": row["moe_seconds"], "dense": row["dense_seconds"]}
    seconds |= {peer["peer"]: peer["seconds"] for peer in row["peers"] if peer["seconds"] is not None}
    return min(seconds, key=lambda name: seconds[name])


def _remember(state: Setting, what: str, dense: int, moe: int) -> None:
    state.memory.append({"of": what, "dense_bytes": dense, "moe_bytes": moe, "ratio": moe / dense})
