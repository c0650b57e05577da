"""Which neurons fire together: the co-activation graph of one FFN, from its hidden activations in chunks of tokens.

Source: MoEfication (arXiv 2110.01786), section 3.2: the weight between neurons n and m is the sum over tokens of
h_n * h_m where both are positive; kind "count" counts those tokens instead. (The published script clamps the sum at
1 per mini-batch and truncates it to an integer; neither is done here.)

Shapes: h_TF [T, F] any float dtype and device. Memory: one block of rows x F float32 sums, one chunk of
activations, and the edges kept. Where F x F fits `max_bytes` the tokens are read once and only the upper triangle
is computed; else rows are taken in panels and the tokens are read once per panel.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, NonFiniteError
from moefication_cli.split.graph import Graph, graph_from_edges
from moefication_cli.split.graph_kernels import adopt_lower_weights

CoactivationKind = Literal["sum", "count"]
Chunks = Callable[[], Iterable[Tensor]]

BLOCK_ROWS = 1024  # rows of one product: 1024 x F sums are formed at a time
TOPK_ROWS = 1024


def coactivation_graph(
    chunks: Chunks,
    num_neurons: int,
    *,
    kind: CoactivationKind = "sum",
    neighbours: int | None = None,
    max_bytes: int = 2 * 2**30,
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """The co-activation graph over all tokens.

    `chunks()` yields hidden activations h_TF [T_i, F], the same at every call. `neighbours`: keep an edge when it is
    among the strongest so many of either end; None keeps every positive one. `dtype` bfloat16 multiplies 2 to 3
    times as fast where the processor has it, at a relative error of about 1/256 a product (sums are float32).

    Raises ConfigError on a chunk of another width or a bad option, NonFiniteError on NaN or infinity.
    """
    if kind not in ("sum", "count"):
        raise ConfigError(f"unknown kind of co-activation {kind!r}", "use sum or count")
    if num_neurons < 1 or (neighbours is not None and neighbours < 1):
        raise ConfigError(f"cannot keep {neighbours} neighbours of {num_neurons} neurons", "ask for at least one")
    rows_at_once = min(num_neurons, max(1, max_bytes // (4 * num_neurons)))
    parts = []
    for start in range(0, num_neurons, rows_at_once):
        stop = min(start + rows_at_once, num_neurons)
        sums_RF = _accumulate(chunks, num_neurons, start, stop, kind, dtype)
        parts.append(_edges(sums_RF, start, neighbours))
    if neighbours is not None:
        row_M, col_M, w_M = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return graph_from_edges(row_M, col_M, w_M, num_neurons)
    return _all_edges(parts, num_neurons)


def _accumulate(
    chunks: Chunks, num_neurons: int, start: int, stop: int, kind: CoactivationKind, dtype: torch.dtype
) -> Tensor:
    """sums_RF float32 of rows start..stop; with all rows at once from the upper triangle, mirrored."""
    whole = stop - start == num_neurons
    sums_RF: Tensor | None = None
    for h_TF in chunks():
        if h_TF.dim() != 2 or h_TF.shape[1] != num_neurons:
            raise ConfigError(f"a chunk of activations has shape {tuple(h_TF.shape)}, not [T, {num_neurons}]")
        if not bool(torch.isfinite(h_TF).all()):
            raise NonFiniteError("activations contain NaN or infinity", "collect them again in float32")
        # counts up to 256 are exact in bfloat16; above, they would be rounded by the product's result
        active_TF = h_TF.clamp_min(0).to(dtype) if kind == "sum" else (h_TF > 0).to(torch.float32)
        if sums_RF is None:
            sums_RF = torch.zeros(stop - start, num_neurons, dtype=torch.float32, device=h_TF.device)
        for low in range(start, stop, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, stop)
            first = low if whole else 0
            out_RF = sums_RF[low - start : high - start, first:]
            if active_TF.dtype == torch.float32:
                out_RF.addmm_(active_TF[:, low:high].t(), active_TF[:, first:])
            else:
                out_RF += active_TF[:, low:high].t() @ active_TF[:, first:]
    if sums_RF is None:
        return torch.zeros(stop - start, num_neurons, dtype=torch.float32)
    if whole:
        for low in range(0, num_neurons, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, num_neurons)
            sums_RF[high:, low:high] = sums_RF[low:high, high:].t()
    if not bool(torch.isfinite(sums_RF).all()):
        raise NonFiniteError("sums of co-activation overflow float32", "use kind count for this layer")
    return sums_RF


def _edges(sums_RF: Tensor, start: int, neighbours: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, weight) of the entries to keep, in row order, on the CPU; the diagonal is emptied first."""
    num_rows, num_neurons = sums_RF.shape
    sums_RF[torch.arange(num_rows), torch.arange(start, start + num_rows)] = 0
    parts = []
    for low in range(0, num_rows, TOPK_ROWS):
        block_RF = sums_RF[low : low + TOPK_ROWS]
        if neighbours is not None and neighbours < num_neurons:
            top = block_RF.topk(neighbours, dim=1)
            row = torch.arange(block_RF.shape[0], device=sums_RF.device)[:, None].expand_as(top.indices)
            row, col, w = row.reshape(-1), top.indices.reshape(-1), top.values.reshape(-1)
            row, col, w = row[w > 0], col[w > 0], w[w > 0]
        else:
            row, col = block_RF.nonzero(as_tuple=True)
            w = block_RF[row, col]
        compact = torch.int32 if neighbours is None else torch.int64
        parts.append(((row + (low + start)).to(compact).cpu(), col.to(compact).cpu(), w.cpu()))
    row, col, w = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return row, col, w


def _all_edges(parts: list[tuple[Tensor, Tensor, Tensor]], num_neurons: int) -> Graph:
    """The graph of complete rows in order. Rounding may differ between (n, m) and (m, n): the lower row decides."""
    counts = torch.zeros(num_neurons, dtype=torch.int64)
    for row_M, _, _ in parts:
        counts += torch.bincount(row_M, minlength=num_neurons)
    indptr_F1 = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices_M = torch.cat([col for _, col, _ in parts]).to(torch.int32)
    weights_M = torch.cat([w for _, _, w in parts])
    adopt_lower_weights(indptr_F1.numpy(), indices_M.numpy(), weights_M.numpy())
    return Graph(indptr_F1, indices_M, weights_M)
