"""Sixteen float32 at a time inside numba: one vector type and the few operations the kernels need, emitted as LLVM IR.

Why not plain loops: the kernels live on register blocking (16 accumulators of 16 lanes), masked tails and bfloat16
conversion in registers, which the loop vectoriser does not do reliably. LLVM lowers the same IR to AVX2 or NEON.
Addresses are int64 byte addresses and `tag` is a zero whose numba type says what lies there: float32, uint16 for bfloat16, or int8.
Nothing here checks bounds. Editing this file does not invalidate numba's cache of the kernels that use it: touch them too.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from platform import machine
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
F32, I16, I32, I64, I8 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.IntType(8)
VEC = ir.VectorType(F32, LANES)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Float32x16")


VECTOR = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VEC)


def operation(result: Any, arity: int, emit: Callable[..., Any]) -> Any:
    """An intrinsic of `arity` arguments of whatever type is at hand; `emit(builder, args, argtypes)` gives the value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = emit(builder, args, signature.args)
        return context.get_dummy_value() if value is None else value

    def typer(typingctx: Any, *args: Any) -> Any:
        return result(*args), codegen

    names = ["typingctx", *(f"a{i}" for i in range(arity))]  # numba folds call arguments by this signature
    typer.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
    return intrinsic(typer)


def constant(value: float | Sequence[int], kind: Any = VEC) -> Any:
    return ir.Constant(kind, [value] * LANES if not isinstance(value, Sequence) else list(value))


def _int_vector(value: int) -> Any:
    return ir.Constant(ir.VectorType(I32, LANES), [value] * LANES)


def element(tag: Any) -> Any:
    return F32 if tag == types.float32 else I8 if tag == types.int8 else I16


def item_bytes(tag: Any) -> int:
    return 4 if tag == types.float32 else 1 if tag == types.int8 else 2


def pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def emit_call(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _widen(builder: Any, raw: Any) -> Any:
    """bfloat16 bits -> float32: the upper half of the word. int8: the number."""
    if raw.type == ir.VectorType(I8, LANES):
        return builder.sitofp(builder.sext(raw, ir.VectorType(I32, LANES)), VEC)
    if raw.type == I16:
        return builder.bitcast(builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16)), F32)
    if raw.type == ir.VectorType(I16, LANES):
        wide = builder.zext(raw, ir.VectorType(I32, LANES))
        return builder.bitcast(builder.shl(wide, _int_vector(16)), VEC)
    return raw


def _narrow(builder: Any, tag: Any, value: Any) -> Any:
    """float32 -> the stored type; bfloat16 rounds to nearest even and keeps NaN."""
    if tag == types.float32:
        return value
    bits = builder.bitcast(value, ir.VectorType(I32, LANES))
    odd = builder.and_(builder.lshr(bits, _int_vector(16)), _int_vector(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _int_vector(0x7FFF))), _int_vector(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _int_vector(0x7FC0), rounded), ir.VectorType(I16, LANES))


def _lanes_below(builder: Any, count: Any) -> Any:
    lane = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    undef = ir.Constant(ir.VectorType(I64, LANES), ir.Undefined)
    first = builder.insert_element(undef, count, ir.Constant(I32, 0))
    spread = builder.shuffle_vector(first, undef, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))
    return builder.icmp_signed("<", lane, spread)


def splat_value(builder: Any, value: Any) -> Any:
    undef = ir.Constant(VEC, ir.Undefined)
    first = builder.insert_element(undef, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def load_vector(builder: Any, tag: Any, address: Any, count: Any = None) -> Any:
    """Sixteen float32 values of the type `tag` stands for; with `count` only that many are read and the rest is zero."""
    kind = ir.VectorType(element(tag), LANES)
    where, align = pointer(builder, address, kind), item_bytes(tag)
    if count is None:
        return _widen(builder, builder.load(where, align=align))
    name = f"llvm.masked.load.v16{'f32' if tag == types.float32 else f'i{8 * item_bytes(tag)}'}.p0"
    arguments = [where, ir.Constant(I32, align), _lanes_below(builder, count), ir.Constant(kind, None)]
    return _widen(builder, emit_call(builder, name, kind, arguments))


def store_vector(builder: Any, tag: Any, address: Any, value: Any, count: Any = None) -> None:
    """Writes sixteen values, or the first `count`, in the type `tag` stands for."""
    where, align = pointer(builder, address, ir.VectorType(element(tag), LANES)), 4 if tag == types.float32 else 2
    if count is None:
        builder.store(_narrow(builder, tag, value), where, align=align)
        return
    name = f"llvm.masked.store.v16{'f32' if tag == types.float32 else 'i16'}.p0"
    emit_call(
        builder,
        name,
        ir.VoidType(),
        [_narrow(builder, tag, value), where, ir.Constant(I32, align), _lanes_below(builder, count)],
    )


def sum_each(builder: Any, vectors: Sequence[Any]) -> Any:
    """Lane j of the result is the sum of vector j: a transposing tree of 15 additions."""
    level, width = list(vectors), LANES
    while len(level) > 1:
        half = len(level) // 2
        step = width // 2
        low, high = list[Any](), list[Any]()
        for group in range(LANES // width):
            for source in range(2):
                base = source * LANES + group * width
                low += range(base, base + step)
                high += range(base + step, base + width)
        pick = [ir.Constant(ir.VectorType(I32, LANES), order) for order in (low, high)]
        level = [
            builder.fadd(builder.shuffle_vector(a, b, pick[0]), builder.shuffle_vector(a, b, pick[1]))
            for a, b in zip(level[:half], level[half:], strict=True)
        ]
        width = step
    return level[0]


def _get(kind: Any) -> Callable[..., Any]:
    return lambda builder, args, kinds: builder.load(pointer(builder, args[0], kind))


def _put(kind: Any) -> Callable[..., Any]:
    def emit(builder: Any, args: Any, kinds: Any) -> None:
        builder.store(args[1], pointer(builder, args[0], kind))

    return emit


def _exp(builder: Any, x: Any) -> Any:
    """exp to 2 ulp over the float32 range: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2]."""
    x = emit_call(builder, "llvm.minnum.v16f32", VEC, [x, constant(88.0)])
    x = emit_call(builder, "llvm.maxnum.v16f32", VEC, [x, constant(-87.0)])
    n = emit_call(builder, "llvm.rint.v16f32", VEC, [builder.fmul(x, constant(1.4426950408889634))])
    r = fused(builder, n, constant(-0.693359375), x)
    r = fused(builder, n, constant(2.12194440e-4), r)
    poly = constant(1.0 / 720.0)
    for coefficient in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        poly = fused(builder, poly, r, constant(coefficient))
    power = builder.shl(builder.add(builder.fptosi(n, ir.VectorType(I32, LANES)), _int_vector(127)), _int_vector(23))
    return builder.fmul(poly, builder.bitcast(power, VEC))


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return emit_call(builder, "llvm.fma.v16f32", VEC, [a, b, c])


def _sigmoid(builder: Any, x: Any) -> Any:
    one = constant(1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, builder.fneg(x))))


def _gelu(builder: Any, x: Any) -> Any:
    """0.5 x (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7)."""
    z = builder.fmul(emit_call(builder, "llvm.fabs.v16f32", VEC, [x]), constant(0.7071067811865476))
    t = builder.fdiv(constant(1.0), fused(builder, z, constant(0.3275911), constant(1.0)))
    poly = constant(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = fused(builder, poly, t, constant(coefficient))
    tail = builder.fmul(builder.fmul(poly, t), _exp(builder, builder.fneg(builder.fmul(z, z))))  # 1 - erf(|z|)
    negative = builder.fcmp_ordered("<", x, constant(0.0))
    both = builder.select(negative, tail, builder.fsub(constant(2.0), tail))
    return builder.fmul(builder.fmul(x, constant(0.5)), both)


def _gelu_tanh(builder: Any, x: Any) -> Any:
    cubic = builder.fmul(x, fused(builder, builder.fmul(x, x), constant(0.044715), constant(1.0)))
    return builder.fmul(x, _sigmoid(builder, builder.fmul(cubic, constant(1.5957691216057308))))


def _tanh(builder: Any, x: Any) -> Any:
    twice = builder.fadd(x, x)
    return builder.fsub(builder.fmul(_sigmoid(builder, twice), constant(2.0)), constant(1.0))


def _unary(formula: Callable[[Any, Any], Any]) -> Any:
    return operation(VECTOR, 1, lambda builder, args, kinds: formula(builder, args[0]))


def _relu(builder: Any, x: Any) -> Any:
    """NaN stays NaN, as in torch."""
    return builder.select(builder.fcmp_ordered("<", x, constant(0.0)), constant(0.0), x)


def _atomic_add(builder: Any, args: Any, kinds: Any) -> Any:
    return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")


def _wait_for(builder: Any, args: Any, kinds: Any) -> None:
    """(address, least, sched_yield): spins until the int64 there is at least `least`; gives the core away after a while."""
    polls = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
    check, again, give, done = (builder.append_basic_block(name) for name in ("check", "again", "give", "done"))
    builder.branch(check)
    builder.position_at_end(check)
    now = builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)
    builder.cbranch(builder.icmp_signed(">=", now, args[1]), done, again)
    builder.position_at_end(again)
    count = builder.add(builder.load(polls), ir.Constant(I64, 1))
    builder.store(count, polls)
    if machine() in ("x86_64", "AMD64"):
        emit_call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
    patient = builder.icmp_signed("<", count, ir.Constant(I64, 2000))
    builder.cbranch(builder.or_(patient, builder.icmp_signed("==", args[2], ir.Constant(I64, 0))), check, give)
    builder.position_at_end(give)
    builder.call(pointer(builder, args[2], ir.FunctionType(I32, [])), [])
    builder.branch(check)
    builder.position_at_end(done)


def _call_parallel(builder: Any, args: Any, kinds: Any) -> None:
    """(GOMP_parallel, worker, data, threads): runs worker(data) in every thread of an OpenMP team."""
    byte, word = I8.as_pointer(), ir.IntType(32)
    function = pointer(builder, args[0], ir.FunctionType(ir.VoidType(), [byte, byte, word, word]))
    worker, data = builder.inttoptr(args[1], byte), builder.inttoptr(args[2], byte)
    builder.call(function, [worker, data, builder.trunc(args[3], word), ir.Constant(word, 0)])


def _calls(arity: int) -> Any:
    """(function address, `arity` int64): calls a C function that returns nothing."""

    def emit(builder: Any, args: Any, kinds: Any) -> None:
        function = pointer(builder, args[0], ir.FunctionType(ir.VoidType(), [I64] * arity))
        builder.call(function, args[1:])

    return operation(types.none, arity + 1, emit)


def _slot(builder: Any, args: Any) -> Any:
    return pointer(builder, builder.add(args[0], builder.shl(args[1], ir.Constant(I64, 3))), I64)


def _put_slot(builder: Any, args: Any, kinds: Any) -> None:
    builder.store(args[2], _slot(builder, args))


def _put_i32(builder: Any, args: Any, kinds: Any) -> None:
    builder.store(builder.trunc(args[1], I32), pointer(builder, args[0], I32))


def _total(builder: Any, args: Any, kinds: Any) -> Any:
    return builder.extract_element(sum_each(builder, [args[0]] * LANES), ir.Constant(I32, 0))


def _store_keys(builder: Any, args: Any, kinds: Any) -> None:
    """(address, vector): the int32 whose order is that of the float32."""
    bits = builder.bitcast(args[1], ir.VectorType(I32, LANES))
    flip = builder.and_(builder.ashr(bits, _int_vector(31)), _int_vector(0x7FFFFFFF))
    builder.store(builder.xor(bits, flip), pointer(builder, args[0], ir.VectorType(I32, LANES)), align=4)


def _count_at_least(builder: Any, args: Any, kinds: Any) -> Any:
    """(address, number of vectors, least): how many of the int32 are at least `least`."""
    kind = ir.VectorType(I32, LANES)
    least = splat_value(builder, builder.bitcast(builder.trunc(args[2], I32), F32))
    least = builder.bitcast(least, kind)
    total = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
    with cgutils.for_range(builder, args[1]) as loop:
        where = builder.add(args[0], builder.mul(loop.index, ir.Constant(I64, 4 * LANES)))
        found = builder.icmp_signed(">=", builder.load(pointer(builder, where, kind), align=4), least)
        ones = emit_call(builder, "llvm.ctpop.i16", I16, [builder.bitcast(found, I16)])
        builder.store(builder.add(builder.load(total), builder.zext(ones, I64)), total)
    return builder.load(total)


def _zero(builder: Any, args: Any, kinds: Any) -> Any:
    return constant(0.0)


load = operation(VECTOR, 2, lambda builder, args, kinds: load_vector(builder, kinds[0], args[1]))  # (tag, address)
# (tag, address, count): the first `count` lanes, zeros beyond
load_part = operation(VECTOR, 3, lambda builder, args, kinds: load_vector(builder, kinds[0], args[1], args[2]))
# (tag, address, vector) and (tag, address, vector, count)
store = operation(types.none, 3, lambda builder, args, kinds: store_vector(builder, kinds[0], args[1], args[2]))
store_part = operation(
    types.none, 4, lambda builder, args, kinds: store_vector(builder, kinds[0], args[1], args[2], args[3])
)
zero = operation(VECTOR, 0, _zero)
splat = operation(VECTOR, 1, lambda builder, args, kinds: splat_value(builder, args[0]))
fma = operation(VECTOR, 3, lambda builder, args, kinds: fused(builder, *args))  # a * b + c
add = operation(VECTOR, 2, lambda builder, args, kinds: builder.fadd(*args))
sub = operation(VECTOR, 2, lambda builder, args, kinds: builder.fsub(*args))
mul = operation(VECTOR, 2, lambda builder, args, kinds: builder.fmul(*args))
relu = _unary(_relu)
silu = _unary(lambda builder, x: builder.fmul(x, _sigmoid(builder, x)))
quick_gelu = _unary(lambda b, x: b.fmul(x, _sigmoid(b, b.fmul(x, constant(1.702)))))
gelu = _unary(_gelu)
gelu_tanh = _unary(_gelu_tanh)
tanh = _unary(_tanh)
store_keys = operation(types.none, 2, _store_keys)
count_at_least = operation(types.int64, 3, _count_at_least)
call_1, call_3, call_8, call_16 = _calls(1), _calls(3), _calls(8), _calls(16)
at = operation(types.int64, 2, lambda builder, args, kinds: builder.load(_slot(builder, args)))  # (table, slot)
put = operation(types.none, 3, _put_slot)  # (table, slot, value)
total = operation(types.float32, 1, _total)
put_i32 = operation(types.none, 2, _put_i32)
get_i32 = operation(types.int64, 1, lambda b, args, kinds: b.sext(b.load(pointer(b, args[0], I32)), I64))
get_i64 = operation(types.int64, 1, _get(I64))
put_i64 = operation(types.none, 2, _put(I64))
get_f32 = operation(types.float32, 1, _get(F32))
put_f32 = operation(types.none, 2, _put(F32))
get_u8 = operation(types.uint8, 1, _get(I8))
put_u8 = operation(types.none, 2, _put(I8))
atomic_add = operation(types.int64, 2, _atomic_add)
wait_for = operation(types.none, 3, _wait_for)
call_parallel = operation(types.none, 4, _call_parallel)
