"""The kernels of the `triton` backend: what a handful of tokens needs of a layer, each weight row read once for all of them.

    project   a router's first layer (and, by the same kernel, its second), beside it the inner side of the compensation
    select    each token's experts by threshold, as the best k or as given; then the list of those that any token wants
    hidden    the activations of the listed experts, zero where a token did not select them
    output    adds up what the activations write; the last program of a tile sums the parts in order, so that the same
              call gives the same bytes, and adds bias and compensation

Axes: T tokens (in tiles of TOKENS), D model width, F neurons (S shared ones first, then E experts of N), R router width,
C rank of the compensation; P the neurons that run: the shared ones, then those of the listed experts. Sums are float32.
A tile of one token is computed element by element: tensor cores multiply 16 tokens at least, and one row of weights a time
is bound by memory.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, as in torch
    elif ACT == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACT == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACT == "square":
        return x * x
    else:
        return x


@triton.jit
def project(
    x_ptr, w_ptr, b_ptr, c_ptr, z_ptr, counts_ptr, D, R, C, x_stride, z_stride, num_locks,
    ACT: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOCKS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, token): z = act(x . w + b) of the router's rows, x . c of the compensation's behind them.

    On the way the counts [tokens] and the locks behind them, which the later launches add to, are set to zero.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    routes = row < R
    total = tl.zeros((ROWS,), tl.float32)
    squared = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = (d < D)[None, :]
        x = tl.load(x_ptr + token * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        w = tl.load(w_ptr + at, mask=routes[:, None] & inside, other=0.0).to(tl.float32)
        if EXTRA:
            extra = (row >= R) & (row < R + C)
            w += tl.load(c_ptr + at - R * D, mask=extra[:, None] & inside, other=0.0).to(tl.float32)
        total += tl.sum(w * x[None, :], axis=1)
        squared += x * x
    z = total
    if NORMALISE:
        z = z / tl.maximum(tl.sqrt(tl.sum(squared, axis=0)), 1e-12)
    if BIAS:
        z += tl.load(b_ptr + row, mask=routes, other=0.0).to(tl.float32)
    z = tl.where(routes, _activate(z, ACT), total)
    tl.store(z_ptr + token * z_stride + row, z, mask=row < R + C)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + token, 0)
        if token == 0:
            lock = tl.arange(0, LOCKS)
            tl.store(counts_ptr + tl.num_programs(1) + lock, tl.zeros((LOCKS,), tl.int32), mask=lock < num_locks)


@triton.jit
def select(
    score_ptr, mask_ptr, list_ptr, counts_ptr, T, E, K, score_stride, threshold, num_locks,
    RULE: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token): its row of mask[T, E] and its count; if LIST, the last to end lists the experts that any token wants.

    RULE: `threshold`; `top_k`, the first ones where the K-th score is tied; `mask`, which is there already. The last lock
    and the number of listed experts lie behind the other locks.
    """
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    live = e < E
    if RULE == "mask":
        chosen = tl.load(mask_ptr + token * E + e, mask=live, other=0) != 0
    elif RULE == "threshold":
        chosen = live & (tl.load(score_ptr + token * score_stride + e, mask=live, other=0.0) >= threshold)
    else:
        bits = tl.load(score_ptr + token * score_stride + e, mask=live, other=0.0).to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # integers in the order of the floats
        key = tl.where(live, key, -(1 << 33))
        low = tl.full((), -(1 << 31), tl.int64)
        high = tl.full((), (1 << 31) - 1, tl.int64)
        for _ in range(32):  # the largest value that at least K keys reach
            middle = low + ((high - low + 1) >> 1)
            enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= K
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        above = key > low
        tied = (key == low).to(tl.int32)
        left = K - tl.sum(above.to(tl.int32), axis=0)
        chosen = above | ((tied > 0) & (tl.cumsum(tied, axis=0) <= left))
    tl.store(counts_ptr + token, tl.sum(chosen.to(tl.int32), axis=0))
    if RULE != "mask" and (T > 1 or not LIST):
        tl.store(mask_ptr + token * E + e, chosen.to(tl.int8), mask=live)
    if LIST:
        wanted = chosen.to(tl.int32)
        if T > 1:
            tl.debug_barrier()  # every thread has written before one of them says so
        last = tl.atomic_add(counts_ptr + T + num_locks, 1, sem="acq_rel") == T - 1
        if last:
            if T > 1:
                for other in range(0, T):
                    row = tl.load(mask_ptr + other * E + e, mask=live, other=0, cache_modifier=".cg")
                    wanted = tl.maximum(wanted, (row != 0).to(tl.int32))
            place = tl.cumsum(wanted, axis=0) - 1
            tl.store(list_ptr + place, e, mask=live & (wanted > 0))
            tl.store(counts_ptr + T + num_locks + 1, tl.sum(wanted, axis=0))


@triton.jit
def _neurons(p, list_ptr, S, N, P):
    """(expert, neuron) of the running neurons p; expert -1 for shared ones."""
    routed = (p >= S) & (p < P)
    listed = tl.load(list_ptr + tl.maximum(p - S, 0) // N, mask=routed, other=0)
    n = tl.where(routed, S + listed * N + tl.maximum(p - S, 0) % N, p)
    return tl.where(routed, listed, -1), n


@triton.jit
def hidden(
    x_ptr, mask_ptr, list_ptr, up_ptr, gate_ptr, b_up_ptr, b_gate_ptr, h_ptr, counts_ptr, T, D, F, S, N, E, num_locks,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS_UP: tl.constexpr, BIAS_GATE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of running neurons, tile of tokens): h[T, P], zero where the token did not select the expert."""
    P = S + N * tl.load(counts_ptr + T + num_locks + 1)
    first = tl.program_id(0) * ROWS
    if first < P:
        p = first + tl.arange(0, ROWS)
        t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        runs = p < P
        e, n = _neurons(p, list_ptr, S, N, P)
        row = n.to(tl.int64)[:, None] * D
        if TOKENS == 1:  # sums stay apart until the end, so that nothing between two loads waits for another thread
            up_sum = tl.zeros((ROWS, BLOCK), tl.float32)
            gate_sum = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, D, BLOCK):
                d = start + tl.arange(0, BLOCK)
                inside = runs[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
                up_sum += tl.load(up_ptr + row + d[None, :], mask=inside, other=0.0).to(tl.float32) * x
                if GATED:
                    gate_sum += tl.load(gate_ptr + row + d[None, :], mask=inside, other=0.0).to(tl.float32) * x
            h = tl.sum(up_sum, axis=1)[None, :]
            gate = tl.sum(gate_sum, axis=1)[None, :]
        else:
            h = tl.zeros((TOKENS, ROWS), tl.float32)
            gate = tl.zeros((TOKENS, ROWS), tl.float32)
            for start in range(0, D, BLOCK):
                d = start + tl.arange(0, BLOCK)
                inside = runs[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
                w = tl.load(up_ptr + row + d[None, :], mask=inside, other=0.0)
                h = tl.dot(x, tl.trans(w), h, input_precision="ieee")
                if GATED:
                    w = tl.load(gate_ptr + row + d[None, :], mask=inside, other=0.0)
                    gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
        if BIAS_UP:
            h += tl.load(b_up_ptr + n, mask=runs, other=0.0).to(tl.float32)[None, :]
        if BIAS_GATE:
            gate += tl.load(b_gate_ptr + n, mask=runs, other=0.0).to(tl.float32)[None, :]
        if GATED:
            h = _activate(gate, ACT) * h
        else:
            h = _activate(h, ACT)
        live = (t < T)[:, None] & runs[None, :]
        if TOKENS > 1:
            on = tl.load(mask_ptr + t[:, None] * E + e[None, :], mask=live & (e >= 0)[None, :], other=1) != 0
            h = tl.where(on, h, 0.0)
        tl.store(h_ptr + t.to(tl.int64)[:, None] * F + p[None, :], h.to(h_ptr.dtype.element_ty), mask=live)


@triton.jit
def output(
    h_ptr, list_ptr, down_ptr, z_ptr, constant_ptr, c_out_ptr, b_down_ptr, part_ptr, counts_ptr, y_ptr,
    T, D, F, S, N, E, R, C, z_stride, num_locks,
    BIAS: tl.constexpr, CONSTANT: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, part of the neurons, tile of tokens): its part of y; the last part's program finishes y."""
    P = S + N * tl.load(counts_ptr + T + num_locks + 1)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.cdiv(tl.cdiv(P, SPLITS), ROWS) * ROWS
    last = tl.minimum((split + 1) * rows, P)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(split * rows, last, ROWS):
        p = start + tl.arange(0, ROWS)
        _, n = _neurons(p, list_ptr, S, N, last)
        at = down_ptr + n.to(tl.int64)[:, None] * D + d[None, :]
        # The row of a neuron that an activation such as ReLU switched off for all tokens is not read
        if TOKENS == 1:
            h = tl.load(h_ptr + p, mask=p < last, other=0.0)
            w = tl.load(at, mask=(h != 0.0)[:, None] & (d < D)[None, :], other=0.0)
            sums += w.to(tl.float32) * h.to(tl.float32)[:, None]
        else:
            live = (t < T)[:, None] & (p < last)[None, :]
            h = tl.load(h_ptr + t.to(tl.int64)[:, None] * F + p[None, :], mask=live, other=0.0)
            used = tl.sum((h != 0.0).to(tl.int32), axis=0) > 0
            w = tl.load(at, mask=used[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(h, w, total, input_precision="ieee")
    if TOKENS == 1:
        total = tl.sum(sums, axis=0)[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    done = True
    if SPLITS > 1:
        place = part_ptr + t[:, None] * D + d[None, :]
        tl.store(place + split.to(tl.int64) * T * D, total, mask=inside)
        tl.debug_barrier()  # every thread has written before one of them says so
        lock = counts_ptr + T + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        done = tl.atomic_add(lock, 1, sem="acq_rel") == SPLITS - 1
        if done:
            total = tl.zeros((TOKENS, BLOCK), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(place + part * T * D, mask=inside, other=0.0, cache_modifier=".cg")
    if done:
        if CONSTANT or RANK:
            extra = tl.zeros((TOKENS, BLOCK), tl.float32)
            if RANK:
                for c in range(0, C):
                    z = tl.load(z_ptr + t * z_stride + R + c, mask=t < T, other=0.0)
                    w = tl.load(c_out_ptr + c * D + d, mask=d < D, other=0.0).to(tl.float32)
                    extra += z[:, None] * w[None, :]
            if CONSTANT:
                extra += tl.load(constant_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            some_off = tl.load(counts_ptr + t, mask=t < T, other=0) < E
            total += tl.where(some_off[:, None], extra, 0.0)
        if BIAS:
            total += tl.load(b_down_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + t.to(tl.int64)[:, None] * D + d[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
