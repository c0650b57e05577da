"""Measure the rows of `eval`: those of one fraction in one pass over the data.

Every batch goes through the stock dense model and then, in turn, through every row's layers, so that all rows see the
same examples and those of one fraction share the machine's faster and slower moments.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moefication_cli.config import EvalConfig
from moefication_cli.evaluation.rows import compare_int8, compare_with, row_of
from moefication_cli.evaluation.selections import SelectionRow, StockFFN, count_selections
from moefication_cli.evaluation.table import EvalInputs, ground_of, rows_by_fraction
from moefication_cli.models.loading import LoadedModel
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import ffn_share
from moefication_cli.models.surgery import ffn_twin, install
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import load_whole, open_examples
from moefication_cli.runs.inputs import RunModel
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.tasks.examples import Batch, Examples, Scores, Summary, compare, summarise

BASELINES = ("static", "paper", "teal", "cmoe")  # what a router must beat


def measure(
    inputs: EvalInputs,
    selections: list[str],
    fractions: list[float],
    data: dict[str, str],
    config: EvalConfig,
    control: Control,
) -> dict[str, Any]:
    """The content of metrics.json; `data` is {name: data}, as `tasks.data_files.named_data` makes it.

    Rows carry the name of their data, where it has one, in `data`; `datasets` then has what else was measured on each,
    and `dense`, `examples` and `tokens` are those of the first. Raises ConfigError (no data, no router, a budget that
    cannot be met).
    """
    run, model = inputs.run, inputs.model
    dense = load_whole(run, model, config.task, config.dtype)
    converted = replace(dense, model=ffn_twin(dense.model, model.sites))
    share = ffn_share(dense.model, model.sites)
    opened = {name: open_examples(run, dense, replace(config, data=path), control) for name, path in data.items()}
    ground = ground_of(inputs, converted.model, config, control)
    mask = TokenMask(converted.model)
    measured: dict[str, dict[str, Any]] = {}
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in opened}
    for rows in rows_by_fraction(ground, selections, fractions):
        for name, examples in opened.items():
            for row in rows:
                row.seconds, row.measured = 0.0, []
            summary, seconds, tokens = _run_all(dense, converted, model, examples, rows, mask, config, control)
            reference = {
                "metric": summary.metric,
                "value": summary.value,
                "stderr": summary.stderr,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
            found = _entries(rows, reference | {"ffn_share": share}, tokens, _dense_macs(model, rows), control.seed)
            entries[name] += [{"data": name} | entry for entry in found] if name else found
            said = {"data": data[name], "examples": summary.num_examples, "tokens": tokens, "dense": reference}
            measured.setdefault(name, said)
        rows.clear()  # before those of the next fraction are made
    first = next(iter(measured.values()))
    return {
        "schema": "moefication/metrics@1",
        "model": str(model.checkpoint.source.ref),
        "data": config.data,
        "examples": first["examples"],
        "tokens": first["tokens"],
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "fraction_is": "a bound on the mean over calibration data; ffn_flops_fraction is what this data took",
        "ffn_share": share,
        "dense": first["dense"],
        **({} if "" in measured else {"datasets": measured}),
        "rows": [entry for found in entries.values() for entry in found],
    }


def _entries(
    rows: Sequence[SelectionRow], reference: dict[str, Any], tokens: int, sizes: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """The rows of metrics.json for what was measured last."""
    scores = [Scores.join(row.measured) for row in rows]
    entries = [row_of(row, found, reference, tokens, sizes, seed) for row, found in zip(rows, scores, strict=True)]
    for baseline in BASELINES:
        compare_with(baseline, rows, scores, entries, seed)
    compare_int8(entries)
    return entries


def _dense_macs(model: RunModel, rows: Sequence[SelectionRow]) -> list[float]:
    """Each FFN's part of the dense work: an encoder-decoder's layers see different numbers of tokens."""
    chance = next(row for row in rows if row.selection == "random")
    counted = [layer.num_counted for layer in chance.layers if isinstance(layer, MoEFFN)]
    return [float(site.num_parameters * count) for site, count in zip(model.sites, counted, strict=True)]


@torch.inference_mode()
def _run_all(
    dense: LoadedModel,
    converted: LoadedModel,
    model: RunModel,
    examples: Examples,
    rows: Sequence[SelectionRow],
    mask: TokenMask,
    config: EvalConfig,
    control: Control,
) -> tuple[Summary, float, int]:
    """One pass over the data. Returns the dense model's summary, its seconds and the number of real tokens."""
    reference: list[Scores] = []
    seconds, tokens, warm = 0.0, 0, False
    batches: Iterable[Batch] = examples.batches(config.batch_size)
    for batch in control.track(batches, "eval"):
        placed = batch.to(dense.device)
        if not warm:  # the first pass compiles kernels and touches memory for the first time: untimed
            dense.model(**placed.inputs)
            for row in rows:
                _install(converted, model, row, mask)
                (row.own.loaded if row.own else converted).model(**placed.inputs)
                count_selections(row)
            warm = True
        elif dense.device.type == "cuda":
            dense.model(**placed.inputs)  # a batch of another shape takes longer once, for whatever runs it first
        logits, spent = timed_logits(dense, placed)
        seconds += spent
        tokens += batch.num_tokens
        reference.append(examples.score(logits, batch))
        for row in rows:
            _install(converted, model, row, mask)
            other, spent = timed_logits(row.own.loaded if row.own else converted, placed)
            row.seconds += spent
            row.measured.append(compare(examples, logits, other, batch))
    return summarise(examples.metric, reference), seconds, tokens


def _install(converted: LoadedModel, model: RunModel, row: SelectionRow, mask: TokenMask) -> None:
    net, mask = (converted.model, mask) if row.own is None else (row.own.loaded.model, row.own.mask)
    for site, layer in zip(model.sites, row.layers, strict=True):
        if not isinstance(layer, StockFFN):
            install(net, site, layer, mask)


def timed_logits(loaded: LoadedModel, batch: Batch) -> tuple[Tensor, float]:
    """(logits or embeddings of a batch on the model's device, seconds of the forward pass alone, on a GPU until it has finished)."""
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    started = time.perf_counter()
    outputs = loaded.model(**batch.inputs)
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    seconds = time.perf_counter() - started
    return batch.answers(outputs), seconds
