"""What a report shows of one run, as plain JSON: read from its stages, and measured on calibration tokens where they are.

A section whose stages are not there is None, and `missing` says which command would make it.
"""

import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moefication_cli.errors import MoEficationError
from moefication_cli.evaluation.rows import by_data
from moefication_cli.models.folder.moe_folder import MoEFolder, read_moe_folder
from moefication_cli.models.loading import load
from moefication_cli.models.surgery import installed_layers
from moefication_cli.routing.rules import as_mask
from moefication_cli.runs.control import Control
from moefication_cli.runs.data import calibration_data, open_examples, text_reader
from moefication_cli.runs.inputs import RunModel, layer_seed, read_graph, read_partition, read_tokens
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact, stages_in
from moefication_cli.store.rundir import RunDir

_LOAD_TOKENS = 2048  # that expert loads are counted on
_TEXT_TOKENS = 160  # of the text whose tokens are coloured
_CELLS = 96  # rows and columns of a co-activation picture, at most


@dataclass
class ReportData:
    """One run; see the module docstring."""

    name: str
    run: str
    model: str | None
    task: str | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # contents of metrics.json, with `name`
    layers: list[dict[str, Any]] | None = None
    load: list[dict[str, Any]] | None = None  # per layer: name, share_E of the tokens that run each expert
    text: list[dict[str, Any]] | None = None  # tokens in order: text, share of all experts that ran
    coactivation: list[dict[str, Any]] | None = None  # per layer: name, matrix between groups of experts, 0 to 1
    stages: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def applied(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(evaluation, its row of what RUN/model does), of the evaluation with most examples; None without one."""
        found = [(e, row) for e in self.evaluations for row in e["rows"] if row["applied"]]
        return max(found, key=lambda pair: int(pair[0]["examples"]), default=None)


def gather(run: RunDir, model: RunModel, control: Control) -> ReportData:
    """Everything a report shows of a run. Runs the converted model on one text. Raises CorruptArtifactError."""
    made = {stage: run.read_stage(stage) for stage in stages_in(run.root) if run.manifest(stage) is not None}
    data = ReportData(run.root.name or str(run.root), str(run.root), run.info.model, run.info.task)
    data.stages = [_stage(name, stage) for name, stage in made.items() if name != "report"]
    for name in (name for name in made if name.startswith("eval/")):
        metrics = jsonio.read_object(made[name].path / "metrics.json")
        for dataset, part in by_data(metrics).items():
            title = name.partition("/")[2] + (f": {dataset}" if dataset else "")
            data.evaluations.append({**metrics, **part, "name": title})
    if not data.evaluations:
        data.missing.append(f"quality: moefication eval {run.root} --data TEST")
    converted, activations = made.get("model"), made.get("activations")
    if converted is None:
        data.missing.append(f"layers, experts and text: moefication apply {run.root}")
    else:
        data.layers = _layers(converted, activations, made.get(f"router/{converted.config.get('router')}"))
        moe = read_moe_folder(converted.path)
        if activations is None:
            data.missing.append(f"load and text: {run.command('activations')}")
        else:
            data.load = _load(model, activations, moe, control)
            data.text = _text(run, model, converted, activations, control)
    if "graph" in made and "split" in made:
        data.coactivation = [_coactivation(model, made["graph"], made["split"], i) for i in range(len(model.sites))]
    else:
        data.missing.append(f"co-activation: moefication build-graph {run.root}")
    return data


def _stage(name: str, stage: Artifact) -> dict[str, Any]:
    environment = stage.manifest.environment
    return {
        "stage": name,
        "seconds": stage.manifest.seconds,
        "bytes": sum(int(entry["bytes"]) for entry in stage.manifest.files.values()),
        "finished": environment.get("finished"),
        "host": environment.get("host"),
        "device": environment.get("device"),
        "command": shlex.join(stage.manifest.command_line),
        "versions": environment.get("versions") or {},
        "inputs": dict(stage.manifest.inputs),
        "digest": stage.digest,
    }


def _layers(converted: Artifact, activations: Artifact | None, router: Artifact | None) -> list[dict[str, Any]]:
    found = []
    for index, layer in enumerate(converted.metrics["layers"]):
        row = {key: layer.get(key) for key in (
            "name", "num_experts", "expert_size", "always_on", "rule", "top_k", "router_width", "correction_rank",
            "ffn_flops_fraction", "experts_mean", "experts_p10", "experts_p90",
        )}  # fmt: skip
        if activations is not None:
            row |= {key: activations.metrics["layers"][index].get(key) for key in ("firing", "dead_neurons")}
        if router is not None:
            row["captured"] = router.metrics["layers"][index].get("captured")
        found.append(row)
    return found


def _load(model: RunModel, activations: Artifact, moe: MoEFolder, control: Control) -> list[dict[str, Any]]:
    """Per layer the share of calibration tokens that run each expert; 1 for all experts of a dense layer."""
    found = []
    for index, layer in enumerate(moe.layers):
        share_E = torch.ones(layer.num_experts)
        if layer.router is not None and layer.rule is not None:
            tokens = read_tokens(activations, index, _LOAD_TOKENS, layer_seed(control.seed, index))
            selected = layer.rule.select(layer.router.scores(tokens.x_TD))
            share_E = as_mask(selected, layer.num_experts).float().mean(0)
        elif not layer.dense:
            share_E = torch.zeros(layer.num_experts)
        found.append({"name": layer.name, "always_on": layer.num_shared, "share_E": share_E.tolist()})
    return found


def _text(
    run: RunDir, model: RunModel, converted: Artifact, activations: Artifact, control: Control
) -> list[dict[str, Any]] | None:
    """The tokens of the first calibration text of some length, each with the share of all experts that ran for it."""
    try:
        reader = text_reader(model)
        quiet = Control(seed=control.seed)
        examples = open_examples(run, reader, calibration_data(run, model, activations), quiet)
    except MoEficationError as error:  # the data has gone, or changed
        control.say(f"no text is coloured: {error.message}")
        return None
    batches = (batch for batch in examples.calibration(64 * _TEXT_TOKENS, control.seed, 1))
    batch = max(batches, key=lambda batch: min(batch.num_tokens, _TEXT_TOKENS), default=None)
    if batch is None:
        return None
    mixture = load(converted.path, backend="auto", device=model.device, task=run.info.task,
                   trust_remote_code=control.trust_remote_code)  # fmt: skip
    counts: list[Tensor] = []
    total = 0
    for site in model.sites:
        layer = installed_layers(mixture).get(site.name)
        if isinstance(layer, MoEFFN) and layer.router is not None and site.stack == model.sites[0].stack:
            layer.select = _recording(layer, counts)
            total += layer.weights.num_experts
    with torch.inference_mode():
        mixture(**batch.to(model.device).inputs)
    if not counts:
        return None
    share_T = torch.stack(counts).sum(0).float() / total
    mask = batch.inputs.get("attention_mask")
    ids = batch.inputs["input_ids"][0] if mask is None else batch.inputs["input_ids"][0][mask[0].bool()]
    words = [reader.tokenizer.decode([token]) for token in ids.tolist()]
    pieces = reader.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [
        {"text": word, "starts": starts, "share": float(share)}
        for word, starts, share in zip(words, _word_starts(pieces), share_T, strict=False)
    ][:_TEXT_TOKENS]


def _word_starts(pieces: list[str]) -> list[bool]:
    """Which pieces begin a word: those that carry a mark of it, or, in vocabularies that mark the others, those without."""
    marks = ("\u2581", "\u0120")  # of SentencePiece and of byte-level BPE
    if any(piece.startswith(marks) for piece in pieces):
        return [piece.startswith(marks) for piece in pieces]
    return [not piece.startswith("##") for piece in pieces]


def _recording(layer: MoEFFN, counts: list[Tensor]) -> Any:
    router, rule = layer.router, layer.rule
    assert router is not None and rule is not None

    def select(x_TD: Tensor, weights: Any) -> Tensor:
        mask_TE = as_mask(rule.select(router.scores(x_TD)), weights.num_experts)
        counts.append(mask_TE.sum(1).cpu())
        return mask_TE

    return select


def _coactivation(model: RunModel, graph: Artifact, split: Artifact, index: int) -> dict[str, Any]:
    """Co-activation between groups of neighbouring experts, neurons in expert order, relative to the largest cell."""
    found, order_F = read_graph(graph, index), read_partition(split, index).order_F()
    neurons = len(order_F)
    cells = min(_CELLS, neurons)
    place_F = torch.empty(neurons, dtype=torch.int64)
    place_F[order_F] = torch.arange(neurons) * cells // neurons
    row_M = torch.repeat_interleave(torch.arange(neurons), found.indptr_F1.diff())
    matrix = torch.zeros(cells, cells, dtype=torch.float64)
    flat = place_F[row_M] * cells + place_F[found.indices_M.long()]
    matrix.view(-1).index_add_(0, flat, found.weights_M.double())
    matrix /= matrix.max().clamp_min(1e-30)
    return {"name": model.names[index], "matrix": [[round(cell, 3) for cell in row] for row in matrix.tolist()]}
