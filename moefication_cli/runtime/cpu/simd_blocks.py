"""The three register blocks the CPU kernels are made of, as LLVM IR on top of `simd`: dot products, dense and sparse updates.

Activations are float32, weights float32, bfloat16 or int8 (see `simd`), everything is row-major and addressed in bytes.
A block holds up to 16 accumulators of 16 lanes; with 512-bit registers on a Zen 4 core it reaches about 100 GFLOP/s in float32.
No bounds are checked and nothing is allocated here; callers repeat a row's address to fill a block that is too wide.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from moefication_cli.runtime.cpu.simd import (
    F32,
    I32,
    I64,
    LANES,
    VEC,
    constant,
    fused,
    item_bytes,
    load_vector,
    operation,
    pointer,
    splat_value,
    store_vector,
    sum_each,
)

_FLOAT_BYTES = 4


def int_constant(value: int) -> Any:
    return ir.Constant(I64, value)


def emit_loop(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    with cgutils.for_range(builder, count) as loop:
        body(loop.index)


def make_accumulators(builder: Any, values: Sequence[Any]) -> list[Any]:
    """Stack slots that LLVM promotes to registers."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def _update(builder: Any, slot: Any, a: Any, b: Any) -> None:
    builder.store(fused(builder, a, b, builder.load(slot)), slot)


def _dots(tokens: int, neurons: int) -> Any:
    """h[r, c] += x_r . w_c for `tokens` rows of x and `neurons` consecutive rows of w (times four is a vector at most).

    Arguments: tag, x0, x1, x2, x3 (unused ones repeated), w, bytes per row of w, rows left in w (further ones repeat the
    last), length of a row, h, bytes per row of h.
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        w, row_bytes, rows_left, length, h, h_bytes = args[5:]
        width = item_bytes(kinds[0])
        last = builder.sub(rows_left, int_constant(1))
        rows = []
        for c in range(neurons):
            index = builder.select(builder.icmp_signed("<", int_constant(c), last), int_constant(c), last)
            rows.append(builder.add(w, builder.mul(index, row_bytes)))
        slots = make_accumulators(builder, [constant(0.0)] * (tokens * neurons))

        def step(at: Any, count: Any) -> None:
            w_off, x_off = (
                builder.mul(at, int_constant(LANES * width)),
                builder.mul(at, int_constant(LANES * _FLOAT_BYTES)),
            )
            columns = [load_vector(builder, kinds[0], builder.add(row, w_off), count) for row in rows]
            for r in range(tokens):
                x = load_vector(builder, types.float32, builder.add(args[1 + r], x_off), count)
                for c, column in enumerate(columns):
                    _update(builder, slots[r * neurons + c], x, column)

        whole = builder.ashr(length, int_constant(4))
        emit_loop(builder, whole, lambda index: step(index, None))
        rest = builder.and_(length, int_constant(LANES - 1))
        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0)), likely=False):
            step(whole, rest)
        values = [builder.load(slot) for slot in slots]
        sums = sum_each(builder, values + [constant(0.0)] * (LANES - len(values)))
        four = ir.VectorType(F32, 4)
        for group in range(tokens * neurons // 4):
            pick = ir.Constant(ir.VectorType(I32, 4), list(range(4 * group, 4 * group + 4)))
            part = builder.shuffle_vector(sums, ir.Constant(VEC, ir.Undefined), pick)
            r, c = divmod(4 * group, neurons)
            offset = builder.add(builder.mul(h_bytes, int_constant(r)), int_constant(c * _FLOAT_BYTES))
            where = pointer(builder, builder.add(h, offset), four)
            builder.store(builder.fadd(builder.load(where, align=4), part), where, align=4)

    return operation(types.none, 11, emit)


def _updates(tokens: int, vectors: int) -> Any:
    """y_r[:16 * vectors] += sum over n of h[r, n] * w_n[:16 * vectors], y kept in registers over all n.

    Arguments: tag, y0, y1, y2, y3 (unused ones repeated), w, bytes per row of w, number of rows, h, bytes per row of h,
    lanes (used if `vectors` is 1: only the first `lanes` columns exist).
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        w, row_bytes, count, h, h_bytes, lanes = args[5:]
        lanes = lanes if vectors == 1 else None
        width = item_bytes(kinds[0])
        columns = [
            (r, v, builder.add(args[1 + r], int_constant(v * LANES * _FLOAT_BYTES)))
            for r in range(tokens)
            for v in range(vectors)
        ]
        slots = make_accumulators(builder, [load_vector(builder, types.float32, y, lanes) for _, _, y in columns])

        def body(n: Any) -> None:
            row = builder.add(w, builder.mul(n, row_bytes))
            loaded = [
                load_vector(builder, kinds[0], builder.add(row, int_constant(v * LANES * width)), lanes)
                for v in range(vectors)
            ]
            for r in range(tokens):
                at = builder.add(
                    h, builder.add(builder.mul(h_bytes, int_constant(r)), builder.mul(n, int_constant(_FLOAT_BYTES)))
                )
                value = splat_value(builder, builder.load(pointer(builder, at, F32)))
                for v in range(vectors):
                    _update(builder, slots[r * vectors + v], value, loaded[v])

        emit_loop(builder, count, body)
        for (_, _, y), slot in zip(columns, slots, strict=True):
            store_vector(builder, types.float32, y, builder.load(slot), lanes)

    return operation(types.none, 11, emit)


def _gathered(vectors: int) -> Any:
    """y[:16 * vectors] += sum over i of value_i * row_i[:16 * vectors] for rows at listed addresses.

    Arguments: tag, y, addresses (int64), values (float32), number of rows, byte offset into each row, lanes (as above).
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        _, y, addresses, values, count, offset, lanes = args
        lanes = lanes if vectors == 1 else None
        width = item_bytes(kinds[0])
        places = [builder.add(y, int_constant(v * LANES * _FLOAT_BYTES)) for v in range(vectors)]
        slots = make_accumulators(builder, [load_vector(builder, types.float32, place, lanes) for place in places])

        def body(i: Any) -> None:
            row = builder.load(pointer(builder, builder.add(addresses, builder.mul(i, int_constant(8))), I64))
            value = builder.load(pointer(builder, builder.add(values, builder.mul(i, int_constant(_FLOAT_BYTES))), F32))
            spread, start = splat_value(builder, value), builder.add(row, offset)
            for v, slot in enumerate(slots):
                column = load_vector(builder, kinds[0], builder.add(start, int_constant(v * LANES * width)), lanes)
                _update(builder, slot, spread, column)

        emit_loop(builder, count, body)
        for place, slot in zip(places, slots, strict=True):
            store_vector(builder, types.float32, place, builder.load(slot), lanes)

    return operation(types.none, 7, emit)


dots_4x4 = _dots(4, 4)
dots_2x4 = _dots(2, 4)
dots_1x8 = _dots(1, 8)
dots_1x4 = _dots(1, 4)
update_4x4 = _updates(4, 4)
update_1x8 = _updates(1, 8)
update_4x1 = _updates(4, 1)
update_1x1 = _updates(1, 1)
gather_16 = _gathered(16)
gather_4 = _gathered(4)
gather_1 = _gathered(1)
