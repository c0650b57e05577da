"""Experts of stock MoE models, on the CPU kernels: y_t = sum over k of weight_tk * down_e act(gate_e x_t) * (up_e x_t).

For weights as transformers keeps them, `gate_up_proj` [E, 2N, D] (or `up_proj` [E, N, D]) and `down_proj` [E, D, N], read where
they lie: both projections are dot products with rows, `numba_kernels.project`. Two steps, shared by the threads of one team:
hidden activations of all (token, expert) pairs, times the router's weight; then the outputs, of which every thread owns some
columns, so that sums need no locks and are the same bytes for any number of threads. All arithmetic between x and y is float32.
Forward only. Axes: T tokens, D width, E experts, N neurons per expert, K experts per token, P = T*K pairs.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moefication_cli.compiled import cached_cfunc, cached_njit
from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu.numba_backend import DTYPES, SERIAL_WORK, activation_code, kernels_for, openmp
from moefication_cli.runtime.cpu.numba_kernels import BATCH, F32, activate, internal

HERE = Path(__file__).parent

MOST_HIDDEN = 16 << 20  # floats of hidden activations at once (64 MiB): longer inputs are done in parts
FEW_ROWS, MANY_ROWS = 32, 128  # rows of a matrix per work item, for less and for more tokens than...
MANY_TOKENS = 32
# The table of a call. Lists: GROUPS holds (expert, first pair, number of pairs <= BATCH), TOKENS and WEIGHTS belong to the pairs.
X, Y, UP, DOWN, D, N, GATED, ACT, SIZE, PROJECT, ROWS, TEAM, GIVE_WAY = range(13)
GROUPS, NUM_GROUPS, TOKENS, WEIGHTS, HIDDEN, HIDDEN_BYTES, SCRATCH, SCRATCH_BYTES = range(13, 21)
TICKET, FIRST, FIRST_DONE, SECOND = 24, 32, 40, 48  # written by all threads, apart from the rest and from each other
SLOTS = 56


@internal
def _zeros(address, count):
    for at in range(0, count, 16):
        v.store(F32, address + 4 * at, v.zero())


@internal
def _hidden(s, item, scratch):
    """act(gate x) * (up x) * weight for the pairs of one group and some neurons, into HIDDEN."""
    neurons, length, size, rows = v.at(s, N), v.at(s, D), v.at(s, SIZE), v.at(s, ROWS)
    group, part = divmod(item, (neurons + rows - 1) // rows)
    entry = v.at(s, GROUPS) + 24 * group
    expert, first, m = v.get_i64(entry), v.get_i64(entry + 8), v.get_i64(entry + 16)
    begin = part * rows
    n, row_bytes, line = min(rows, neurons - begin), size * length, 4 * rows
    inputs = scratch
    h = (inputs + 8 * (BATCH + 8) + 63) // 64 * 64
    g = h + line * (BATCH + 8)
    for i in range(m + 4):
        token = v.get_i64(v.at(s, TOKENS) + 8 * (first + min(i, m - 1)))
        v.put_i64(inputs + 8 * i, v.at(s, X) + 4 * length * token)
    matrices = 2 if v.at(s, GATED) != 0 else 1
    w = v.at(s, UP) + row_bytes * (matrices * expert * neurons + begin)
    padded = (m + 3) // 4 * 4
    _zeros(g, padded * rows)
    v.call_8(v.at(s, PROJECT), inputs, m, w, row_bytes, n, length, g, line)
    if matrices == 2:
        _zeros(h, padded * rows)
        v.call_8(v.at(s, PROJECT), inputs, m, w + row_bytes * neurons, row_bytes, n, length, h, line)
    for i in range(m):
        weight = v.splat(v.get_f32(v.at(s, WEIGHTS) + 4 * (first + i)))
        out = v.at(s, HIDDEN) + v.at(s, HIDDEN_BYTES) * (first + i) + 4 * begin
        for j in range(0, n, 16):
            value = v.mul(activate(v.at(s, ACT), v.load(F32, g + i * line + 4 * j)), weight)
            if matrices == 2:
                value = v.mul(value, v.load(F32, h + i * line + 4 * j))
            v.store_part(F32, out + 4 * j, value, min(16, n - j))


@internal
def _outputs(s, item, scratch):
    """Some columns of y for all tokens: the sum over the groups."""
    width, length, size, rows = v.at(s, D), v.at(s, N), v.at(s, SIZE), v.at(s, ROWS)
    begin = item * rows
    n, row_bytes, line = min(rows, width - begin), size * length, 4 * rows
    inputs = scratch
    out = (inputs + 8 * (BATCH + 8) + 63) // 64 * 64
    for group in range(v.at(s, NUM_GROUPS)):
        entry = v.at(s, GROUPS) + 24 * group
        expert, first, m = v.get_i64(entry), v.get_i64(entry + 8), v.get_i64(entry + 16)
        for i in range(m + 4):
            v.put_i64(inputs + 8 * i, v.at(s, HIDDEN) + v.at(s, HIDDEN_BYTES) * (first + min(i, m - 1)))
        _zeros(out, (m + 3) // 4 * 4 * rows)
        w = v.at(s, DOWN) + row_bytes * (expert * width + begin)
        v.call_8(v.at(s, PROJECT), inputs, m, w, row_bytes, n, length, out, line)
        for i in range(m):
            y = v.at(s, Y) + 4 * (width * v.get_i64(v.at(s, TOKENS) + 8 * (first + i)) + begin)
            for j in range(0, n, 16):
                lanes = min(16, n - j)
                total = v.add(v.load_part(F32, y + 4 * j, lanes), v.load(F32, out + i * line + 4 * j))
                v.store_part(F32, y + 4 * j, total, lanes)


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def run_native(s):
    """Both steps of one call, alone or as one thread of its team."""
    rows = v.at(s, ROWS)
    scratch = v.at(s, SCRATCH) + v.at(s, SCRATCH_BYTES) * v.atomic_add(s + 8 * TICKET, 1)
    total = v.at(s, NUM_GROUPS) * ((v.at(s, N) + rows - 1) // rows)
    while True:
        item = v.atomic_add(s + 8 * FIRST, 1)
        if item >= total:
            break
        _hidden(s, item, scratch)
        v.atomic_add(s + 8 * FIRST_DONE, 1)
    if v.at(s, TEAM) > 1:
        v.wait_for(s + 8 * FIRST_DONE, total, v.at(s, GIVE_WAY))
    while True:
        item = v.atomic_add(s + 8 * SECOND, 1)
        if item >= (v.at(s, D) + rows - 1) // rows:
            return
        _outputs(s, item, scratch)


@cached_njit(HERE, "int64(" + ", ".join(["int64"] * 19) + ")", nogil=True, error_model="numpy")
def forward_native(
    worker, parallel, give_way, project, x, y, ids, weights, up, down, tokens, k, experts, width, neurons, gated,
    act, size, threads,
):  # fmt: skip
    """y [T, D] (float32, zero before) of x [T, D] (float32), ids [T, K] and weights [T, K]; gives -1 for an id out of range, else 0."""
    pairs = tokens * k
    start = np.zeros(experts + 1, np.int64)
    for p in range(pairs):
        e = v.get_i64(ids + 8 * p)
        if e < 0 or e >= experts:
            return -1
        start[e + 1] += 1
    groups = np.empty(3 * (pairs // BATCH + min(pairs, experts) + 1), np.int64)
    count = 0
    for e in range(experts):
        of_expert = start[e + 1]
        start[e + 1] += start[e]
        for first in range(0, of_expert, BATCH):
            groups[3 * count] = e
            groups[3 * count + 1] = start[e] + first
            groups[3 * count + 2] = min(BATCH, of_expert - first)
            count += 1
    listed, scales = np.empty(pairs, np.int64), np.empty(pairs, np.float32)
    for p in range(pairs):  # pairs of an expert stay in the order of their tokens
        e = v.get_i64(ids + 8 * p)
        listed[start[e]] = p // k
        scales[start[e]] = v.get_f32(weights + 4 * p)
        start[e] += 1
    line = (neurons + 15) // 16 * 16
    hidden = np.empty(pairs * line + 16, np.float32)
    rows = FEW_ROWS if tokens < MANY_TOKENS else MANY_ROWS
    each = 8 * (BATCH + 8) + 128 + 2 * 4 * rows * (BATCH + 8) + 64
    scratch = np.empty(threads * each + 64, np.uint8)
    table = np.zeros(SLOTS, np.int64)
    s = np.int64(table.ctypes.data)
    v.put(s, X, x)
    v.put(s, Y, y)
    v.put(s, UP, up)
    v.put(s, DOWN, down)
    v.put(s, D, width)
    v.put(s, N, neurons)
    v.put(s, GATED, gated)
    v.put(s, ACT, act)
    v.put(s, SIZE, size)
    v.put(s, PROJECT, project)
    v.put(s, ROWS, rows)
    v.put(s, TEAM, threads)
    v.put(s, GIVE_WAY, give_way)
    v.put(s, GROUPS, np.int64(groups.ctypes.data))
    v.put(s, NUM_GROUPS, count)
    v.put(s, TOKENS, np.int64(listed.ctypes.data))
    v.put(s, WEIGHTS, np.int64(scales.ctypes.data))
    v.put(s, HIDDEN, np.int64(hidden.ctypes.data))
    v.put(s, HIDDEN_BYTES, 4 * line)
    v.put(s, SCRATCH, np.int64(scratch.ctypes.data))
    v.put(s, SCRATCH_BYTES, each)
    if threads > 1:
        v.call_parallel(parallel, worker, s, threads)
    else:
        v.call_1(worker, s)
    groups[0], listed[0], scales[0], hidden[0], scratch[0], table[0] = 0, 0, 0, 0, 0, 0  # keeps them alive until here
    return 0


def native_obstacle(up: Tensor, down: Tensor) -> str | None:
    """Why these weights cannot be read where they lie, or None."""
    for name, w in (("up", up), ("down", down)):
        if w.device.type != "cpu" or w.dtype not in DTYPES or w.dtype != up.dtype:
            return f"the {name} projection is {w.dtype} on {w.device}; the kernels read float32 or bfloat16 on the CPU"
        if not w.is_contiguous():
            return f"the {name} projection is not contiguous"
    return None


def native_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y_TD of stock experts: `up` [E, 2N, D] (gate rows, then up rows) or [E, N, D], `down` [E, D, N]; in the dtype of x.

    `activation` is one of `ffn.ACTIVATIONS`. Raises ConfigError for an expert id out of range and where gradients are asked
    for, UnavailableError for weights the kernels cannot read.
    """
    num_experts, width, neurons = down.shape
    obstacle = native_obstacle(up, down)
    if obstacle is not None:
        raise UnavailableError(obstacle, 'use experts_implementation="eager"')
    if torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad or up.requires_grad):
        raise ConfigError("the compiled experts compute no gradients", "use torch.inference_mode()")
    gated, act = int(up.shape[1] == 2 * neurons), activation_code(activation)
    wide_TD = x_TD.detach().float().contiguous()
    y_TD = torch.zeros_like(wide_TD)
    ids_TK, weights_TK = ids_TK.long().contiguous(), weights_TK.detach().float().contiguous()
    parallel, give_way = openmp()
    top_k = ids_TK.shape[1]
    step = max(1, MOST_HIDDEN // max(1, top_k * neurons))
    for first in range(0, len(wide_TD) if top_k else 0, step):
        x, ids = wide_TD[first : first + step], ids_TK[first : first + step]
        work = ids.numel() * neurons * width * (2 + gated)
        threads = torch.get_num_threads() if work >= SERIAL_WORK and parallel else 1
        failed = forward_native(
            run_native.address, parallel, give_way, kernels_for(up.dtype)[0], x.data_ptr(), y_TD[first:].data_ptr(),
            ids.data_ptr(), weights_TK[first:].data_ptr(), up.data_ptr(), down.data_ptr(), len(x), top_k, num_experts,
            width, neurons, gated, act, up.dtype.itemsize, threads,
        )  # fmt: skip
        if failed:
            raise ConfigError(f"selected expert id out of range: the layer has {num_experts} experts")
    return y_TD.to(x_TD.dtype)
