"""The compiled CPU forward pass of one MoE layer: router, selection, experts, compensation, in one call without the GIL.

Two ways to share the work, both from the same function `run`:
few tokens   the threads of one OpenMP team split router rows and (expert, <= 32 neurons) pieces between them, each into its
             own accumulators: every selected weight is read once, by one core. A step starts when the pieces of the one
             before are done, not when every thread has come: one that gets no core (a busy machine) holds nobody up;
many tokens  each thread takes chunks of tokens and does all steps on its own, without a barrier.

The arithmetic is in `numba_kernels`; here are the order of the steps, the lists of tokens and the buffers. The router is float32.
Functions take int64 addresses (see `simd`): `layer` and `s` are tables of int64 whose entries are named below. No bounds are checked
except expert ids. Axes: T tokens, D width, E experts, N neurons per expert, S shared neurons, R router or compensation rank.
"""

import numpy as np
from numba import cfunc, njit

from moefication_cli.runtime import simd as v
from moefication_cli.runtime.numba_kernels import BATCH, F32, IDENTITY, RELU, SQUARE, TANH, internal

# The layer's table: addresses of tensors (0 if absent), sizes, codes. Filled once by `numba_backend`.
(W_UP, W_GATE, W_DOWN, B_UP, B_GATE, B_DOWN, D, E, N, S, ACT, CONSTANT, TAKEN, C_IN, C_OUT, C_RANK) = range(16)
(
    R_IN,
    R_B_IN,
    R_OUT,
    R_B_OUT,
    R_WIDTH,
    R_ACT,
    R_NORMALISE,
    UNUSED,
    TOP_K,
    THRESHOLD,
    W_BYTES,
    PROJECT,
    PIECES,
    ROUTE,
) = range(16, 30)
LAYER_SLOTS = 30
# The call's table. ON is [E, T] bytes, KEPT [T] int64: how many experts the token has, or -1 at padding.
(LAYER, X, Y, T, KIND, SELECTED, K, REAL, COUNTS, YIELD, TEAM, PIECE, CHUNK, RUN) = range(14)
(XF, ACC, ON, KEPT, Z, Z_BYTES, SCORES, SCORE_BYTES, SCRATCH, SCRATCH_BYTES, STATES) = range(14, 25)
ERROR, TICKET, PARTIALS, NEXT, DONE = 32, 33, 34, 40, 48  # written by all threads: away from the slots above
CALL_SLOTS = 64
WIDEN, FIRST, SECOND, SELECT, EXPERTS, FINISH = range(6)  # steps; each has a counter at NEXT and one at DONE
FROM_ROUTER, FROM_IDS, FROM_MASK = range(3)

MANY_PIECE, FEW_PIECE = 128, 32
BF16 = np.uint16(0)


@internal
def _take(s, step, count):
    """The first of the next `count` work items of a step."""
    if v.at(s, TEAM) > 1:
        return v.atomic_add(s + 8 * (NEXT + step), count)
    first = v.at(s, NEXT + step)
    v.put(s, NEXT + step, first + count)
    return first


@internal
def _done(s, step, count):
    if v.at(s, TEAM) > 1:
        v.atomic_add(s + 8 * (DONE + step), count)


@internal
def _wait(s, step, total):
    """Until all items of a step are done."""
    if v.at(s, TEAM) > 1:
        v.wait_for(s + 8 * (DONE + step), total, v.at(s, YIELD))


@internal
def _route(s, scratch, second):
    """One matrix of the router for all tokens, by pieces of 32 outputs: Z from x, or SCORES from Z."""
    layer = v.at(s, LAYER)
    tokens = v.at(s, T)
    source, source_bytes, length = v.at(s, XF), 4 * v.at(layer, D), v.at(layer, D)
    w, bias, width, act, norm = (
        v.at(layer, R_IN),
        v.at(layer, R_B_IN),
        v.at(layer, R_WIDTH),
        v.at(layer, R_ACT),
        v.at(layer, R_NORMALISE),
    )
    out, out_bytes = v.at(s, Z), v.at(s, Z_BYTES)
    if second:
        source, source_bytes, length = out, out_bytes, width
        w, bias, width, act, norm = v.at(layer, R_OUT), v.at(layer, R_B_OUT), v.at(layer, E), IDENTITY, 0
        out, out_bytes = v.at(s, SCORES), v.at(s, SCORE_BYTES)
    rows = scratch
    step, name = 32 if v.at(s, TEAM) > 1 else width, SECOND if second else FIRST
    while True:
        first = _take(s, name, step)
        if first >= width:
            _wait(s, name, width)
            return
        n = min(step, width - first)
        for start in range(0, tokens, BATCH):
            m = min(BATCH, tokens - start)
            for i in range(m + 4):
                v.put_i64(rows + 8 * i, source + min(start + i, tokens - 1) * source_bytes)
            h = out + start * out_bytes + 4 * first
            for i in range((m + 3) // 4 * 4):
                for j in range(0, n, 16):
                    v.store(F32, h + i * out_bytes + 4 * j, v.zero())
            v.call_8(v.at(layer, ROUTE), rows, m, w + 4 * first * length, 4 * length, n, length, h, out_bytes)
            for i in range(m):
                scale = np.float32(1.0)
                if norm != 0:
                    row, square = v.get_i64(rows + 8 * i), np.float32(0.0)
                    for j in range(0, length, 16):
                        x = v.load_part(F32, row + 4 * j, min(length - j, 16))
                        square += v.total(v.mul(x, x))
                    scale = np.float32(1.0) / max(np.sqrt(square), np.float32(1e-12))
                for j in range(0, n, 16):
                    where = h + i * out_bytes + 4 * j
                    b = v.zero() if bias == 0 else v.load_part(F32, bias + 4 * (first + j), min(n - j, 16))
                    z = v.fma(v.load(F32, where), v.splat(scale), b)
                    if act == RELU:
                        z = v.relu(z)
                    elif act == TANH:
                        z = v.tanh(z)
                    elif act == SQUARE:
                        z = v.mul(z, z)
                    v.store_part(F32, where, z, min(n - j, 16))
        _done(s, name, n)


@internal
def _select(s, t, keys):
    """Writes column t of ON and KEPT[t] from the scores, the ids or the mask."""
    layer = v.at(s, LAYER)
    experts, tokens, kind = v.at(layer, E), v.at(s, T), v.at(s, KIND)
    on, kept = v.at(s, ON) + t, 0
    if v.at(s, REAL) != 0 and v.get_u8(v.at(s, REAL) + t) == 0:
        for e in range(experts):
            v.put_u8(on + e * tokens, np.uint8(0))
        v.put_i64(v.at(s, KEPT) + 8 * t, -1)
        return
    if kind == FROM_IDS:
        for e in range(experts):
            v.put_u8(on + e * tokens, np.uint8(0))
        ids = v.at(s, SELECTED) + 8 * t * v.at(s, K)
        for i in range(v.at(s, K)):
            e = v.get_i64(ids + 8 * i)
            if e < 0 or e >= experts:
                v.put(s, ERROR, 1)
            else:
                kept += 1 - np.int64(v.get_u8(on + e * tokens))
                v.put_u8(on + e * tokens, np.uint8(1))
    elif kind == FROM_MASK:
        for e in range(experts):
            value = v.get_u8(v.at(s, SELECTED) + t * experts + e)
            v.put_u8(on + e * tokens, value)
            kept += np.int64(value)
    else:
        scores, k = v.at(s, SCORES) + t * v.at(s, SCORE_BYTES), v.at(layer, TOP_K)
        if k == 0:
            threshold = v.get_f32(layer + 8 * THRESHOLD)
            for e in range(experts):
                value = np.uint8(v.get_f32(scores + 4 * e) >= threshold)
                v.put_u8(on + e * tokens, value)
                kept += np.int64(value)
        else:
            kept = k
            vectors = (experts + 15) // 16
            for e in range(0, experts, 16):
                v.store_keys(keys + 4 * e, v.load(F32, scores + 4 * e))
            for e in range(experts, 16 * vectors):
                v.put_i32(keys + 4 * e, np.int64(-2147483648))
            least, above = np.int64(-2147483648), np.int64(0)
            for bit in range(32):  # the k-th largest key, from its highest bit down
                trial = least + (np.int64(1) << (31 - bit))
                found = v.count_at_least(keys, vectors, trial)
                if found >= k:
                    least = trial
                    if found == k:
                        break
            above = v.count_at_least(keys, vectors, least + 1) if least < 2147483647 else 0
            ties = k - above  # equal scores: the first experts win
            for e in range(experts):
                key = v.get_i32(keys + 4 * e)
                value = key > least
                if key == least and ties > 0:
                    value = True
                    ties -= 1
                v.put_u8(on + e * tokens, np.uint8(value))
    v.put_i64(v.at(s, KEPT) + 8 * t, kept)


@internal
def _experts(s, scratch):
    """All pieces: shared neurons, the low-rank compensation, the experts."""
    layer = v.at(s, LAYER)
    tokens, width, size, piece = v.at(s, T), v.at(layer, D), v.at(layer, W_BYTES), v.at(s, PIECE)
    shared, rank, per_expert, act = v.at(layer, S), v.at(layer, C_RANK), v.at(layer, N), v.at(layer, ACT)
    n_shared, n_rank, n_expert = (
        (shared + piece - 1) // piece,
        (rank + piece - 1) // piece,
        (per_expert + piece - 1) // piece,
    )
    total = n_shared + n_rank + n_expert * v.at(layer, E)
    step = max(1, min(8, total // 64)) if v.at(s, TEAM) > 1 else total
    listed = scratch  # token numbers, then addresses of the batch's rows
    rows = listed + 8 * (tokens + 8)
    ys = rows + 8 * (BATCH + 8)
    nobody = ys + 8 * (BATCH + 8)
    work = nobody + 4 * (width + 16)
    up, gate, down, b_up, b_gate = (
        v.at(layer, W_UP),
        v.at(layer, W_GATE),
        v.at(layer, W_DOWN),
        v.at(layer, B_UP),
        v.at(layer, B_GATE),
    )
    accumulators = np.int64(0)
    xf, kept, row_bytes = v.at(s, XF), v.at(s, KEPT), width * size
    while True:
        begin = _take(s, EXPERTS, step)
        if begin >= total:
            _wait(s, EXPERTS, total)
            return
        if accumulators == 0:
            accumulators = v.at(s, ACC) + 4 * tokens * width * v.atomic_add(s + 8 * PARTIALS, 1)
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
                    count += here >= 0 and here < v.at(layer, E)
            else:
                e, part = divmod(item - n_shared - n_rank, n_expert)
                first, last, code = shared + e * per_expert + part * piece, shared + (e + 1) * per_expert, act
                on = v.at(s, ON) + e * tokens
                for t in range(tokens):
                    v.put_i64(listed + 8 * count, t)
                    count += np.int64(v.get_u8(on + t))
                if part == 0 and v.at(s, COUNTS) != 0:
                    v.atomic_add(v.at(s, COUNTS) + 8 * e, count)
            n = min(piece, last - first)
            for start in range(0, count, BATCH):
                m = min(BATCH, count - start)
                for i in range(m + 4):
                    t = v.get_i64(listed + 8 * (start + min(i, m - 1)))
                    v.put_i64(rows + 8 * i, xf + t * 4 * width)
                    v.put_i64(ys + 8 * i, accumulators + t * 4 * width if i < m else nobody)
                w1, w2, w3, b1, b2 = up, gate, down, b_up, b_gate
                if item >= n_shared and item < n_shared + n_rank:
                    w1, w2, w3, b1, b2 = v.at(layer, C_IN), np.int64(0), v.at(layer, C_OUT), np.int64(0), np.int64(0)
                at = first * row_bytes
                w2 += at if w2 != 0 else 0
                b1 += 4 * first if b1 != 0 else 0
                b2 += 4 * first if b2 != 0 else 0
                project = v.at(layer, PROJECT)
                v.call_14(
                    v.at(layer, PIECES),
                    project,
                    rows,
                    ys,
                    m,
                    w1 + at,
                    w2,
                    w3 + at,
                    b1,
                    b2,
                    n,
                    width,
                    row_bytes,
                    code,
                    work,
                )
        _done(s, EXPERTS, min(step, total - begin))


@internal
def _finish(s, t, first, last, partials):
    """y_t[first:last] = bias + compensation + the sum of all threads' accumulators; zero at padding."""
    layer = v.at(s, LAYER)
    width, experts, tokens = v.at(layer, D), v.at(layer, E), v.at(s, T)
    kept, size = v.get_i64(v.at(s, KEPT) + 8 * t), v.at(layer, W_BYTES)
    constant, taken, bias = v.at(layer, CONSTANT), v.at(layer, TAKEN), v.at(layer, B_DOWN)
    for c in range(first, last, 16):
        lanes, y = min(last - c, 16), v.zero()
        if kept >= 0:
            for p in range(partials):
                y = v.add(y, v.load_part(F32, v.at(s, ACC) + 4 * ((p * tokens + t) * width + c), lanes))
            if bias != 0:
                y = v.add(y, v.load_part(F32, bias + 4 * c, lanes))
            if kept < experts:
                if constant != 0:
                    y = v.add(y, v.load_part(F32, constant + 4 * c, lanes))
                if taken != 0:
                    for e in range(experts):
                        if v.get_u8(v.at(s, ON) + e * tokens + t) != 0:
                            y = v.sub(y, v.load_part(F32, taken + 4 * (e * width + c), lanes))
        where = v.at(s, Y) + size * (t * width + c)
        if size == 4:
            v.store_part(F32, where, y, lanes)
        else:
            v.store_part(BF16, where, y, lanes)


@internal
def _up(address):
    return (address + 63) // 64 * 64


@internal
def _arrange(s, base):
    """Places the buffers of a call behind `base`; gives the end."""
    layer = v.at(s, LAYER)
    tokens, width, experts, team = v.at(s, T), v.at(layer, D), v.at(layer, E), v.at(s, TEAM)
    narrow = v.at(layer, W_BYTES) == 2
    end = _up(base)
    v.put(s, XF, end if narrow else v.at(s, X))
    end = _up(end + (4 * tokens * width if narrow else 0))
    direct = team == 1 and not narrow
    v.put(s, ACC, v.at(s, Y) if direct else end)
    end = _up(end + (0 if direct else 4 * team * tokens * width))
    v.put(s, ON, end)
    end = _up(end + experts * tokens)
    v.put(s, KEPT, end)
    end = _up(end + 8 * tokens)
    z_bytes, score_bytes = 4 * ((v.at(layer, R_WIDTH) + 31) // 16 * 16), 4 * ((experts + 31) // 16 * 16)
    v.put(s, Z, end)
    v.put(s, Z_BYTES, z_bytes)
    end = _up(end + (tokens + 4) * z_bytes + 64)
    two = v.at(layer, R_OUT) != 0
    v.put(s, SCORES, end if two else v.at(s, Z))
    v.put(s, SCORE_BYTES, score_bytes if two else z_bytes)
    end = _up(end + ((tokens + 4) * score_bytes + 64 if two else 0))
    piece = v.at(s, PIECE)
    lists = 8 * (tokens + 2 * BATCH + 24) + 4 * (width + 16)
    blocks = (min(BATCH, tokens) + 4) * (16 * ((piece + 7) // 8 * 8) + 8) + 256
    each = _up(max(lists + blocks, 4 * (experts + 32)))
    v.put(s, SCRATCH, end)
    v.put(s, SCRATCH_BYTES, each)
    return end + team * each


@cfunc("void(int64)", cache=True, error_model="numpy")
def run(s):
    """All steps for the tokens of `s`, alone or as one thread of its team."""
    layer = v.at(s, LAYER)
    tokens, width, team = v.at(s, T), v.at(layer, D), v.at(s, TEAM)
    scratch = v.at(s, SCRATCH) + v.at(s, SCRATCH_BYTES) * v.atomic_add(s + 8 * TICKET, 1)
    if v.at(s, XF) != v.at(s, X):  # bfloat16 inputs are widened once
        while True:
            t = _take(s, WIDEN, 1)
            if t >= tokens:
                break
            for c in range(0, width, 16):
                at, lanes = t * width + c, min(16, width - c)
                v.store_part(F32, v.at(s, XF) + 4 * at, v.load_part(BF16, v.at(s, X) + 2 * at, lanes), lanes)
            _done(s, WIDEN, 1)
        _wait(s, WIDEN, tokens)
    if v.at(s, KIND) == FROM_ROUTER:
        for second in range(2 if v.at(layer, R_OUT) != 0 else 1):
            _route(s, scratch, second == 1)
    while True:
        t = _take(s, SELECT, 1)
        if t >= tokens:
            break
        _select(s, t, scratch)
        _done(s, SELECT, 1)
    _wait(s, SELECT, tokens)
    _experts(s, scratch)
    partials = v.at(s, PARTIALS)
    parts = (width + 511) // 512 if team > 1 else 1
    columns = 512 if team > 1 else width
    while True:
        item = _take(s, FINISH, 1)
        if item >= tokens * parts:
            return
        t, part = divmod(item, parts)
        _finish(s, t, part * columns, min(width, (part + 1) * columns), partials)


@cfunc("void(int64)", cache=True, error_model="numpy")
def run_chunks(s):
    """Many tokens: chunk after chunk, each as a team of one with its own table and scratch."""
    own = v.at(s, STATES) + v.at(s, SCRATCH_BYTES) * v.atomic_add(s + 8 * TICKET, 1)
    layer, chunk, tokens = v.at(s, LAYER), v.at(s, CHUNK), v.at(s, T)
    row = v.at(layer, D) * v.at(layer, W_BYTES)
    while True:
        first = v.atomic_add(s + 8 * NEXT, chunk)
        if first >= tokens:
            return
        for slot in range(CALL_SLOTS):
            v.put(own, slot, v.at(s, slot))
        for slot in range(ERROR, CALL_SLOTS):
            v.put(own, slot, 0)
        v.put(own, TEAM, 1)
        v.put(own, T, min(chunk, tokens - first))
        v.put(own, X, v.at(s, X) + first * row)
        v.put(own, Y, v.at(s, Y) + first * row)
        if v.at(s, KIND) == FROM_IDS:
            v.put(own, SELECTED, v.at(s, SELECTED) + 8 * first * v.at(s, K))
        if v.at(s, KIND) == FROM_MASK:
            v.put(own, SELECTED, v.at(s, SELECTED) + first * v.at(layer, E))
        if v.at(s, REAL) != 0:
            v.put(own, REAL, v.at(s, REAL) + first)
        _arrange(own, own + 8 * CALL_SLOTS)
        v.call_1(v.at(s, RUN), own)
        if v.at(own, ERROR) != 0:
            v.put(s, ERROR, 1)


@njit("int64(" + ", ".join(["int64"] * 15) + ")", nogil=True, cache=True, error_model="numpy")
def forward(
    layer, run_all, run_some, parallel, give_way, x, y, tokens, kind, selected, k, real, counts, threads, chunk
):
    """y [T, D] of one layer; 0, or 1 for an expert id out of range (y is then not to be used).

    `parallel` and `give_way` are GOMP_parallel and sched_yield, or 0 for one thread; `chunk` > 0 splits by tokens.
    """
    state = np.zeros(CALL_SLOTS, np.int64)
    s = np.int64(state.ctypes.data)
    v.put(s, LAYER, layer)
    v.put(s, RUN, run_all)
    v.put(s, X, x)
    v.put(s, Y, y)
    v.put(s, T, tokens)
    v.put(s, KIND, kind)
    v.put(s, SELECTED, selected)
    v.put(s, K, k)
    v.put(s, REAL, real)
    v.put(s, COUNTS, counts)
    v.put(s, YIELD, give_way)
    v.put(s, CHUNK, chunk)
    v.put(
        s,
        PIECE,
        min(
            FEW_PIECE if chunk == 0 else MANY_PIECE,
            max(8, max(v.at(layer, N), max(v.at(layer, S), v.at(layer, C_RANK)))),
        ),
    )
    v.put(s, TEAM, threads)
    if chunk > 0:
        v.put(s, T, chunk)
        v.put(s, TEAM, 1)
        each = _up(_arrange(s, 0) + 8 * CALL_SLOTS + 128)
        scratch = np.empty(threads * each // 8 + 16, np.int64)
        v.put(s, STATES, _up(np.int64(scratch.ctypes.data)))
        v.put(s, SCRATCH_BYTES, each)
        v.put(s, T, tokens)
    else:
        scratch = np.empty(_arrange(s, 0) // 8 + 32, np.int64)
        _arrange(s, np.int64(scratch.ctypes.data))
    worker = run_all if chunk == 0 else run_some
    if threads > 1:
        v.call_parallel(parallel, worker, s, threads)
    else:
        v.call_1(worker, s)
    scratch[0] = 0  # keeps it alive until here
    return state[ERROR]
