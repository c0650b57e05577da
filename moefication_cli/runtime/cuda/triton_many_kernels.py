"""The kernels of the `triton` backend for many tokens: the first projections of each expert over the tokens that selected it.

    score     a router's layer as a matrix product with float32 sums (also for half-precision inputs)
    tally     how many tokens each group of experts runs for
    place     the tokens sorted by group, every group's padded to whole tiles; the group of each tile
    hidden    the activations h[T, F] of a tile's tokens in its group; the others' zeros are there before

Axes: T tokens, D model width, F neurons (S shared ones first, then E experts of N), G groups of TOGETHER neighbouring experts
(more than one only for experts too small for tensor cores; unselected ones of a group are zeroed). Tiles are TILE tokens.
How many tiles there are is known on the GPU alone: launches are as large as there can be, programs beyond end at once.
"""

import triton
import triton.language as tl

from moefication_cli.runtime.cuda.triton_kernels import _activate


@triton.jit
def score(
    x_ptr, w_ptr, b_ptr, z_ptr, T, D, R,
    ACT: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, block of rows): z[T, R] = act(x w^T + b) in float32; x is divided by its norm if NORMALISE."""
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TILE, ROWS), tl.float32)
    squared = tl.zeros((TILE,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = (d < D)[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < T)[:, None] & inside, other=0.0)
        w = tl.load(w_ptr + r.to(tl.int64)[:, None] * D + d[None, :], mask=(r < R)[:, None] & inside, other=0.0)
        wide = x.to(tl.float32)
        if NORMALISE:
            squared += tl.sum(wide * wide, axis=1)
        if x_ptr.dtype.element_ty == tl.float32:
            total = tl.dot(wide, tl.trans(w.to(tl.float32)), total, input_precision="tf32x3")
        else:  # half precision fits TF32 exactly: the weights in two parts, each of which does too, lose nothing
            bits = w.to(tl.float32).to(tl.int32, bitcast=True)
            high = (bits & -8192).to(tl.float32, bitcast=True)
            total = tl.dot(wide, tl.trans(high), total, input_precision="tf32")
            total = tl.dot(wide, tl.trans(w.to(tl.float32) - high), total, input_precision="tf32")
    if NORMALISE:
        total = total / tl.maximum(tl.sqrt(squared), 1e-12)[:, None]
    if BIAS:
        total += tl.load(b_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    tl.store(
        z_ptr + t.to(tl.int64)[:, None] * R + r[None, :],
        _activate(total, ACT),
        mask=(t < T)[:, None] & (r < R)[None, :],
    )


@triton.jit
def _runs(mask_ptr, t, g, T, E, TOGETHER: tl.constexpr):
    """Whether each of the tokens t selected an expert of group g."""
    on = tl.zeros_like(t)
    for number in range(TOGETHER):
        e = g * TOGETHER + number
        on |= (tl.load(mask_ptr + t.to(tl.int64) * E + e, mask=t < T, other=0) != 0).to(tl.int32)
    return on


@triton.jit
def tally(mask_ptr, count_ptr, T, E, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    """Program (group): its tokens."""
    g = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, T, BLOCK):
        total += _runs(mask_ptr, start + tl.arange(0, BLOCK), g, T, E, TOGETHER)
    tl.store(count_ptr + g, tl.sum(total, axis=0))


@triton.jit
def place(
    mask_ptr, count_ptr, token_ptr, owner_ptr, tiles_ptr, T, E, G,
    TOGETHER: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (group): its tokens, padded with T to whole tiles, behind those of the groups before it, and whose each tile is."""
    g = tl.program_id(0)
    other = tl.arange(0, GROUPS)
    tiles = tl.cdiv(tl.load(count_ptr + other, mask=other < G, other=0), TILE)
    before = tl.sum(tl.where(other < g, tiles, 0), axis=0)
    own = tl.sum(tl.where(other == g, tiles, 0), axis=0)
    first = before * TILE
    seen = 0
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        on = _runs(mask_ptr, t, g, T, E, TOGETHER)
        at = first + seen + tl.cumsum(on, axis=0) - 1
        tl.store(token_ptr + at, t, mask=on > 0)
        seen += tl.sum(on, axis=0)
    padding = seen + tl.arange(0, TILE)
    tl.store(token_ptr + first + padding, tl.zeros((TILE,), tl.int32) + T, mask=padding < own * TILE)
    for start in range(0, own, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(owner_ptr + before + tile, tl.zeros((BLOCK,), tl.int32) + g, mask=tile < own)
    if g == G - 1:
        tl.store(tiles_ptr, before + own)


@triton.jit
def _columns(row_at, d, D, EVEN: tl.constexpr):
    """Columns d of the rows that begin at row_at."""
    if EVEN:
        return tl.load(row_at + d)
    else:
        return tl.load(row_at + d, mask=d < D, other=0.0)


@triton.jit
def hidden(
    x_ptr, mask_ptr, token_ptr, owner_ptr, tiles_ptr, up_ptr, gate_ptr, b_up_ptr, b_gate_ptr, h_ptr, T, D, F, S, N, E,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS_UP: tl.constexpr, BIAS_GATE: tl.constexpr, TOGETHER: tl.constexpr,
    EVEN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, block of its group's neurons): their activations. EVEN: BLOCK divides D."""
    wide = N * TOGETHER
    blocks = tl.cdiv(wide, ROWS)
    tile = tl.program_id(0) // blocks
    if tile < tl.load(tiles_ptr):
        g = tl.load(owner_ptr + tile)
        t = tl.load(token_ptr + tile * TILE + tl.arange(0, TILE))
        p = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
        n = S + g * wide + tl.minimum(p, wide - 1)
        x_at = x_ptr + tl.minimum(t, T - 1).to(tl.int64)[:, None] * D
        w_at = n.to(tl.int64)[:, None] * D
        h = tl.zeros((TILE, ROWS), tl.float32)
        gate = tl.zeros((TILE, ROWS), tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)[None, :]
            x = _columns(x_at, d, D, EVEN)
            h = tl.dot(x, tl.trans(_columns(up_ptr + w_at, d, D, EVEN)), h, input_precision="ieee")
            if GATED:
                gate = tl.dot(x, tl.trans(_columns(gate_ptr + w_at, d, D, EVEN)), gate, input_precision="ieee")
        if BIAS_UP:
            h += tl.load(b_up_ptr + n).to(tl.float32)[None, :]
        if BIAS_GATE:
            gate += tl.load(b_gate_ptr + n).to(tl.float32)[None, :]
        if GATED:
            h = _activate(gate, ACT) * h
        else:
            h = _activate(h, ACT)
        live = (t < T)[:, None] & (p < wide)[None, :]
        if TOGETHER > 1:
            e = g * TOGETHER + tl.minimum(p, wide - 1) // N
            on = tl.load(mask_ptr + t.to(tl.int64)[:, None] * E + e[None, :], mask=live, other=0) != 0
            h = tl.where(on, h, 0.0)
        tl.store(h_ptr + t.to(tl.int64)[:, None] * F + n[None, :], h.to(h_ptr.dtype.element_ty), mask=live)
