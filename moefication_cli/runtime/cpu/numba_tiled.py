"""The compiled forward pass in bfloat16 where the processor multiplies bfloat16 itself: router and selection as in `numba_forward`.

Neurons are cut into units: shared ones, the compensation's rank, the experts. Two steps, shared by the threads of one team:
hidden     a unit's 32 neurons for all its tokens: h = act(x W_up^T), rounded to bfloat16 once;
outputs    some columns of y for all units: y += h W_down in float32. Every thread owns its columns, so sums need no locks and
           are the same bytes for any number of threads.
A selected weight is read once per call, rearranged into tiles as it comes (`simd_tiles`) and while the next unit's is on its way
to the cache; weights are kept as they are. x and h are bfloat16, all sums float32. Products by rows (AVX512-BF16) read tokens where
they lie and add to rows of y directly; AMX needs both as tiles.
Functions take int64 addresses; `layer` and `s` are the tables of `numba_table`, whose axes hold here too. Nothing checks bounds.
"""

from pathlib import Path

import numpy as np

from moefication_cli.compiled import cached_cfunc, cached_njit
from moefication_cli.runtime.cpu import numba_table as slot
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu import simd_tiles as tile
from moefication_cli.runtime.cpu.numba_kernels import F32, IDENTITY, activate, internal
from moefication_cli.runtime.cpu.numba_routing import (
    aligned,
    describe_call,
    done,
    place_routing,
    route_and_select,
    take,
    wait,
    widen,
    work_together,
)
from moefication_cli.runtime.cpu.numba_units import count_of, list_tokens, token_at, unit_at

HERE = Path(__file__).parent

BF16 = np.uint16(0)
MOST_NEURONS = 256  # of a unit
# Of an item of the second step: the float32 sums of 512 tokens are 1 MiB and 0.5 MiB, half of the second-level cache of processors
# with AMX, and of Zen 4
MOST_COLUMNS, MOST_COLUMNS_BY_ROWS = 512, 256


@internal
def _columns_of(to, w, row_bytes, n, width, ahead):
    """32 rows of W (`n` there are) as tiles of B = W^T, all `width` columns."""
    for c in range(0, width, 32):
        where, half = to + 64 * c, w + 2 * c
        for side in range(2):
            left = n - 16 * side
            row = half + (16 * side * row_bytes if left > 0 else 0)
            if width - c >= 32:
                tile.transpose_rows(where + tile.TILE * side, row, row_bytes, max(left, 1), ahead)
            else:
                tile.transpose_rows_part(where + tile.TILE * side, row, row_bytes, max(left, 1), ahead, width - c)


@internal
def _gather(to, rows, m, width):
    """Up to 32 rows of x as tiles of A."""
    for c in range(0, width, 32):
        for side in range(2 if m > 16 else 1):
            where, listed = to + 64 * c + tile.TILE * side, rows + 128 * side
            if width - c >= 32:
                tile.gather_lines(where, listed, 2 * c)
            else:
                tile.gather_lines_part(where, listed, 2 * c, width - c)


@internal
def _fill(c, m, bias, n):
    """C [32, 32]: the bias in every row, zero beyond `n`."""
    low, high = v.zero(), v.zero()
    if bias != 0:
        low, high = v.load_part(F32, bias, min(n, 16)), v.load_part(F32, bias + 64, max(0, min(n - 16, 16)))
    for r in range(m):
        v.store(F32, c + 128 * r, low)
        v.store(F32, c + 128 * r + 64, high)


@internal
def _list_rows(to, first, row_bytes):
    """Addresses of 32 rows, for products by rows."""
    for r in range(32):
        v.put_i64(to + 8 * r, first + row_bytes * r)


@internal
def _first_weight(s, u):
    """Where the up-projection of unit `u` begins."""
    layer = v.at(s, slot.LAYER)
    _, first, _, rank = unit_at(s, u)
    return v.at(layer, slot.C_IN if rank else slot.W_UP) + 2 * v.at(layer, slot.D) * first


@internal
def _hidden(s, item, scratch):
    """act(...) of 32 neurons of a unit, into HIDDEN as tiles of A."""
    layer, parts = v.at(s, slot.LAYER), v.at(s, slot.UNIT) // 32
    u, part = divmod(item, parts)
    which, first, n, rank = unit_at(s, u)
    count, first, n = count_of(s, which), first + 32 * part, min(32, n - 32 * part)
    if count == 0 or n <= 0:
        return
    width, padded = v.at(layer, slot.D), (v.at(s, slot.T) + 31) // 32 * 32
    steps, row_bytes = (width + 31) // 32, 2 * width
    gated = v.at(layer, slot.W_GATE) != 0 and not rank
    w = v.at(layer, slot.C_IN if rank else slot.W_UP) + row_bytes * first
    code = IDENTITY if rank else v.at(layer, slot.ACT)
    bias = 0 if rank or v.at(layer, slot.B_UP) == 0 else v.at(layer, slot.B_UP) + 4 * first
    b_gate = 0 if not gated or v.at(layer, slot.B_GATE) == 0 else v.at(layer, slot.B_GATE) + 4 * first
    by_rows = v.at(layer, slot.BY_ROWS) != 0
    direct = by_rows and width % 32 == 0  # tokens are read where they are
    rows = scratch
    a_rows, h_rows = rows + 8 * 32, rows + 2 * 8 * 32
    h = aligned(rows + 3 * 8 * 32)
    g = h + 4096
    a = g + 4096
    b = a + tile.STEP * steps
    b2 = b + tile.STEP * steps
    _list_rows(a_rows, a, 64)
    _list_rows(h_rows, h, 128)
    ahead, following = np.int64(0), item + v.at(s, slot.TEAM)  # the next item of this thread, if they take turns
    if following < v.at(s, slot.UNITS) * parts:
        after, next_part = divmod(following, parts)
        if count_of(s, unit_at(s, after)[0]) > 0:
            ahead = _first_weight(s, after) + 32 * row_bytes * next_part - w
    _columns_of(b, w, row_bytes, n, width, ahead)
    if gated:
        _columns_of(b2, v.at(layer, slot.W_GATE) + row_bytes * first, row_bytes, n, width, ahead)
    for start in range(0, count, 32):
        m = min(32, count - start)
        for i in range(32):
            v.put_i64(rows + 8 * i, v.at(s, slot.X) + row_bytes * token_at(s, which, start + min(i, m - 1)))
        if not direct:
            _gather(a, rows, m, width)
        _fill(h, (m + 15) // 16 * 16, bias, n)
        if gated:
            _fill(g, (m + 15) // 16 * 16, b_gate, n)
        if by_rows:
            source, a_step = (rows, 64) if direct else (a_rows, tile.STEP)
            v.call_8(v.at(layer, slot.PRODUCT), source, b, h_rows, steps, m, a_step, 0, 0)
            if gated:
                v.call_8(v.at(layer, slot.PRODUCT), source, b2, h_rows, steps, m, a_step, g - h, 0)
        else:
            v.call_8(v.at(layer, slot.PRODUCT), a, b, h, steps, m, 1, 0, 0)
            if gated:
                v.call_8(v.at(layer, slot.PRODUCT), a, b2, g, steps, m, 1, 0, 0)
        out = v.at(s, slot.HIDDEN) + 2 * v.at(s, slot.UNIT) * (u * padded + start) + tile.STEP * part
        for r in range(m):
            for side in range(2):
                lanes, at = max(0, min(16, n - 16 * side)), 128 * r + 64 * side
                value = v.load_part(F32, h + at, lanes)
                if gated:
                    value = v.mul(value, activate(code, v.load_part(F32, g + at, lanes)))
                else:
                    value = activate(code, value)
                v.store(BF16, out + 64 * r + 32 * side, value)


@internal
def _rows_of(to, w, row_bytes, n, width, ahead):
    """`n` rows of W as tiles of B = W, `width` columns: for every 32 columns all steps of 32 rows."""
    steps = (n + 31) // 32
    for k in range(steps):
        for c in range(0, width, 32):
            where, place = to + tile.STEP * (c // 32 * steps + k), w + 32 * k * row_bytes + 2 * c
            if width - c >= 32:
                tile.pair_rows(where, place, row_bytes, n - 32 * k, ahead)
            else:
                tile.pair_rows_part(where, place, row_bytes, n - 32 * k, ahead, width - c)


@internal
def _sum_units(s, first, columns, padded, y, scratch):
    """y [T, padded] (float32) += the down-projection's columns from `first` of all units."""
    layer, row_bytes = v.at(s, slot.LAYER), 2 * v.at(v.at(s, slot.LAYER), slot.D)
    of_unit = 2 * v.at(s, slot.UNIT) * ((v.at(s, slot.T) + 31) // 32 * 32)
    c = scratch
    a_rows, y_rows = c + 4096, c + 4096 + 8 * 32
    b = aligned(y_rows + 8 * 32)
    nobody = y + 4 * padded * v.at(s, slot.T)
    for u in range(v.at(s, slot.UNITS)):
        which, row, n, rank = unit_at(s, u)
        count, steps = count_of(s, which), (n + 31) // 32
        if count == 0:
            continue
        w = v.at(layer, slot.C_OUT if rank else slot.W_DOWN) + row_bytes * row + 2 * first
        ahead = np.int64(0)
        if u + 1 < v.at(s, slot.UNITS):
            after, next_row, _, next_rank = unit_at(s, u + 1)
            if count_of(s, after) > 0 and next_rank == rank:
                ahead = row_bytes * (next_row - row)
        _rows_of(b, w, row_bytes, n, columns, ahead)
        for start in range(0, count, 32):
            m, a = min(32, count - start), v.at(s, slot.HIDDEN) + of_unit * u + 2 * v.at(s, slot.UNIT) * start
            if v.at(layer, slot.BY_ROWS) != 0:
                _list_rows(a_rows, a, 64)
                for r in range(32):
                    v.put_i64(y_rows + 8 * r, y + 4 * padded * token_at(s, which, start + r) if r < m else nobody)
                for at in range(0, padded, 32):
                    step = b + tile.STEP * (at // 32 * steps)
                    v.call_8(v.at(layer, slot.PRODUCT), a_rows, step, y_rows, steps, m, tile.STEP, 4 * at, 0)
                continue
            for at in range(0, padded, 32):
                v.call_8(v.at(layer, slot.PRODUCT), a, b + tile.STEP * (at // 32 * steps), c, steps, m, 0, 0, 0)
                for r in range(m):
                    out = y + 4 * (padded * token_at(s, which, start + r) + at)
                    v.store(F32, out, v.add(v.load(F32, out), v.load(F32, c + 128 * r)))
                    v.store(F32, out + 64, v.add(v.load(F32, out + 64), v.load(F32, c + 128 * r + 64)))


@internal
def _outputs(s, item, scratch):
    """Some columns of y for all tokens: the units' sum, the bias, the compensation; zero at padding."""
    layer, tokens = v.at(s, slot.LAYER), v.at(s, slot.T)
    width, first = v.at(layer, slot.D), item * v.at(s, slot.COLUMNS)
    columns = min(v.at(s, slot.COLUMNS), width - first)
    padded = (columns + 31) // 32 * 32
    constant, bias = v.at(layer, slot.CONSTANT), v.at(layer, slot.B_DOWN)
    y = scratch
    for at in range(0, (tokens + 1) * padded, 16):
        v.store(F32, y + 4 * at, v.zero())
    _sum_units(s, first, columns, padded, y, aligned(y + 4 * (tokens + 1) * padded))
    for t in range(tokens):
        kept = v.get_i64(v.at(s, slot.KEPT) + 8 * t)
        for c in range(0, columns, 16):
            lanes, value = min(16, columns - c), v.load(F32, y + 4 * (t * padded + c))
            if kept >= 0 and bias != 0:
                value = v.add(value, v.load_part(F32, bias + 4 * (first + c), lanes))
            if kept >= 0 and kept < v.at(layer, slot.E) and constant != 0:
                value = v.add(value, v.load_part(F32, constant + 4 * (first + c), lanes))
            v.store_part(BF16, v.at(s, slot.Y) + 2 * (t * width + first + c), value, lanes)


@internal
def _arrange(s, base):
    """Places the buffers of a call behind `base`; gives the end."""
    layer, tokens = v.at(s, slot.LAYER), v.at(s, slot.T)
    width, experts, team = v.at(layer, slot.D), v.at(layer, slot.E), v.at(s, slot.TEAM)
    padded = (tokens + 31) // 32 * 32
    v.put(s, slot.XF, aligned(base))
    end = aligned(v.at(s, slot.XF) + (4 * tokens * width if v.at(s, slot.KIND) == slot.FROM_ROUTER else 0))
    end = place_routing(s, end)
    v.put(s, slot.LISTS, end)
    v.put(s, slot.LIST_BYTES, aligned(4 * (tokens + 2)))
    end += v.at(s, slot.LIST_BYTES) * (experts + 2)
    v.put(s, slot.HIDDEN, end)
    end = aligned(end + 2 * v.at(s, slot.UNIT) * padded * v.at(s, slot.UNITS))
    steps, columns = (width + 31) // 32, v.at(s, slot.COLUMNS)
    first = 3 * 8 * 32 + 64 + 2 * 4096 + 3 * tile.STEP * steps
    second = 4 * (tokens + 1) * columns + 2 * 64 + 4096 + 2 * 8 * 32 + 2 * columns * v.at(s, slot.UNIT)
    each = aligned(max(max(first, second), 4 * (experts + 32)) + 64)
    v.put(s, slot.SCRATCH, end)
    v.put(s, slot.SCRATCH_BYTES, each)
    return end + team * each


@cached_cfunc(HERE, "void(int64)", error_model="numpy")
def run_tiled(s):
    """All steps for the tokens of `s`, alone or as one thread of its team."""
    layer = v.at(s, slot.LAYER)
    width, experts = v.at(layer, slot.D), v.at(layer, slot.E)
    scratch = v.at(s, slot.SCRATCH) + v.at(s, slot.SCRATCH_BYTES) * v.atomic_add(s + 8 * slot.TICKET, 1)
    if v.at(s, slot.KIND) == slot.FROM_ROUTER:
        widen(s)
    route_and_select(s, scratch)
    while True:
        which = take(s, slot.LIST, 1)
        if which >= experts + 2:
            break
        list_tokens(s, which)
        done(s, slot.LIST, 1)
    wait(s, slot.LIST, experts + 2)
    v.call_1(v.at(layer, slot.BEGIN), 0)
    total = v.at(s, slot.UNITS) * (v.at(s, slot.UNIT) // 32)
    while True:
        item = take(s, slot.EXPERTS, 1)
        if item >= total:
            break
        _hidden(s, item, scratch)
        done(s, slot.EXPERTS, 1)
    wait(s, slot.EXPERTS, total)
    while True:
        item = take(s, slot.FINISH, 1)
        if item >= (width + v.at(s, slot.COLUMNS) - 1) // v.at(s, slot.COLUMNS):
            break
        _outputs(s, item, scratch)
    v.call_1(v.at(layer, slot.END), 0)


@cached_njit(HERE, "int64(" + ", ".join(["int64"] * 13) + ")", nogil=True, error_model="numpy")
def forward_tiled(layer, worker, parallel, give_way, x, y, tokens, kind, selected, k, real, counts, threads):
    """`numba_forward.forward` for the few hundred tokens at once that its two steps are for, x and y bfloat16."""
    state = np.zeros(slot.CALL_SLOTS, np.int64)
    s = np.int64(state.ctypes.data)
    describe_call(s, layer, give_way, x, y, tokens, kind, selected, k, real, counts, threads)
    each, shared, rank, width = v.at(layer, slot.N), v.at(layer, slot.S), v.at(layer, slot.C_RANK), v.at(layer, slot.D)
    unit = min(MOST_NEURONS, ((each if each > 0 else shared) + 31) // 32 * 32)
    units = (shared + unit - 1) // unit + (rank + unit - 1) // unit + v.at(layer, slot.E) * ((each + unit - 1) // unit)
    v.put(s, slot.UNIT, unit)
    v.put(s, slot.UNITS, units)
    most = MOST_COLUMNS_BY_ROWS if v.at(layer, slot.BY_ROWS) != 0 else MOST_COLUMNS
    items = (width + most - 1) // most
    items = (items + threads - 1) // threads * threads  # as many for every thread
    v.put(s, slot.COLUMNS, ((width + items - 1) // items + 31) // 32 * 32)
    scratch = np.empty(_arrange(s, 0) // 8 + 32, np.int64)
    _arrange(s, np.int64(scratch.ctypes.data))
    work_together(parallel, worker, s, threads)
    scratch[0] = 0  # keeps it alive until here
    return state[slot.PICKED] if state[slot.ERROR] == 0 else -1
