"""build-graph: which neurons fire together. Reads `activations` and the model; hidden activations are recomputed."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from moefication_cli.config import GraphConfig
from moefication_cli.ffn import FFNWeights
from moefication_cli.routing.scores import token_chunks
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import graph_cost
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import (
    layer_options,
    layer_seed,
    layered_result,
    open_model,
    read_graph,
    read_tokens,
)
from moefication_cli.runs.room import check_room
from moefication_cli.split.coactivation import coactivation_graph
from moefication_cli.split.graph import to_metis_text
from moefication_cli.store.rundir import RunDir


def build_graph(run: RunDir, config: GraphConfig = GraphConfig(), control: Control = Control()) -> Result:
    """Build the co-activation graph of every FFN (MoEfication, section 3.1, equation 4).

        build_graph(RunDir("RUN"))

    Writes RUN/graph/layer_NNN.safetensors (CSR) and, with --export-metis, one file per layer that `gpmetis` reads.
    """
    model = open_model(run, None, control)
    activations = run.require("activations")
    cost = graph_cost(model, config, activations.metrics["layers"][0]["tokens"])
    if control.dry_run:
        return estimate("build-graph", model, run.path("graph"), cost, {"activations": activations})
    with control.ranks.begin(run, "graph", layer_options(config, control, model, {"activations": activations})) as work:
        check_room(work, model, cost, control, "fewer --neighbours")
        for index in control.track(work.pending(), "build-graph", len(model.sites)):
            weights = model.read_ffn(index)
            x_TD = read_tokens(activations, index, config.max_tokens, layer_seed(control.seed, index)).x_TD
            graph = coactivation_graph(
                partial(_hidden_chunks, weights, x_TD),
                weights.num_neurons,
                kind=config.weights,
                neighbours=config.neighbours or None,
            )
            tensors = {"indptr_F1": graph.indptr_F1, "indices_M": graph.indices_M, "weights_M": graph.weights_M}
            metrics = {
                "edges": graph.num_edges,
                "isolated": int((graph.indptr_F1.diff() == 0).sum()),
                "tokens": len(x_TD),
            }
            work.save(index, tensors, {"num_neurons": weights.num_neurons, "weights": config.weights}, metrics=metrics)
        manifest = control.ranks.finish(work)
    result = layered_result("build-graph", work, manifest)
    if config.export_metis and manifest is not None:
        result.payload["metis"] = _export(run, Path(config.export_metis), len(model.sites))
        result.notes.append(f"METIS graphs are in {config.export_metis}; e.g. gpmetis {result.payload['metis'][0]} 32")
    return result


def _hidden_chunks(weights: FFNWeights, x_TD: Tensor) -> Iterator[Tensor]:
    for part in token_chunks(x_TD.shape[0], weights.num_neurons):
        yield weights.hidden(x_TD[part].to(weights.w_up_FD.device))


def _export(run: RunDir, folder: Path, num_layers: int) -> list[str]:
    graph = run.read_stage("graph")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(num_layers):
        path = folder / f"layer_{index:03d}.graph"
        with path.open("w", encoding="ascii") as file:
            file.writelines(to_metis_text(read_graph(graph, index)))
        paths.append(str(path))
    return paths
