"""bench: time of the MoE beside the stock dense model in one run, and beside each row how fast it could be.

`benchmark.subjects` builds the models, `benchmark.rows` times them, `benchmark.bounds` has the formula of `bound`. Times
measure weights and shapes, not quality. Writes one file, beside the compiled kernels: the times that `load` goes by on this
machine (`runtime.kernel_times`).
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

from moefication_cli.benchmark.experts import experts_rows
from moefication_cli.benchmark.peers import PEERS
from moefication_cli.benchmark.rows import rows_of
from moefication_cli.benchmark.subjects import MODES, BenchCase, Setting, cases
from moefication_cli.benchmark.timing import hardware, measure_rates, threads
from moefication_cli.config import BenchConfig
from moefication_cli.errors import ConfigError
from moefication_cli.models.int8 import check_weights_option
from moefication_cli.models.loading import resolve_device, resolve_dtype
from moefication_cli.runs.control import Control, Result
from moefication_cli.runtime.backends import BACKENDS
from moefication_cli.runtime.kernel_times import SHARES, TOKENS, KernelTimes


def bench(target: str | None, config: BenchConfig, control: Control) -> Result:
    """Time a model, a run's RUN/model or a shape, dense and MoE in turns, or a stock MoE's experts. Writes nothing into it.

    Raises ConfigError (model not found, unknown shape or mode, mode the model has not), MissingArtifactError (a run
    without RUN/model), UnavailableError (device, backend).
    """
    if sum(map(bool, (target, config.shape, config.experts))) != 1:
        raise ConfigError(
            "bench takes either MODEL_OR_RUN or --shape or --experts", "moefication bench --shape t5-base"
        )
    if config.backend != "auto" and config.backend not in BACKENDS:
        raise ConfigError(f"there is no backend {config.backend!r}", f"use one of {', '.join(BACKENDS)}, or auto")
    state = Setting(
        config,
        control,
        resolve_device(control.device),
        None if config.mode is None else list(dict.fromkeys(config.mode)),
        list(dict.fromkeys(config.tokens)),
        list(dict.fromkeys(config.batch)),
        list(dict.fromkeys(config.seq)),
        None if config.fractions is None else list(dict.fromkeys(config.fractions)),
        _peers(config),
    )
    if state.peers and (config.experts or state.device.type != "cpu"):
        raise ConfigError(
            "--peers are timed beside models on the CPU", "leave out --experts, and add --device cpu on a GPU"
        )
    if config.weights is not None and config.experts:
        raise ConfigError(
            "--weights int8 is not for the experts of stock models", "leave out one of --weights, --experts"
        )
    check_weights_option(config.weights, state.device, resolve_dtype(config.dtype, state.device))
    most = 4 * (os.cpu_count() or 1)
    if config.threads is not None and config.threads > most:
        raise ConfigError(
            f"--threads {config.threads}: this machine has {os.cpu_count()} cores; at most {most} are tried"
        )
    if config.clock == "cpu" and (state.device.type != "cpu" or config.threads != 1):
        raise ConfigError("--clock cpu counts one thread of the CPU", "add --threads 1 --device cpu")
    name = target or config.experts or str(config.shape)
    if control.dry_run:
        return _planned(state, name)
    with threads(config.threads):
        if config.experts:
            return _experts(state, config.experts, torch.get_num_threads())
        kept: list[str] = []
        for case in cases(state, target):
            dtype = case.dense.dtype
            if state.rates is None:
                state.rates = measure_rates(state.device, dtype, config.clock, integer=state.config.weights == "int8")
            for row in control.track(rows_of(state, case), "bench"):
                state.rows.append(row)
            if case.fraction is not None and "ffn" in case.modes:
                kept += _keep_times(state, case)
        result = _result(state, name, torch.get_num_threads())
        result.notes.extend(kept)
        return result


def _keep_times(state: Setting, case: BenchCase) -> list[str]:
    """Measures the run's FFNs for `load(backend="auto")`, and keeps it; returns what that then does."""
    config = state.config
    if state.device.type != "cpu" or config.backend != "auto" or config.weights or config.clock != "wall":
        return []
    times = KernelTimes(state.control.say)
    kinds = case.moe.moefication.kinds(case.dense.dtype)
    wanted = dict.fromkeys((kinds[name], layer.weights.expert_size) for name, layer in case.experts.items())
    notes = []
    for (kind, size), tokens in itertools.product(wanted, TOKENS):
        times.of(kind, size, tokens, anew=True)
    for kind, size in wanted:
        least = times.masked_from(kind, size, SHARES[0])
        said = "never" if least is None else f"from {least} tokens on"
        notes.append(f"{kind.key}, experts of {size}: computing all neurons and masking is clearly faster {said}")
    return [*notes, f"load(backend='auto') with {torch.get_num_threads()} threads goes by it: {times.path}"]


def _peers(config: BenchConfig) -> list[str]:
    names = config.peers or ()
    return list(PEERS) if "all" in names else list(dict.fromkeys(names))


def _peer_table(row: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: the MoE over a peer, or why there is none."""
    shown = {key: row[key] for key in ("mode", "tokens", "batch", "seq", "fraction", "expert_size")}
    seconds, said = peer["seconds"], peer["said"]
    shown |= {"over": peer["peer"] if said is None else f"{peer['peer']}: {said}"}
    shown |= {"dense_ms": None if seconds is None else 1e3 * seconds, "moe_ms": 1e3 * row["moe_seconds"]}
    return shown | {key: peer[key] for key in ("speedup", "min", "max")}


def _stored(state: Setting) -> str:
    """How weights are stored, and what activations are."""
    dtype = str(state.rows[0]["dtype"])
    return dtype if state.config.weights is None else f"{state.config.weights} weights and {dtype} activations"


def _planned(state: Setting, name: str) -> Result:
    config = state.config
    rows = [
        {"mode": mode, "tokens": state.tokens if mode == "ffn" else None, "batch": state.batches,
         "seq": config.prompt_tokens if mode == "decode" else state.seqs, "fractions": state.fractions}
        for mode in state.modes or MODES
    ]  # fmt: skip
    return Result("bench", rows, {"dry_run": True, "model": name}, notes=["nothing was loaded and nothing is written"])


def _experts(state: Setting, folder: str, num_threads: int) -> Result:
    rows = list(state.control.track(experts_rows(state, folder), "bench"))
    machine = hardware(state.device)
    table = []
    for row in rows:
        shown = {key: row[key] for key in ("mode", "tokens", "batch", "seq")}
        shown |= {f"{name}_ms": None if taken is None else 1e3 * taken for name, taken in row["seconds"].items()}
        for name, ratio in row["speedup"].items():
            shown[f"over_{name}"] = (
                f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"
            )
        table.append(shown)
    notes = [
        f"{folder} on {machine['processor']}, {num_threads} threads, {state.config.clock} clock, {rows[0]['dtype']}, "
        f"torch {machine['torch']}: medians of {rows[0]['repeats']} rounds; over: median of paired ratios, with quartiles"
    ]
    payload = {"schema": "moefication/bench@1", "model": folder, "rows": rows, "table": table, "hardware": machine}
    return Result("bench", table, payload | {"threads": num_threads}, notes=notes)


def _path(state: Setting) -> str:
    """Which instructions the CPU kernels multiply bfloat16 with; nothing where they were not used."""
    row = state.rows[0]
    if row["dtype"] != "bfloat16" or all(each["backend"] != "numba" for each in state.rows):
        return ""
    from moefication_cli.runtime.cpu.bfloat16_paths import default_path

    return f" ({default_path()} in the numba backend)"


def slower_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about the rows in which dense is faster, if there are any."""
    found = [row for row in rows if row["dense_seconds"] < row["moe_seconds"]]
    which = ", ".join(f"{row['mode']} of {row['tokens']} tokens ({row['speedup']:.2f}x)" for row in found)
    return [f"dense is faster than the MoE in {len(found)} of {len(rows)} rows: {which}"] if found else []


def _result(state: Setting, name: str, num_threads: int) -> Result:
    assert state.rates is not None
    machine = hardware(state.device)
    table = []
    for row in state.rows:
        shown = {key: row[key] for key in ("mode", "tokens", "batch", "seq", "fraction", "expert_size", "activation")}
        shown |= {"firing": row["firing"], "dense_ms": 1e3 * row["dense_seconds"], "moe_ms": 1e3 * row["moe_seconds"]}
        if state.peers:
            shown = {"over": "dense"} | shown
        table.append(shown | {key: row[key] for key in ("speedup", "min", "max", "bound", "backend", "fastest")})
        table += [_peer_table(row, peer) for peer in row["peers"]]
    processor = machine["accelerator"] or machine["processor"]
    notes = [
        f"{name} on {processor}, {num_threads} threads, {state.config.clock} clock, {_stored(state)}{_path(state)}, "
        f"torch {machine['torch']}: "
        f"{state.rates.flops_per_second / 1e9:.0f} GFLOP/s and {state.rates.bytes_per_second / 1e9:.1f} GB/s measured",
        "speedup: median of paired rounds, with min and max; bound: larger of arithmetic and bytes, router, union of "
        "the batch's experts and all that is no FFN counted, skipped zeros of ReLU not",
    ]
    notes += slower_rows(state.rows)
    differing = {peer["peer"]: peer["error"] for row in state.rows for peer in row["peers"]
                 if peer["within_rounding"] is False}  # fmt: skip
    for name, error in differing.items():
        notes.append(
            f"warning: the output of {name} differs from dense by {error:.2g}, more than its rounding explains"
        )
    for entry in state.memory:
        what = "whole model" if entry["of"] == "model" else "FFNs"
        notes.append(
            f"memory of the {what}: MoE {entry['moe_bytes'] / 2**20:,.0f} MiB, "
            f"dense {entry['dense_bytes'] / 2**20:,.0f} MiB ({entry['ratio']:.3f}x)"
        )
    payload = {
        "schema": "moefication/bench@1",
        "model": name,
        "rows": state.rows,
        "table": table,
        "hardware": machine,
        "threads": num_threads,
        "rates": vars(state.rates),
        "memory": state.memory,
    }
    return Result("bench", table, payload, notes=notes)
