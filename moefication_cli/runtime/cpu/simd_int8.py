"""Sixty-four int8 at a time, for CPUs whose `vpdpbusd` multiplies and adds them four by four (AVX-512 VNNI). On top of `simd`.

The instruction takes one operand unsigned: weights are read as w + 128 (their top bit flipped), tokens are signed, and each sum of products
starts at -128 times the sum of the token's numbers, which is exact. A quantised row is its int8, zeros up to `end` bytes, then
float32 scale and int32 start of its sums; see `numba_int8`. Nothing checks bounds.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types

from moefication_cli.compiled import cpu_features
from moefication_cli.runtime.cpu.simd import (
    F32,
    I8,
    I32,
    LANES,
    VEC,
    VECTOR,
    emit_call,
    fused,
    load_vector,
    operation,
    pointer,
    splat_value,
    store_vector,
)
from moefication_cli.runtime.cpu.simd_blocks import emit_loop, int_constant, make_accumulators

WIDE = 4 * LANES  # int8 of a vector
_INTS, _BYTES = ir.VectorType(I32, LANES), ir.VectorType(I8, WIDE)


def has_integer_dots() -> bool:
    """Whether this CPU has the instruction."""
    return {"avx512vnni", "avx512bw"} <= cpu_features()


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """All lanes of a vector type `kind` the value."""
    undef, count = ir.Constant(kind, ir.Undefined), kind.count
    first = builder.insert_element(undef, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _load(builder: Any, address: Any, count: Any = None) -> Any:
    """64 bytes, or the first `count` and zeros."""
    where = pointer(builder, address, _BYTES)
    if count is None:
        return builder.load(where, align=1)
    lane = ir.Constant(_BYTES, list(range(WIDE)))
    below = builder.icmp_signed("<", lane, _spread(builder, builder.trunc(count, I8), _BYTES))
    return emit_call(
        builder,
        "llvm.masked.load.v64i8.p0",
        _BYTES,
        [where, ir.Constant(I32, 1), below, ir.Constant(_BYTES, None)],
    )


def _unsigned(builder: Any, weights: Any) -> Any:
    return builder.xor(weights, ir.Constant(_BYTES, [-128] * WIDE))


def _accumulate(builder: Any, slot: Any, weights: Any, tokens: Any) -> None:
    """slot[lane] += sum of four products of unsigned weights and signed tokens."""
    found = [builder.bitcast(value, _INTS) for value in (weights, tokens)]
    builder.store(emit_call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, [builder.load(slot), *found]), slot)


def _sum_each(builder: Any, vectors: Sequence[Any]) -> Any:
    """Lane j of the result is the sum of vector j: the tree of `simd.sum_each`, in integers."""
    level, width = list(vectors), LANES
    while len(level) > 1:
        half, step = len(level) // 2, width // 2
        low, high = list[Any](), list[Any]()
        for group in range(LANES // width):
            for source in range(2):
                base = source * LANES + group * width
                low += range(base, base + step)
                high += range(base + step, base + width)
        pick = [ir.Constant(_INTS, order) for order in (low, high)]
        level = [
            builder.add(builder.shuffle_vector(a, b, pick[0]), builder.shuffle_vector(a, b, pick[1]))
            for a, b in zip(level[:half], level[half:], strict=True)
        ]
        width = step
    return level[0]


def _dots(tokens: int, neurons: int) -> Any:
    """h[r, c] += x_r . w_c in int32, for `tokens` quantised rows and `neurons` consecutive rows of w; arguments as `simd_blocks._dots`
    without the tag.
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        w, row_bytes, rows_left, length, h, h_bytes = args[4:]
        last = builder.sub(rows_left, int_constant(1))
        rows = []
        for c in range(neurons):
            index = builder.select(builder.icmp_signed("<", int_constant(c), last), int_constant(c), last)
            rows.append(builder.add(w, builder.mul(index, row_bytes)))
        slots = make_accumulators(builder, [ir.Constant(_INTS, [0] * LANES)] * (tokens * neurons))

        def step(at: Any, count: Any) -> None:
            offset = builder.mul(at, int_constant(WIDE))
            columns = [_unsigned(builder, _load(builder, builder.add(row, offset), count)) for row in rows]
            for r in range(tokens):
                x = _load(builder, builder.add(args[r], offset))
                for c, column in enumerate(columns):
                    _accumulate(builder, slots[r * neurons + c], column, x)

        whole = builder.ashr(length, int_constant(6))
        emit_loop(builder, whole, lambda index: step(index, None))
        rest = builder.and_(length, int_constant(WIDE - 1))
        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0)), likely=False):
            step(whole, rest)
        values = [builder.load(slot) for slot in slots]
        sums = _sum_each(builder, values + [ir.Constant(_INTS, [0] * LANES)] * (LANES - len(values)))
        four = ir.VectorType(I32, 4)
        for group in range(tokens * neurons // 4):
            pick = ir.Constant(four, list(range(4 * group, 4 * group + 4)))
            part = builder.shuffle_vector(sums, ir.Constant(_INTS, ir.Undefined), pick)
            r, c = divmod(4 * group, neurons)
            where = pointer(
                builder, builder.add(h, builder.add(builder.mul(h_bytes, int_constant(r)), int_constant(4 * c))), four
            )
            builder.store(builder.add(builder.load(where, align=4), part), where, align=4)

    return operation(types.none, 10, emit)


def _interleaved(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Four rows of 64 columns as four vectors of 16 columns x 4 rows. Columns stay within their 16-byte lanes, where shuffling is
    cheap: vector k has columns 16 l + 4 k .. + 3 in lane l.
    """

    def unpack(a: Any, b: Any, width: int, kind: Any, high: bool) -> Any:
        per_lane, order = 16 // width, []
        for lane in range(4):
            start = lane * per_lane + (per_lane // 2 if high else 0)
            for i in range(per_lane // 2):
                order += [start + i, kind.count + start + i]
        mask = ir.Constant(ir.VectorType(I32, kind.count), order)
        return builder.shuffle_vector(builder.bitcast(a, kind), builder.bitcast(b, kind), mask)

    pairs = ir.VectorType(ir.IntType(16), 32)
    low = [unpack(rows[k], rows[k + 1], 1, _BYTES, False) for k in (0, 2)]
    high = [unpack(rows[k], rows[k + 1], 1, _BYTES, True) for k in (0, 2)]
    return [unpack(a, b, 2, pairs, part) for a, b in (low, high) for part in (False, True)]


def _in_order(builder: Any, slots: Sequence[Any]) -> list[Any]:
    """The columns of `_interleaved`'s sums as they lie in memory: a transposition of 4 x 4 lanes."""
    a, b, c, d = (builder.load(slot) for slot in slots)
    found = []
    for lane in range(4):
        pair = [*range(4 * lane, 4 * lane + 4), *range(LANES + 4 * lane, LANES + 4 * lane + 4)]
        ab, cd = (builder.shuffle_vector(*two, ir.Constant(_INTS, pair + pair)) for two in ((a, b), (c, d)))
        found.append(builder.shuffle_vector(ab, cd, ir.Constant(_INTS, [*range(8), *range(LANES, LANES + 8)])))
    return found


def _updates(tokens: int, whole: bool) -> Any:
    """y_r[:64] += scale_r * sum over n of q[r, n] * w_n[:64] for quantised rows q.

    Arguments: y0, y1, y2, y3, w, bytes per row of w, number of rows, q, bytes per row of q, `end` of a row of q, columns (used unless
    `whole`: only so many of the 64 exist).
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        w, row_bytes, count, q, q_bytes, end, columns = args[4:]
        columns = None if whole else columns
        tokens_at = [builder.add(q, builder.mul(q_bytes, int_constant(r))) for r in range(tokens)]
        starts = [
            builder.load(pointer(builder, builder.add(at, builder.add(end, int_constant(4))), I32), align=4)
            for at in tokens_at
        ]
        slots = [make_accumulators(builder, [_spread(builder, start, _INTS)] * 4) for start in starts]
        last = builder.sub(count, int_constant(1))

        def body(group: Any) -> None:
            first, rows = builder.mul(group, int_constant(4)), []
            for k in range(4):
                n = builder.add(first, int_constant(k))
                n = builder.select(builder.icmp_signed("<", n, last), n, last)
                at = builder.add(w, builder.mul(n, row_bytes))
                rows.append(_unsigned(builder, _load(builder, at, columns)))
            mixed = _interleaved(builder, rows)
            for at, mine in zip(tokens_at, slots, strict=True):
                four = builder.load(pointer(builder, builder.add(at, first), I32), align=1)
                spread = _spread(builder, four, _INTS)
                for slot, part in zip(mine, mixed, strict=True):
                    _accumulate(builder, slot, part, spread)

        emit_loop(builder, builder.ashr(builder.add(count, int_constant(3)), int_constant(2)), body)
        for r, (at, mine) in enumerate(zip(tokens_at, slots, strict=True)):
            scale = splat_value(builder, builder.load(pointer(builder, builder.add(at, end), F32), align=4))
            for part, sums in enumerate(_in_order(builder, mine)):
                place = builder.add(args[r], int_constant(part * LANES * 4))
                left = None if columns is None else builder.sub(columns, int_constant(part * LANES))
                before = load_vector(builder, types.float32, place, left)
                after = fused(builder, builder.sitofp(sums, VEC), scale, before)
                store_vector(builder, types.float32, place, after, left)

    return operation(types.none, 11, emit)


def _larger(builder: Any, args: Any, kinds: Any) -> Any:
    size = emit_call(builder, "llvm.fabs.v16f32", VEC, [args[1]])
    return emit_call(builder, "llvm.maxnum.v16f32", VEC, [args[0], size])


def _store_bytes(builder: Any, args: Any, kinds: Any) -> None:
    narrow = builder.trunc(builder.fptosi(args[1], _INTS), ir.VectorType(I8, LANES))
    builder.store(narrow, pointer(builder, args[0], ir.VectorType(I8, LANES)), align=1)


def _of_ints(builder: Any, args: Any, kinds: Any) -> Any:
    return builder.sitofp(builder.bitcast(args[0], _INTS), VEC)


def _int_splat(builder: Any, args: Any, kinds: Any) -> Any:
    return builder.bitcast(_spread(builder, builder.trunc(args[0], I32), _INTS), VEC)


dots_4x4, dots_1x8, dots_1x4 = _dots(4, 4), _dots(1, 8), _dots(1, 4)
update_whole, update_part = _updates(4, True), _updates(4, False)
larger = operation(VECTOR, 2, _larger)  # max(a, |b|) of each lane
largest = operation(types.float32, 1, lambda b, args, kinds: emit_call(b, "llvm.vector.reduce.fmax.v16f32", F32, args))
nearest = operation(VECTOR, 1, lambda b, args, kinds: emit_call(b, "llvm.rint.v16f32", VEC, args))
store_bytes = operation(types.none, 2, _store_bytes)  # (address, vector of integers): sixteen int8
of_ints = operation(VECTOR, 1, _of_ints)  # the bits of sixteen int32 -> their values
int_splat = operation(VECTOR, 1, _int_splat)  # the bits of sixteen times an int32
