"""The two compiled kernels of the CPU backend: the first projection, and a piece of neurons from x to y.

Per piece: h = act(x W_up^T) by blocks of 4 tokens x 4 neurons, then y += h W_down; where a ReLU left few neurons on, only their rows
of W_down are read. Arithmetic is float32, weights float32 or bfloat16 (`tag`, see `simd`). Everything is an int64 address or
size; no bounds are checked. The kernels are C functions called by address: numba compiles a function again into each of
its callers, and three levels of that took half a minute.
"""

import numpy as np
from numba import cfunc, njit

from moefication_cli.runtime import simd as v
from moefication_cli.runtime import simd_blocks as block

RELU, RELU2, GELU, GELU_TANH, QUICK_GELU, SILU, TANH, IDENTITY, SQUARE = range(9)
BATCH = 128  # tokens per call of a piece: h stays in the second-level cache
DEPTH = 1024  # columns per pass of the first projection: 4 rows of x stay in the first-level cache
FEW_TOKENS = 4
F32 = np.float32(0)
internal = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")  # no checks for division by zero


@internal
def _activation(code, x):
    if code == RELU:
        return v.relu(x)
    if code == RELU2 or code == SQUARE:
        x = v.relu(x) if code == RELU2 else x
        return v.mul(x, x)
    if code == SILU:
        return v.silu(x)
    if code == GELU:
        return v.gelu(x)
    if code == GELU_TANH:
        return v.gelu_tanh(x)
    if code == QUICK_GELU:
        return v.quick_gelu(x)
    if code == TANH:
        return v.tanh(x)
    return x


@internal
def _fill_rows(h, h_bytes, m, bias, n):
    """Every row of h [m, n] becomes the bias, or zero; whole vectors are written, so a row may spill into the next one's start."""
    for i in range(m):
        for j in range(0, n, 16):
            value = v.zero() if bias == 0 else v.load_part(F32, bias + 4 * j, min(n - j, 16))
            v.store(F32, h + i * h_bytes + 4 * j, value)


@internal
def project(tag, rows, m, w, row_bytes, n, length, h, h_bytes):
    """h[i, j] += x_i . w_j for m rows of x (addresses in `rows`, padded to a multiple of 4 by repetition) and n rows of w."""
    size = row_bytes // length
    step = DEPTH if m > 2 else length
    for start in range(0, length, step):
        part = min(step, length - start)
        i = 0
        while i < m:
            x0, x1 = v.get_i64(rows + 8 * i) + 4 * start, v.get_i64(rows + 8 * i + 8) + 4 * start
            x2, x3 = v.get_i64(rows + 8 * i + 16) + 4 * start, v.get_i64(rows + 8 * i + 24) + 4 * start
            left = m - i
            j = 0
            while j < n:
                at, out, rest = w + j * row_bytes + size * start, h + i * h_bytes + 4 * j, n - j
                if left >= 3:
                    block.dots_4x4(tag, x0, x1, x2, x3, at, row_bytes, rest, part, out, h_bytes)
                    j += 4
                elif left == 2:
                    block.dots_2x4(tag, x0, x1, x2, x3, at, row_bytes, rest, part, out, h_bytes)
                    j += 4
                elif rest > 4:
                    block.dots_1x8(tag, x0, x1, x2, x3, at, row_bytes, rest, part, out, h_bytes)
                    j += 8
                else:
                    block.dots_1x4(tag, x0, x1, x2, x3, at, row_bytes, rest, part, out, h_bytes)
                    j += 4
            i += 4 if left >= 3 else left


@internal
def _spread_rows(tag, y, addresses, values, count, length):
    """y += sum of value_i * row_i of one token."""
    i = 0
    while i + 8 <= count:
        block.rows_8(tag, y, addresses + 8 * i, values + 4 * i, length)
        i += 8
    if i + 4 <= count:
        block.rows_4(tag, y, addresses + 8 * i, values + 4 * i, length)
        i += 4
    while i < count:
        block.rows_1(tag, y, addresses + 8 * i, values + 4 * i, length)
        i += 1


@internal
def _spread_dense(tag, ys, m, w, row_bytes, n, length, h, h_bytes, listed, tile):
    """y_i += h_i W for m rows of y (addresses in `ys`, padded to a multiple of 4 with a row nobody reads).

    64 columns of W at a time are copied to `tile`: at the width of a model rows lie a power of two apart, where a handful of
    them evict each other from every cache, and bfloat16 is widened once instead of once per 4 tokens.
    """
    size, fours = row_bytes // length, (m + 1) // 4 * 4  # three left over make a block, one or two do not
    for c in range(0, length if fours > 0 else 0, 64):
        lanes = min(length - c, 64)
        for j in range(n):
            for k in range(0, lanes, 16):
                value = v.load_part(tag, w + j * row_bytes + size * (c + k), min(lanes - k, 16))
                v.store(F32, tile + 256 * j + 4 * k, value)
        for i in range(0, fours, 4):
            y0, y1 = v.get_i64(ys + 8 * i) + 4 * c, v.get_i64(ys + 8 * i + 8) + 4 * c
            y2, y3 = v.get_i64(ys + 8 * i + 16) + 4 * c, v.get_i64(ys + 8 * i + 24) + 4 * c
            out = h + i * h_bytes
            if lanes == 64:
                block.update_4x4(F32, y0, y1, y2, y3, tile, 256, n, out, h_bytes, 64)
            else:
                for k in range(0, 4 * lanes, 64):
                    part = min(lanes - k // 4, 16)
                    block.update_4x1(F32, y0 + k, y1 + k, y2 + k, y3 + k, tile + k, 256, n, out, h_bytes, part)
    i = fours
    if i < m:
        for j in range(n):
            v.put_i64(listed + 8 * j, w + j * row_bytes)
    while i < m:
        _spread_rows(tag, v.get_i64(ys + 8 * i), listed, h + i * h_bytes, n, length)
        i += 1


@internal
def _spread_fired(tag, ys, m, w, row_bytes, n, length, h, h_bytes, listed, counts):
    """The same, reading only rows of W whose h is not zero; h is overwritten."""
    size = row_bytes // length
    for i in range(m):
        out, row, kept = h + i * h_bytes, listed + i * 2 * h_bytes, 0
        for j in range(n):
            value = v.get_f32(out + 4 * j)
            v.put_f32(out + 4 * kept, value)
            v.put_i64(row + 8 * kept, w + j * row_bytes)
            kept += value != 0.0
        if m <= FEW_TOKENS:  # weights come from memory: long streams; else from cache: y stays in registers
            _spread_rows(tag, v.get_i64(ys + 8 * i), row, out, kept, length)
        v.put_i64(counts + 8 * i, kept)
    if m <= FEW_TOKENS:
        return
    c = 0
    while c < length:
        columns = 256 if length - c >= 256 else (64 if length - c >= 64 else min(length - c, 16))
        for i in range(m):
            y = v.get_i64(ys + 8 * i) + 4 * c
            kept = v.get_i64(counts + 8 * i)
            out, row = h + i * h_bytes, listed + i * 2 * h_bytes
            if columns == 256:
                block.gather_16(tag, y, row, out, kept, size * c, 256)
            elif columns == 64:
                block.gather_4(tag, y, row, out, kept, size * c, 64)
            else:
                block.gather_1(tag, y, row, out, kept, size * c, columns)
        c += columns


@internal
def _fired(h, h_bytes, m, n):
    total = 0
    for i in range(m):
        for j in range(n):
            total += v.get_f32(h + i * h_bytes + 4 * j) != 0.0
    return total


@internal
def piece(tag, call, rows, ys, m, up, gate, down, b_up, b_gate, n, length, row_bytes, act, scratch):
    """y += act(...) W_down for m tokens (at most BATCH) and n neurons whose rows start at the addresses; `call` is `project`."""
    h_bytes = 4 * ((n + 7) // 8 * 8)
    h = scratch
    g = h + (m + 4) * h_bytes + 64
    listed = g + (m + 4) * h_bytes + 64
    counts = listed + 2 * m * h_bytes
    padded = (m + 3) // 4 * 4
    _fill_rows(h, h_bytes, padded, b_up, n)
    v.call_8(call, rows, m, up, row_bytes, n, length, h, h_bytes)
    if gate != 0:
        _fill_rows(g, h_bytes, padded, b_gate, n)
        v.call_8(call, rows, m, gate, row_bytes, n, length, g, h_bytes)
    inner = h if gate == 0 else g
    for at in range(0, padded * h_bytes, 64):
        value = _activation(act, v.load(F32, inner + at))
        if gate != 0:
            value = v.mul(value, v.load(F32, h + at))
        v.store(F32, h + at, value)
    if act <= RELU2 and 10 * _fired(h, h_bytes, m, n) < 7 * m * n:
        _spread_fired(tag, ys, m, down, row_bytes, n, length, h, h_bytes, listed, counts)
    else:
        _spread_dense(tag, ys, m, down, row_bytes, n, length, h, h_bytes, listed, counts + 8 * m + 64)


@cfunc("void(" + ", ".join(["int64"] * 8) + ")", cache=True, error_model="numpy")
def project_float32(rows, m, w, row_bytes, n, length, h, h_bytes):
    """`project` for float32 weights."""
    project(F32, rows, m, w, row_bytes, n, length, h, h_bytes)


@cfunc("void(" + ", ".join(["int64"] * 14) + ")", cache=True, error_model="numpy")
def piece_float32(call, rows, ys, m, up, gate, down, b_up, b_gate, n, length, row_bytes, act, scratch):
    """`piece` for float32 weights."""
    piece(F32, call, rows, ys, m, up, gate, down, b_up, b_gate, n, length, row_bytes, act, scratch)
