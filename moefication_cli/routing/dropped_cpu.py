"""CPU kernel (numba) of `compensation.Dropped`: what left-out experts would have written, each computed once.

Tokens and neurons are taken in tiles whose rows of the output and of W_down stay in a core's cache. Neurons that do not
fire are skipped: most of those of a ReLU model that a router leaves out.

Axes: T tokens, D model width, F neurons, E experts.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefication_cli.compiled import cached_njit

Array = np.ndarray[Any, Any]

_TILE_BYTES = 128 * 2**10  # of the output, and twice as many of W_down: together within a core's second-level cache


@cached_njit(Path(__file__).parent, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _add(
    drop_TE: Array, h_TF: Array, w_down_FD: Array, out_TD: Array, num_shared: int, tile_tokens: int, tile_experts: int
) -> None:
    tokens, experts = drop_TE.shape
    size, width = (h_TF.shape[1] - num_shared) // experts, out_TD.shape[1]
    fires = np.empty(tile_experts * size + 4, np.int64)
    for first in range(0, tokens, tile_tokens):
        for expert in range(0, experts, tile_experts):
            for t in range(first, min(first + tile_tokens, tokens)):
                count = 0
                for e in range(expert, min(expert + tile_experts, experts)):
                    if drop_TE[t, e]:
                        for f in range(num_shared + e * size, num_shared + (e + 1) * size):
                            if h_TF[t, f] != 0:
                                fires[count] = f
                                count += 1
                out_D = out_TD[t]
                whole = count - count % 4
                for n in range(0, whole, 4):
                    a, b, c, d = fires[n], fires[n + 1], fires[n + 2], fires[n + 3]
                    h_a, h_b, h_c, h_d = h_TF[t, a], h_TF[t, b], h_TF[t, c], h_TF[t, d]
                    for i in range(width):
                        out_D[i] += (h_a * w_down_FD[a, i] + h_b * w_down_FD[b, i]) + (
                            h_c * w_down_FD[c, i] + h_d * w_down_FD[d, i]
                        )
                for n in range(whole, count):
                    f, h = fires[n], h_TF[t, fires[n]]
                    for i in range(width):
                        out_D[i] += h * w_down_FD[f, i]


def add_dropped(drop_TE: Tensor, h_TF: Tensor, w_down_FD: Tensor, num_shared: int, out_TD: Tensor) -> None:
    """Add to `out_TD` (float32) what the routed experts marked in `drop_TE` (bool) write, in place.

    `h_TF` are the activations of all neurons, shared ones first. Each token's sum is the same for any number of threads.
    """
    width = out_TD.shape[1]
    size = (h_TF.shape[1] - num_shared) // drop_TE.shape[1]
    tile_tokens = max(1, _TILE_BYTES // (4 * width))
    tile_experts = max(1, 2 * _TILE_BYTES // (4 * width * size))
    w_down = w_down_FD.contiguous().numpy()

    def part(rows: tuple[Tensor, Tensor, Tensor]) -> None:
        drop, h, out = (tensor.numpy() for tensor in rows)
        _add(drop, h, w_down, out, num_shared, tile_tokens, tile_experts)

    threads = torch.get_num_threads()
    parts = list(zip(*(tensor.chunk(threads) for tensor in (drop_TE, h_TF, out_TD)), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, parts))
