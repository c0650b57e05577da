"""First half of the compiled forward pass: how a team shares its work items, what the router scores, which experts each token gets.

`numba_forward` calls these in order; `s` is a call's table, see `numba_table`. The router is float32 whatever the experts are.
No bounds are checked except expert ids. Axes as in `numba_table`.
"""

import numpy as np

from moefication_cli.runtime.cpu import numba_table as slot
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu.numba_kernels import BATCH, F32, IDENTITY, RELU, SQUARE, TANH, internal

BF16 = np.uint16(0)


@internal
def take(s, step, count):
    """The first of the next `count` work items of a step."""
    if v.at(s, slot.TEAM) > 1:
        return v.atomic_add(s + 8 * (slot.NEXT + step), count)
    first = v.at(s, slot.NEXT + step)
    v.put(s, slot.NEXT + step, first + count)
    return first


@internal
def done(s, step, count):
    """Says that `count` items of a step are finished."""
    if v.at(s, slot.TEAM) > 1:
        v.atomic_add(s + 8 * (slot.DONE + step), count)


@internal
def wait(s, step, total):
    """Until all items of a step are done."""
    if v.at(s, slot.TEAM) > 1:
        v.wait_for(s + 8 * (slot.DONE + step), total, v.at(s, slot.YIELD))


@internal
def widen(s):
    """XF = the bfloat16 inputs in float32."""
    tokens, width = v.at(s, slot.T), v.at(v.at(s, slot.LAYER), slot.D)
    while True:
        t = take(s, slot.WIDEN, 1)
        if t >= tokens:
            break
        for c in range(0, width, 16):
            at, lanes = t * width + c, min(16, width - c)
            v.store_part(F32, v.at(s, slot.XF) + 4 * at, v.load_part(BF16, v.at(s, slot.X) + 2 * at, lanes), lanes)
        done(s, slot.WIDEN, 1)
    wait(s, slot.WIDEN, tokens)


@internal
def route(s, scratch, second):
    """One matrix of the router for all tokens, by pieces of 32 outputs: Z from x, or SCORES from Z."""
    layer = v.at(s, slot.LAYER)
    tokens = v.at(s, slot.T)
    source, source_bytes, length = v.at(s, slot.XF), 4 * v.at(layer, slot.D), v.at(layer, slot.D)
    w, bias, width, act, norm = (
        v.at(layer, slot.R_IN),
        v.at(layer, slot.R_B_IN),
        v.at(layer, slot.R_WIDTH),
        v.at(layer, slot.R_ACT),
        v.at(layer, slot.R_NORMALISE),
    )
    out, out_bytes = v.at(s, slot.Z), v.at(s, slot.Z_BYTES)
    if second:
        source, source_bytes, length = out, out_bytes, width
        w, bias, width, act, norm = v.at(layer, slot.R_OUT), v.at(layer, slot.R_B_OUT), v.at(layer, slot.E), IDENTITY, 0
        out, out_bytes = v.at(s, slot.SCORES), v.at(s, slot.SCORE_BYTES)
    rows = scratch
    step, name = 32 if v.at(s, slot.TEAM) > 1 else width, slot.SECOND if second else slot.FIRST
    while True:
        first = take(s, name, step)
        if first >= width:
            wait(s, name, width)
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
            v.call_8(v.at(layer, slot.ROUTE), rows, m, w + 4 * first * length, 4 * length, n, length, h, out_bytes)
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
        done(s, name, n)


@internal
def select(s, t, keys):
    """Writes column t of ON and KEPT[t] from the scores, the ids or the mask; counts in PICKED. `keys` is scratch."""
    layer = v.at(s, slot.LAYER)
    experts, tokens, kind = v.at(layer, slot.E), v.at(s, slot.T), v.at(s, slot.KIND)
    on, kept = v.at(s, slot.ON) + t, 0
    if v.at(s, slot.REAL) != 0 and v.get_u8(v.at(s, slot.REAL) + t) == 0:
        for e in range(experts):
            v.put_u8(on + e * tokens, np.uint8(0))
        v.put_i64(v.at(s, slot.KEPT) + 8 * t, -1)
        return
    if kind == slot.FROM_IDS or kind == slot.FROM_NOTHING:
        for e in range(experts):
            v.put_u8(on + e * tokens, np.uint8(0))
        ids = v.at(s, slot.SELECTED) + 8 * t * v.at(s, slot.K)
        for i in range(v.at(s, slot.K)):
            e = v.get_i64(ids + 8 * i)
            if e < 0 or e >= experts:
                v.put(s, slot.ERROR, 1)
            else:
                kept += 1 - np.int64(v.get_u8(on + e * tokens))
                v.put_u8(on + e * tokens, np.uint8(1))
    elif kind == slot.FROM_MASK:
        for e in range(experts):
            value = v.get_u8(v.at(s, slot.SELECTED) + t * experts + e)
            v.put_u8(on + e * tokens, value)
            kept += np.int64(value)
    else:
        scores, k = v.at(s, slot.SCORES) + t * v.at(s, slot.SCORE_BYTES), v.at(layer, slot.TOP_K)
        if k == 0:
            threshold = v.get_f32(layer + 8 * slot.THRESHOLD)
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
    v.put_i64(v.at(s, slot.KEPT) + 8 * t, kept)
    v.atomic_add(s + 8 * slot.PICKED, kept)


@internal
def route_and_select(s, scratch):
    """Scores, where the router gives them, and then every token's experts: ON and KEPT of the whole call."""
    tokens = v.at(s, slot.T)
    if v.at(s, slot.KIND) == slot.FROM_ROUTER:
        for second in range(2 if v.at(v.at(s, slot.LAYER), slot.R_OUT) != 0 else 1):
            route(s, scratch, second == 1)
    while True:
        t = take(s, slot.SELECT, 1)
        if t >= tokens:
            break
        select(s, t, scratch)
        done(s, slot.SELECT, 1)
    wait(s, slot.SELECT, tokens)


@internal
def aligned(address):
    """The next address that is a multiple of 64."""
    return (address + 63) // 64 * 64


@internal
def place_routing(s, end):
    """Places what routing writes behind `end`, an aligned address; gives the new end."""
    layer, tokens = v.at(s, slot.LAYER), v.at(s, slot.T)
    experts, two = v.at(layer, slot.E), v.at(layer, slot.R_OUT) != 0
    v.put(s, slot.ON, end)
    end = aligned(end + experts * tokens)
    v.put(s, slot.KEPT, end)
    end = aligned(end + 8 * tokens)
    z_bytes, score_bytes = 4 * ((v.at(layer, slot.R_WIDTH) + 31) // 16 * 16), 4 * ((experts + 31) // 16 * 16)
    v.put(s, slot.Z, end)
    v.put(s, slot.Z_BYTES, z_bytes)
    end = aligned(end + (tokens + 4) * z_bytes + 64)
    v.put(s, slot.SCORES, end if two else v.at(s, slot.Z))
    v.put(s, slot.SCORE_BYTES, score_bytes if two else z_bytes)
    return aligned(end + ((tokens + 4) * score_bytes + 64 if two else 0))


@internal
def describe_call(s, layer, give_way, x, y, tokens, kind, selected, k, real, counts, threads):
    """Writes what was asked for into the call's table; arguments as `numba_forward.forward`."""
    v.put(s, slot.LAYER, layer)
    v.put(s, slot.X, x)
    v.put(s, slot.Y, y)
    v.put(s, slot.T, tokens)
    v.put(s, slot.KIND, kind)
    v.put(s, slot.SELECTED, selected)
    v.put(s, slot.K, k)
    v.put(s, slot.REAL, real)
    v.put(s, slot.COUNTS, counts)
    v.put(s, slot.YIELD, give_way)
    v.put(s, slot.TEAM, threads)


@internal
def work_together(parallel, worker, s, threads):
    """Runs `worker` on the call's table, on as many threads."""
    if threads > 1:
        v.call_parallel(parallel, worker, s, threads)
    else:
        v.call_1(worker, s)
