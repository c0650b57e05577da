"""The two compiled kernels of the CPU backend: the first projection, and a piece of neurons from x to y.

Per piece: h = act(x W_up^T) by blocks of 4 tokens x 4 neurons, then y += h W_down; where a ReLU left few neurons on, only their rows
of W_down are read. Arithmetic is float32, weights float32 or bfloat16 (`tag`, see `simd`). Everything is an int64 address or
size; no bounds are checked. The kernels are C functions called by address: numba compiles a function again into each of
its callers, and three levels of that took half a minute.
"""

from pathlib import Path

import numpy as np
from numba import njit

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu import simd_blocks as block

HERE = Path(__file__).parent

RELU, RELU2, GELU, GELU_TANH, QUICK_GELU, SILU, TANH, IDENTITY, SQUARE = range(9)
BATCH = 128  # tokens per call of a piece: h stays in the second-level cache
DEPTH = 1024  # columns per pass of the first projection: 4 rows of x stay in the first-level cache
F32 = np.float32(0)
internal = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")  # no checks for division by zero


@internal
def activate(code, x):
    """The activation of that code, lane by lane."""
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
            x0 = v.get_i64(rows + 8 * i) + 4 * start
            x1 = v.get_i64(rows + 8 * i + 8) + 4 * start
            out = h + i * h_bytes
            j = 0
            if m - i >= 3:
                x2 = v.get_i64(rows + 8 * i + 16) + 4 * start
                x3 = v.get_i64(rows + 8 * i + 24) + 4 * start
                while j < n:
                    block.dots_4x4(
                        tag,
                        x0,
                        x1,
                        x2,
                        x3,
                        w + j * row_bytes + size * start,
                        row_bytes,
                        n - j,
                        part,
                        out + 4 * j,
                        h_bytes,
                    )
                    j += 4
                i += 4
            elif m - i == 2:
                while j < n:
                    block.dots_2x4(
                        tag,
                        x0,
                        x1,
                        x0,
                        x1,
                        w + j * row_bytes + size * start,
                        row_bytes,
                        n - j,
                        part,
                        out + 4 * j,
                        h_bytes,
                    )
                    j += 4
                i += 2
            else:
                while j < n:
                    where = w + j * row_bytes + size * start
                    if n - j > 4:
                        block.dots_1x8(tag, x0, x0, x0, x0, where, row_bytes, n - j, part, out + 4 * j, h_bytes)
                    else:
                        block.dots_1x4(tag, x0, x0, x0, x0, where, row_bytes, n - j, part, out + 4 * j, h_bytes)
                    j += 8
                i += 1


@internal
def _spread_dense(tag, ys, m, w, row_bytes, n, length, h, h_bytes):
    """y_i += h_i W for m rows of y (addresses in `ys`, padded to a multiple of 4 with a row nobody reads)."""
    size = row_bytes // length
    i = 0
    while i < m:
        y0 = v.get_i64(ys + 8 * i)
        out = h + i * h_bytes
        c = 0
        if m - i >= 3:
            y1 = v.get_i64(ys + 8 * i + 8)
            y2 = v.get_i64(ys + 8 * i + 16)
            y3 = v.get_i64(ys + 8 * i + 24)
            while c + 64 <= length:
                block.update_4x4(
                    tag, y0 + 4 * c, y1 + 4 * c, y2 + 4 * c, y3 + 4 * c, w + size * c, row_bytes, n, out, h_bytes, 64
                )
                c += 64
            while c < length:
                lanes = min(length - c, 16)
                block.update_4x1(
                    tag, y0 + 4 * c, y1 + 4 * c, y2 + 4 * c, y3 + 4 * c, w + size * c, row_bytes, n, out, h_bytes, lanes
                )
                c += 16
            i += 4
        else:
            while c + 128 <= length:
                y = y0 + 4 * c
                block.update_1x8(tag, y, y, y, y, w + size * c, row_bytes, n, out, h_bytes, 128)
                c += 128
            while c < length:
                y = y0 + 4 * c
                block.update_1x1(tag, y, y, y, y, w + size * c, row_bytes, n, out, h_bytes, min(length - c, 16))
                c += 16
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
        v.put_i64(counts + 8 * i, kept)
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
        value = activate(act, v.load(F32, inner + at))
        if gate != 0:
            value = v.mul(value, v.load(F32, h + at))
        v.store(F32, h + at, value)
    if act <= RELU2 and 10 * _fired(h, h_bytes, m, n) < 7 * m * n:
        _spread_fired(tag, ys, m, down, row_bytes, n, length, h, h_bytes, listed, counts)
    else:
        _spread_dense(tag, ys, m, down, row_bytes, n, length, h, h_bytes)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 8) + ")", error_model="numpy")
def project_float32(rows, m, w, row_bytes, n, length, h, h_bytes):
    """`project` for float32 weights."""
    project(F32, rows, m, w, row_bytes, n, length, h, h_bytes)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 16) + ")", error_model="numpy")
def piece_float32(
    call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
):
    """`piece` for float32 weights."""
    piece(F32, call, rows, ys, m, up, gate, down, b_up, b_gate, n, length, row_bytes, act, scratch)
