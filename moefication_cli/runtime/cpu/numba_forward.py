"""The compiled CPU forward pass of one MoE layer: router, selection, experts, compensation, in one call without the GIL.

Two ways to share the work, both from the same function `run`:
few tokens   the threads of one OpenMP team split router rows and (expert, <= 32 neurons) pieces between them, each into its
             own accumulators: every selected weight is read once, by one core. A step starts when the pieces of the one
             before are done, not when every thread has come: one that gets no core (a busy machine) holds nobody up;
many tokens  each thread takes chunks of tokens and does all steps on its own, without a barrier.

The arithmetic is in `numba_kernels`, router and selection in `numba_routing`; here are the order of the steps, the lists of tokens and
the buffers.
Functions take int64 addresses (see `simd`): `layer` and `s` are the tables of `numba_table`, whose axes hold here too. Nothing checks
bounds.
"""

from pathlib import Path

import numpy as np

from moefication_cli.compiled import cached_cfunc, cached_njit
from moefication_cli.runtime.cpu import numba_table as slot
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu.numba_kernels import BATCH, F32, IDENTITY, internal
from moefication_cli.runtime.cpu.numba_routing import (
    aligned,
    describe_call,
    done,
    place_routing,
    route_and_select,
    take,
    wait,
    widen,
    work_together,
)

HERE = Path(__file__).parent

MANY_PIECE, FEW_PIECE = 128, 32
BF16 = np.uint16(0)


@internal
def _experts(s, scratch):
    """All pieces: shared neurons, the low-rank compensation, the experts."""
    layer = v.at(s, slot.LAYER)
    tokens, width, size, piece = v.at(s, slot.T), v.at(layer, slot.D), v.at(layer, slot.W_BYTES), v.at(s, slot.PIECE)
    shared, rank, per_expert, act = (
        v.at(layer, slot.S),
        v.at(layer, slot.C_RANK),
        v.at(layer, slot.N),
        v.at(layer, slot.ACT),
    )
    n_shared, n_rank, n_expert = (
        (shared + piece - 1) // piece,
        (rank + piece - 1) // piece,
        (per_expert + piece - 1) // piece,
    )
    total = n_shared + n_rank + n_expert * v.at(layer, slot.E)
    step = max(1, min(8, total // 64)) if v.at(s, slot.TEAM) > 1 else total
    listed = scratch  # token numbers, then addresses of the batch's rows
    rows = listed + 8 * (tokens + 8)
    ys = rows + 8 * (BATCH + 8)
    nobody = ys + 8 * (BATCH + 8)
    work = nobody + 4 * (width + 16)
    up, gate, down, b_up, b_gate = (
        v.at(layer, slot.W_UP),
        v.at(layer, slot.W_GATE),
        v.at(layer, slot.W_DOWN),
        v.at(layer, slot.B_UP),
        v.at(layer, slot.B_GATE),
    )
    accumulators = np.int64(0)
    kept = v.at(s, slot.KEPT)
    while True:
        begin = take(s, slot.EXPERTS, step)
        if begin >= total:
            wait(s, slot.EXPERTS, total)
            return
        if accumulators == 0:
            accumulators = v.at(s, slot.ACC) + 4 * tokens * width * v.atomic_add(s + 8 * slot.PARTIALS, 1)
            for c in range(0, tokens * width, 16):
                v.store_part(F32, accumulators + 4 * c, v.zero(), min(16, tokens * width - c))
        for item in range(begin, min(begin + step, total)):
            count = 0
            if item < n_shared:
                first, last, code = item * piece, shared, act
                for t in range(tokens):
                    v.put_i64(listed + 8 * count, t)
                    count += v.get_i64(kept + 8 * t) >= 0
            elif item < n_shared + n_rank:
                first, last, code = (item - n_shared) * piece, rank, IDENTITY
                for t in range(tokens):
                    v.put_i64(listed + 8 * count, t)
                    here = v.get_i64(kept + 8 * t)
                    count += here >= 0 and here < v.at(layer, slot.E)
            else:
                e, part = divmod(item - n_shared - n_rank, n_expert)
                first, last, code = shared + e * per_expert + part * piece, shared + (e + 1) * per_expert, act
                on = v.at(s, slot.ON) + e * tokens
                for t in range(tokens):
                    v.put_i64(listed + 8 * count, t)
                    count += np.int64(v.get_u8(on + t))
                if part == 0 and v.at(s, slot.COUNTS) != 0:
                    v.atomic_add(v.at(s, slot.COUNTS) + 8 * e, count)
            n = min(piece, last - first)
            for start in range(0, count, BATCH):
                m = min(BATCH, count - start)
                w1, w2, w3, b1, b2 = up, gate, down, b_up, b_gate
                x, x_bytes, row_bytes = v.at(s, slot.XQ), v.at(s, slot.XQ_BYTES), width * size
                pieces, project = v.at(layer, slot.PIECES), v.at(layer, slot.PROJECT)
                if item >= n_shared and item < n_shared + n_rank:
                    w1, w2, w3, b1, b2 = (
                        v.at(layer, slot.C_IN),
                        np.int64(0),
                        v.at(layer, slot.C_OUT),
                        np.int64(0),
                        np.int64(0),
                    )
                    x, x_bytes, row_bytes = v.at(s, slot.XF), 4 * width, width * v.at(layer, slot.C_BYTES)
                    pieces, project = v.at(layer, slot.C_PIECES), v.at(layer, slot.C_PROJECT)
                for i in range(m + 4):
                    t = v.get_i64(listed + 8 * (start + min(i, m - 1)))
                    v.put_i64(rows + 8 * i, x + t * x_bytes)
                    v.put_i64(ys + 8 * i, accumulators + t * 4 * width if i < m else nobody)
                at = first * row_bytes
                w2 += at if w2 != 0 else 0
                b1 += 4 * first if b1 != 0 else 0
                b2 += 4 * first if b2 != 0 else 0
                v.call_16(
                    pieces,
                    project,
                    rows,
                    ys,
                    m,
                    w1 + at,
                    w2,
                    w3 + at,
                    b1,
                    b2,
                    v.at(layer, slot.SCALES) + 4 * first,
                    v.at(layer, slot.SCALE_BYTES),
                    n,
                    width,
                    row_bytes,
                    code,
                    work,
                )
        done(s, slot.EXPERTS, min(step, total - begin))


@internal
def _finish(s, t, first, last, partials):
    """y_t[first:last] = bias + compensation + the sum of all threads' accumulators; zero at padding."""
    layer = v.at(s, slot.LAYER)
    width, experts, tokens = v.at(layer, slot.D), v.at(layer, slot.E), v.at(s, slot.T)
    kept, size = v.get_i64(v.at(s, slot.KEPT) + 8 * t), v.at(layer, slot.X_BYTES)
    constant, bias = v.at(layer, slot.CONSTANT), v.at(layer, slot.B_DOWN)
    for c in range(first, last, 16):
        lanes, y = min(last - c, 16), v.zero()
        if kept >= 0:
            for p in range(partials):
                y = v.add(y, v.load_part(F32, v.at(s, slot.ACC) + 4 * ((p * tokens + t) * width + c), lanes))
            if bias != 0:
                y = v.add(y, v.load_part(F32, bias + 4 * c, lanes))
            if kept < experts and constant != 0:
                y = v.add(y, v.load_part(F32, constant + 4 * c, lanes))
        where = v.at(s, slot.Y) + size * (t * width + c)
        if size == 4:
            v.store_part(F32, where, y, lanes)
        else:
            v.store_part(BF16, where, y, lanes)


@internal
def _arrange(s, base):
    """Places the buffers of a call behind `base`; gives the end."""
    layer = v.at(s, slot.LAYER)
    tokens, width, experts, team = v.at(s, slot.T), v.at(layer, slot.D), v.at(layer, slot.E), v.at(s, slot.TEAM)
    narrow = v.at(layer, slot.X_BYTES) == 2
    end = aligned(base)
    v.put(s, slot.XF, end if narrow else v.at(s, slot.X))
    end = aligned(end + (4 * tokens * width if narrow else 0))
    integer, q_bytes = v.at(layer, slot.INTEGER) != 0, (width + 63) // 64 * 64 + 64
    v.put(s, slot.XQ, end if integer else v.at(s, slot.XF))
    v.put(s, slot.XQ_BYTES, q_bytes if integer else 4 * width)
    end = aligned(end + (q_bytes * tokens if integer else 0))
    direct = team == 1 and not narrow
    v.put(s, slot.ACC, v.at(s, slot.Y) if direct else end)
    end = aligned(end + (0 if direct else 4 * team * tokens * width))
    end = place_routing(s, end)
    piece = v.at(s, slot.PIECE)
    lists = 8 * (tokens + 2 * BATCH + 24) + 4 * (width + 16)
    blocks = (min(BATCH, tokens) + 4) * (16 * ((piece + 7) // 8 * 8) + 8) + 256
    each = aligned(max(lists + blocks, 4 * (experts + 32)))
    v.put(s, slot.SCRATCH, end)
    v.put(s, slot.SCRATCH_BYTES, each)
    return end + team * each


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def run(s):
    """All steps for the tokens of `s`, alone or as one thread of its team."""
    layer = v.at(s, slot.LAYER)
    tokens, width, team = v.at(s, slot.T), v.at(layer, slot.D), v.at(s, slot.TEAM)
    scratch = v.at(s, slot.SCRATCH) + v.at(s, slot.SCRATCH_BYTES) * v.atomic_add(s + 8 * slot.TICKET, 1)
    if v.at(s, slot.XF) != v.at(s, slot.X):  # bfloat16 inputs are widened once
        widen(s)
    if v.at(layer, slot.INTEGER) != 0:  # quantised once, not once for every expert
        while True:
            t = take(s, slot.QUANTISE, 1)
            if t >= tokens:
                break
            v.call_3(
                v.at(layer, slot.INTEGER),
                v.at(s, slot.XF) + t * 4 * width,
                width,
                v.at(s, slot.XQ) + t * v.at(s, slot.XQ_BYTES),
            )
            done(s, slot.QUANTISE, 1)
        wait(s, slot.QUANTISE, tokens)
    route_and_select(s, scratch)
    _experts(s, scratch)
    partials = v.at(s, slot.PARTIALS)
    parts = (width + 511) // 512 if team > 1 else 1
    columns = 512 if team > 1 else width
    while True:
        item = take(s, slot.FINISH, 1)
        if item >= tokens * parts:
            return
        t, part = divmod(item, parts)
        _finish(s, t, part * columns, min(width, (part + 1) * columns), partials)


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def run_chunks(s):
    """Many tokens: chunk after chunk, each as a team of one with its own table and scratch."""
    own = v.at(s, slot.STATES) + v.at(s, slot.SCRATCH_BYTES) * v.atomic_add(s + 8 * slot.TICKET, 1)
    layer, chunk, tokens = v.at(s, slot.LAYER), v.at(s, slot.CHUNK), v.at(s, slot.T)
    row = v.at(layer, slot.D) * v.at(layer, slot.X_BYTES)
    while True:
        first = v.atomic_add(s + 8 * slot.NEXT, chunk)
        if first >= tokens:
            return
        for entry in range(slot.CALL_SLOTS):
            v.put(own, entry, v.at(s, entry))
        for entry in range(slot.ERROR, slot.CALL_SLOTS):
            v.put(own, entry, 0)
        v.put(own, slot.TEAM, 1)
        v.put(own, slot.T, min(chunk, tokens - first))
        v.put(own, slot.X, v.at(s, slot.X) + first * row)
        v.put(own, slot.Y, v.at(s, slot.Y) + first * row)
        if v.at(s, slot.KIND) == slot.FROM_IDS:
            v.put(own, slot.SELECTED, v.at(s, slot.SELECTED) + 8 * first * v.at(s, slot.K))
        if v.at(s, slot.KIND) == slot.FROM_MASK:
            v.put(own, slot.SELECTED, v.at(s, slot.SELECTED) + first * v.at(layer, slot.E))
        if v.at(s, slot.REAL) != 0:
            v.put(own, slot.REAL, v.at(s, slot.REAL) + first)
        _arrange(own, own + 8 * slot.CALL_SLOTS)
        v.call_1(v.at(s, slot.RUN), own)
        v.atomic_add(s + 8 * slot.PICKED, v.at(own, slot.PICKED))
        if v.at(own, slot.ERROR) != 0:
            v.put(s, slot.ERROR, 1)


@cached_njit(HERE, "int64(" + ", ".join(["int64"] * 15) + ")", nogil=True, error_model="numpy")
def forward(
    layer, run_all, run_some, parallel, give_way, x, y, tokens, kind, selected, k, real, counts, threads, chunk
):
    """y [T, D] of one layer; gives how many experts the tokens had together, or -1 for an id out of range (y is then not to be used).

    `parallel` and `give_way` are GOMP_parallel and sched_yield, or 0 for one thread; `chunk` > 0 splits by tokens.
    """
    state = np.zeros(slot.CALL_SLOTS, np.int64)
    s = np.int64(state.ctypes.data)
    describe_call(s, layer, give_way, x, y, tokens, kind, selected, k, real, counts, threads)
    v.put(s, slot.RUN, run_all)
    v.put(s, slot.CHUNK, chunk)
    v.put(
        s,
        slot.PIECE,
        min(
            FEW_PIECE if chunk == 0 else MANY_PIECE,
            max(8, max(v.at(layer, slot.N), max(v.at(layer, slot.S), v.at(layer, slot.C_RANK)))),
        ),
    )
    if chunk > 0:
        v.put(s, slot.T, chunk)
        v.put(s, slot.TEAM, 1)
        each = aligned(_arrange(s, 0) + 8 * slot.CALL_SLOTS + 128)
        scratch = np.empty(threads * each // 8 + 16, np.int64)
        v.put(s, slot.STATES, aligned(np.int64(scratch.ctypes.data)))
        v.put(s, slot.SCRATCH_BYTES, each)
        v.put(s, slot.T, tokens)
    else:
        scratch = np.empty(_arrange(s, 0) // 8 + 32, np.int64)
        _arrange(s, np.int64(scratch.ctypes.data))
    worker = run_all if chunk == 0 else run_some
    work_together(parallel, worker, s, threads)
    scratch[0] = 0  # keeps it alive until here
    return state[slot.PICKED] if state[slot.ERROR] == 0 else -1
