"""The kernels of `numba_kernels` for int8 weights with a float32 scale per neuron (see `ffn.quantise_rows`).

Plain: weights are widened to float32 in registers, tokens stay float32. Integer: tokens are quantised too, symmetric per token, and so are
the hidden activations of a piece, symmetric per token and piece; products are summed exactly in int32 (needs `simd_int8`). Where a
ReLU left few neurons on, only their rows of W_down are read, in both. `scales` is the address of a piece's first up scale; those
of gate and down follow `scale_bytes` apart.
"""

from pathlib import Path

import numpy as np

from moefication_cli.compiled import cached_cfunc
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu import simd_int8 as v8
from moefication_cli.runtime.cpu.numba_kernels import (
    F32,
    RELU2,
    _fill_rows,
    _fired,
    _spread_dense,
    _spread_fired,
    activate,
    internal,
    project,
)

HERE = Path(__file__).parent

INT8 = np.int8(0)


@internal
def quantise(source, scale, n, target, end):
    """n float32, times a scale each unless `scale` is 0, as a quantised row. NaN and infinity make its scale NaN."""
    most, probe, added = v.zero(), v.zero(), v.zero()
    for j in range(0, n, 16):
        value = v.load_part(F32, source + 4 * j, min(16, n - j))
        if scale != 0:
            value = v.mul(value, v.load_part(F32, scale + 4 * j, min(16, n - j)))
        most, probe = v8.larger(most, value), v.fma(value, v.zero(), probe)
    top = v8.largest(most)
    factor = v.splat(np.float32(127.0) / top if top > 0 else np.float32(0.0))
    for j in range(0, n, 16):
        value = v.load_part(F32, source + 4 * j, min(16, n - j))
        if scale != 0:
            value = v.mul(value, v.load_part(F32, scale + 4 * j, min(16, n - j)))
        value = v8.nearest(v.mul(value, factor))
        added = v.add(added, value)
        v8.store_bytes(target + j, value)
    for j in range((n + 15) // 16 * 16, end, 16):
        v8.store_bytes(target + j, v.zero())
    v.put_f32(target + end, top / np.float32(127.0) + v.total(probe))
    v.put_i32(target + end + 4, -128 * np.int64(v.total(added)))


@internal
def _project_integer(rows, m, w, row_bytes, n, length, h, h_bytes):
    """h[i, j] += x_i . w_j in int32 for m quantised rows of x."""
    i = 0
    while i < m:
        x0 = v.get_i64(rows + 8 * i)
        out, j = h + i * h_bytes, 0
        if m - i >= 2:
            x1, x2, x3 = v.get_i64(rows + 8 * i + 8), v.get_i64(rows + 8 * i + 16), v.get_i64(rows + 8 * i + 24)
            while j < n:
                v8.dots_4x4(x0, x1, x2, x3, w + j * row_bytes, row_bytes, n - j, length, out + 4 * j, h_bytes)
                j += 4
            i += 4
        else:
            while j < n:
                where = w + j * row_bytes
                if n - j > 4:
                    v8.dots_1x8(x0, x0, x0, x0, where, row_bytes, n - j, length, out + 4 * j, h_bytes)
                else:
                    v8.dots_1x4(x0, x0, x0, x0, where, row_bytes, n - j, length, out + 4 * j, h_bytes)
                j += 8
            i += 1


@internal
def _spread_integer(ys, m, w, row_bytes, n, length, h, h_bytes, scale, quantised):
    """y_i += h_i W in integers: h is quantised into rows of 2 * h_bytes at `quantised`."""
    end, q_bytes = (n + 15) // 16 * 16, 2 * h_bytes
    padded = (m + 3) // 4 * 4
    for i in range(padded):
        quantise(h + i * h_bytes, scale, n, quantised + i * q_bytes, end)
    for i in range(0, m, 4):
        y0, y1 = v.get_i64(ys + 8 * i), v.get_i64(ys + 8 * i + 8)
        y2, y3 = v.get_i64(ys + 8 * i + 16), v.get_i64(ys + 8 * i + 24)
        q, c = quantised + i * q_bytes, 0
        while c + 64 <= length:
            at = 4 * c
            v8.update_whole(y0 + at, y1 + at, y2 + at, y3 + at, w + c, row_bytes, n, q, q_bytes, end, 64)
            c += 64
        if c < length:
            at = 4 * c
            v8.update_part(y0 + at, y1 + at, y2 + at, y3 + at, w + c, row_bytes, n, q, q_bytes, end, length - c)


def make_piece(integer):
    """`piece` for float32 rows, or for quantised ones. A constant, so that no CPU meets instructions it has not."""

    @internal
    def _inner(call, rows, m, w, bias, scale, n, length, row_bytes, h, h_bytes):
        """h [m, n] = x W^T, scaled, + bias."""
        padded, end = (m + 3) // 4 * 4, (length + 63) // 64 * 64
        if integer:
            for i in range(padded):
                start = v8.int_splat(v.get_i32(v.get_i64(rows + 8 * i) + end + 4))
                for j in range(0, n, 16):
                    v.store(F32, h + i * h_bytes + 4 * j, start)
            _project_integer(rows, m, w, row_bytes, n, length, h, h_bytes)
        else:
            _fill_rows(h, h_bytes, padded, np.int64(0), n)
            v.call_8(call, rows, m, w, row_bytes, n, length, h, h_bytes)
        for i in range(padded):
            factor = np.float32(1.0)
            if integer:
                factor = v.get_f32(v.get_i64(rows + 8 * i) + end)
            for j in range(0, n, 16):
                lanes, at = min(16, n - j), h + i * h_bytes + 4 * j
                value = v.load_part(F32, at, lanes)
                if integer:
                    value = v8.of_ints(value)
                value = v.mul(v.mul(value, v.splat(factor)), v.load_part(F32, scale + 4 * j, lanes))
                if bias != 0:
                    value = v.add(value, v.load_part(F32, bias + 4 * j, lanes))
                v.store_part(F32, at, value, lanes)

    @internal
    def piece(call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch):
        """As `numba_kernels.piece`; `rows` are quantised where `integer` is set."""
        h_bytes = 4 * ((n + 7) // 8 * 8)
        h = scratch
        g = h + (m + 4) * h_bytes + 64
        listed = g + (m + 4) * h_bytes + 64
        counts = listed + 2 * m * h_bytes
        padded = (m + 3) // 4 * 4
        _inner(call, rows, m, up, b_up, scales, n, length, row_bytes, h, h_bytes)
        inner = h
        if gate != 0:
            inner = g
            _inner(call, rows, m, gate, b_gate, scales + scale_bytes, n, length, row_bytes, g, h_bytes)
        for at in range(0, padded * h_bytes, 64):
            value = activate(act, v.load(F32, inner + at))
            if gate != 0:
                value = v.mul(value, v.load(F32, h + at))
            v.store(F32, h + at, value)
        scale = scales + 2 * scale_bytes
        few = act <= RELU2 and 10 * _fired(h, h_bytes, m, n) < (3 if integer and m > 1 else 7) * m * n
        if integer and m > 1 and not few:
            _spread_integer(ys, m, down, row_bytes, n, length, h, h_bytes, scale, listed)
            return
        for i in range(padded):
            for j in range(0, n, 16):
                lanes, at = min(16, n - j), h + i * h_bytes + 4 * j
                v.store_part(F32, at, v.mul(v.load_part(F32, at, lanes), v.load_part(F32, scale + 4 * j, lanes)), lanes)
        if few:
            _spread_fired(INT8, ys, m, down, row_bytes, n, length, h, h_bytes, listed, counts)
        else:
            _spread_dense(INT8, ys, m, down, row_bytes, n, length, h, h_bytes)

    return piece


_piece = make_piece(False)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 8) + ")", error_model="numpy")
def project_int8(rows, m, w, row_bytes, n, length, h, h_bytes):
    """`project` for int8 weights and float32 rows, without the scales."""
    project(INT8, rows, m, w, row_bytes, n, length, h, h_bytes)


@cached_cfunc(HERE, "void(" + ", ".join(["int64"] * 16) + ")", error_model="numpy")
def piece_int8(
    call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
):
    """`piece` for float32 rows."""
    _piece(
        call, rows, ys, m, up, gate, down, b_up, b_gate, scales, scale_bytes, n, length, row_bytes, act, scratch
    )  # fmt: skip
