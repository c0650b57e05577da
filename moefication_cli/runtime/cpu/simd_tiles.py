"""Products of bfloat16 tiles as LLVM IR: 16 x 32 of A times 32 x 16 of B, float32 sums, by AMX or by AVX512-BF16.

Both instructions multiply pairs: `tdpbf16ps` and `vdpbf16ps` add a0 b0 + a1 b1 to a float32. So all tiles of B hold pairs of
neighbouring rows: 32-bit element [p, c] is (B[2p, c], B[2p + 1, c]). A tile is 1024 bytes, its rows 64 bytes apart.

    A, one step of 32 columns    2048 bytes: rows 0 to 15, then rows 16 to 31
    B, one step of 32 rows       2048 bytes: columns 0 to 15, then columns 16 to 31
    C                            [32, 32] float32

The instructions flush subnormal numbers and round the sum of a pair once (Intel, Intrinsics Guide: `_tile_dpbf16ps`). AMX functions
use fixed tile registers, so nothing may run between `tiles_begin` and `tiles_end` on that thread that uses AMX too.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from moefication_cli.runtime.cpu.simd import I8, I16, I32, I64, LANES, VEC, emit_call, operation, pointer

PAIRS = ir.VectorType(I32, LANES)  # 16 pairs, or one row of a tile
LINE = ir.VectorType(I16, 2 * LANES)
TILE, STEP = 1024, 2048  # bytes
_VOID, _BYTE = ir.VoidType(), ir.IntType(8)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _int(value: int) -> Any:
    return ir.Constant(I64, value)


def _offset(builder: Any, address: Any, value: int) -> Any:
    return builder.add(address, _int(value)) if value else address


def _below(builder: Any, count: Any) -> Any:
    """Which of 32 bfloat16 lanes are less than `count`."""
    kind = ir.VectorType(I64, 2 * LANES)
    undef = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undef, count, ir.Constant(I32, 0))
    spread = builder.shuffle_vector(first, undef, ir.Constant(ir.VectorType(I32, 2 * LANES), [0] * (2 * LANES)))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(2 * LANES))), spread)


def _line(builder: Any, address: Any, count: Any) -> Any:
    """32 bfloat16, or the first `count` and zeros."""
    where = pointer(builder, address, LINE)
    if count is None:
        return builder.load(where, align=2)
    arguments = [where, ir.Constant(I32, 2), _below(builder, count), ir.Constant(LINE, None)]
    return emit_call(builder, "llvm.masked.load.v32i16.p0", LINE, arguments)


def _store_line(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address, value.type), align=64)


def _fetch(builder: Any, address: Any) -> None:
    """Asks for a line in the second-level cache."""
    arguments = [pointer(builder, address, I8), ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)]
    emit_call(builder, "llvm.prefetch.p0", _VOID, arguments)


def _interleave(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """(a0 b0 a1 b1 ...) of the lower halves, and of the upper."""
    lanes = a.type.count
    order = [i // 2 + lanes * (i % 2) for i in range(lanes)]
    kind = ir.VectorType(I32, lanes)
    low = builder.shuffle_vector(a, b, ir.Constant(kind, order))
    return low, builder.shuffle_vector(a, b, ir.Constant(kind, [i + lanes // 2 for i in order]))


def _transpose_rows(masked: bool) -> Any:
    """One tile of B = W^T: 32 columns of 16 rows of W, as pairs. Arguments: to, w, bytes per row, rows left (further ones repeat
    the last), bytes to a place in memory that will be needed soon, and, if `masked`, how many columns there are.
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        to, w, row_bytes, rows_left, ahead = args[:5]
        last = builder.sub(rows_left, _int(1))
        rows = []
        for r in range(LANES):
            index = builder.select(builder.icmp_signed("<", _int(r), last), _int(r), last)
            address = builder.add(w, builder.mul(index, row_bytes))
            _fetch(builder, builder.add(address, ahead))
            rows.append(builder.bitcast(_line(builder, address, args[5] if masked else None), PAIRS))
        for _ in range(4):  # four perfect shuffles of the rows are a transposition
            rows = [v for i in range(LANES // 2) for v in _interleave(builder, rows[i], rows[i + LANES // 2])]
        for r, row in enumerate(rows):
            _store_line(builder, _offset(builder, to, 64 * r), row)

    return operation(types.none, 5 + masked, emit)


def _pair_rows(masked: bool) -> Any:
    """One step of B = W: 32 columns of 32 rows of W, as pairs. Arguments as above; rows beyond `rows left` are zero."""

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        to, w, row_bytes, rows_left, ahead = args[:5]
        last = builder.sub(rows_left, _int(1))

        def line(r: int) -> Any:
            inside = builder.icmp_signed("<=", _int(r), last)
            address = builder.add(w, builder.mul(builder.select(inside, _int(r), last), row_bytes))
            _fetch(builder, builder.add(address, ahead))
            return builder.select(inside, _line(builder, address, args[5] if masked else None), ir.Constant(LINE, None))

        for p in range(LANES):
            low, high = _interleave(builder, line(2 * p), line(2 * p + 1))
            _store_line(builder, _offset(builder, to, 64 * p), low)
            _store_line(builder, _offset(builder, to, TILE + 64 * p), high)

    return operation(types.none, 5 + masked, emit)


def _gather_lines(masked: bool) -> Any:
    """One tile of A from 16 rows anywhere. Arguments: to, addresses of the rows, byte offset into each, and, if `masked`, how many
    columns there are.
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        to, addresses, offset = args[:3]
        for r in range(LANES):
            row = builder.load(pointer(builder, _offset(builder, addresses, 8 * r), I64))
            line = _line(builder, builder.add(row, offset), args[3] if masked else None)
            _store_line(builder, _offset(builder, to, 64 * r), line)

    return operation(types.none, 3 + masked, emit)


def _amx(builder: Any, name: str, *args: Any) -> None:
    emit_call(builder, f"llvm.x86.{name}", _VOID, [ir.Constant(_BYTE, a) if isinstance(a, int) else a for a in args])


def _begin(builder: Any, args: Any, kinds: Any) -> None:
    """Eight registers of 16 rows of 64 bytes: palette 1, then widths (16 bits each) from byte 16, rows from byte 48."""
    layout = bytes([1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)
    kind = ir.ArrayType(I8, 64)
    place = cgutils.alloca_once_value(builder, ir.Constant(kind, bytearray(layout)))
    _amx(builder, "ldtilecfg", builder.bitcast(place, I8.as_pointer()))


def _product_amx(rows: int) -> Any:
    """C (+)= A B for `rows` tiles of A (1 or 2), two of B. Arguments: a, b, c, steps, 1 to add to what C holds (else 0)."""

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        a, b, c, steps, add = args
        line, c_line = _int(64), _int(128)
        tiles = [(2 * m + n, m, n) for m in range(rows) for n in range(2)]

        def place(base: Any, offset: int) -> Any:
            return pointer(builder, _offset(builder, base, offset), I8)

        with builder.if_else(builder.icmp_signed("!=", add, _int(0))) as (then, otherwise):
            with then:
                for number, m, n in tiles:
                    _amx(builder, "tileloadd64", number, place(c, 2048 * m + 64 * n), c_line)
            with otherwise:
                for number, _, _ in tiles:
                    _amx(builder, "tilezero", number)
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, _int(STEP))
            a_now, b_now = builder.add(a, offset), builder.add(b, offset)
            for n in range(2):
                _amx(builder, "tileloadd64", 6 + n, place(b_now, TILE * n), line)
            for m in range(rows):
                _amx(builder, "tileloadd64", 4 + m, place(a_now, TILE * m), line)
            for number, m, n in tiles:
                _amx(builder, "tdpbf16ps", number, 4 + m, 6 + n)
        for number, m, n in tiles:
            _amx(builder, "tilestored64", number, place(c, 2048 * m + 64 * n), c_line)

    return operation(types.none, 5, emit)


def _dot_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    kind = ir.VectorType(_BFloat(), 2 * LANES)
    values = [total, builder.bitcast(a, kind), builder.bitcast(b, kind)]
    return emit_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VEC, values)


def _product_avx512(rows: int) -> Any:
    """The same for `rows` rows of A and C anywhere, with `vdpbf16ps`; always adds to what C holds. Arguments: addresses of A's rows,
    b, addresses of C's rows, steps, bytes from one step of A's rows to the next, byte offset into C's rows.
    """

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        a_rows, b, c_rows, steps, a_step, c_at = args

        def listed(rows_at: Any, r: int) -> Any:
            return builder.load(pointer(builder, _offset(builder, rows_at, 8 * r), I64))

        sources = [listed(a_rows, r) for r in range(rows)]
        places = [_offset(builder, builder.add(listed(c_rows, r), c_at), 64 * n) for r in range(rows) for n in range(2)]
        slots = [
            cgutils.alloca_once_value(builder, builder.load(pointer(builder, place, VEC), align=64)) for place in places
        ]
        with cgutils.for_range(builder, steps) as outer:
            a_offset = builder.mul(outer.index, a_step)
            b_step = builder.add(b, builder.mul(outer.index, _int(STEP)))
            with cgutils.for_range(builder, _int(LANES)) as inner:
                a_now = builder.add(a_offset, builder.mul(inner.index, _int(4)))
                b_now = builder.add(b_step, builder.mul(inner.index, _int(64)))
                columns = [
                    builder.load(pointer(builder, _offset(builder, b_now, TILE * n), PAIRS), align=64) for n in range(2)
                ]
                for r in range(rows):
                    pair = builder.load(pointer(builder, builder.add(sources[r], a_now), I32), align=2)
                    spread = _spread(builder, pair)
                    for n, column in enumerate(columns):
                        slot = slots[2 * r + n]
                        builder.store(_dot_pairs(builder, builder.load(slot), spread, column), slot)
        for place, slot in zip(places, slots, strict=True):
            builder.store(builder.load(slot), pointer(builder, place, VEC), align=64)

    return operation(types.none, 6, emit)


def _spread(builder: Any, pair: Any) -> Any:
    undef = ir.Constant(PAIRS, ir.Undefined)
    first = builder.insert_element(undef, pair, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, ir.Constant(PAIRS, [0] * LANES))


transpose_rows, transpose_rows_part = _transpose_rows(False), _transpose_rows(True)
pair_rows, pair_rows_part = _pair_rows(False), _pair_rows(True)
gather_lines, gather_lines_part = _gather_lines(False), _gather_lines(True)
tiles_begin = operation(types.none, 0, _begin)
tiles_end = operation(types.none, 0, lambda builder, args, kinds: _amx(builder, "tilerelease"))
product_amx_1, product_amx_2 = _product_amx(1), _product_amx(2)
product_avx512_8 = _product_avx512(8)
