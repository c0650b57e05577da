"""Units of neurons of a call by tiles (shared ones, the compensation's rank, the experts), and the tokens that each is for.

`layer` and `s` are the tables of `numba_table`; a list is a count and token numbers, int32. Nothing checks bounds.
"""

import numpy as np

from moefication_cli.runtime.cpu import numba_table as slot
from moefication_cli.runtime.cpu import simd as v
from moefication_cli.runtime.cpu.numba_kernels import internal


@internal
def unit_at(s, u):
    """List of tokens, first row, number of neurons, whether they are the compensation's, of unit `u`."""
    layer, most = v.at(s, slot.LAYER), v.at(s, slot.UNIT)
    experts, shared = v.at(layer, slot.E), v.at(layer, slot.S)
    rank, each = v.at(layer, slot.C_RANK), v.at(layer, slot.N)
    of_shared, of_rank, of_expert = (shared + most - 1) // most, (rank + most - 1) // most, (each + most - 1) // most
    if u < of_shared:
        return experts, u * most, min(most, shared - u * most), False
    u -= of_shared
    if u < of_rank:
        return experts + 1, u * most, min(most, rank - u * most), True
    e, part = divmod(u - of_rank, of_expert)
    return e, shared + e * each + part * most, min(most, each - part * most), False


@internal
def count_of(s, which):
    """How many tokens list `which` has."""
    return v.get_i32(v.at(s, slot.LISTS) + v.at(s, slot.LIST_BYTES) * which)


@internal
def token_at(s, which, i):
    """The number of its token `i`."""
    return v.get_i32(v.at(s, slot.LISTS) + v.at(s, slot.LIST_BYTES) * which + 4 + 4 * i)


@internal
def list_tokens(s, which):
    """Writes the tokens of expert `which`; E: all but padding, for shared neurons; E + 1: those the compensation is for."""
    layer, tokens = v.at(s, slot.LAYER), v.at(s, slot.T)
    experts, kept = v.at(layer, slot.E), v.at(s, slot.KEPT)
    base, count = v.at(s, slot.LISTS) + v.at(s, slot.LIST_BYTES) * which, np.int64(0)
    on = v.at(s, slot.ON) + which * tokens
    for t in range(tokens):
        v.put_i32(base + 4 + 4 * count, t)
        if which < experts:
            count += np.int64(v.get_u8(on + t))
        else:
            here = v.get_i64(kept + 8 * t)
            count += here >= 0 and (which == experts or here < experts)
    v.put_i32(base, count)
    if which < experts and v.at(s, slot.COUNTS) != 0:
        v.atomic_add(v.at(s, slot.COUNTS) + 8 * which, count)
