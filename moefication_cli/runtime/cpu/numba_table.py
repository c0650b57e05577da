"""The two tables of int64 that the compiled forward pass works on: which entry is what.

The layer's table is filled once by `numba_backend`, the call's table by `numba_forward`. Axes: T tokens, D width, E experts, N neurons
per expert, S shared neurons, R router or compensation rank. The numbers are compiled in.
"""

# A layer: addresses of tensors (0 if absent), sizes, codes.
W_UP, W_GATE, W_DOWN, B_UP, B_GATE, B_DOWN, D, E, N, S, ACT, CONSTANT, C_IN, C_OUT, C_RANK = range(15)
R_IN, R_B_IN, R_OUT, R_B_OUT, R_WIDTH, R_ACT, R_NORMALISE, TOP_K, THRESHOLD, W_BYTES, PROJECT, PIECES, ROUTE = range(
    15, 28
)
# bfloat16 by tiles (`numba_tiled`): addresses of the product, and of what goes before and after it; 0 if the layer is not computed so
PRODUCT, BEGIN, END = range(28, 31)
# Of int8 matrices: scales [3, F] float32 (up, gate, down) and bytes per row of them; what quantises tokens too, or 0.
# The low-rank compensation has kernels of its own there: its matrices stay float32.
SCALES, SCALE_BYTES, INTEGER, X_BYTES, C_PROJECT, C_PIECES, C_BYTES = range(31, 38)
BY_ROWS = 38  # whether PRODUCT takes addresses of rows instead of tiles
LAYER_SLOTS = 39
# A call. ON is [E, T] bytes, KEPT [T] int64: how many experts the token has, or -1 at padding.
LAYER, X, Y, T, KIND, SELECTED, K, REAL, COUNTS, YIELD, TEAM, PIECE, CHUNK, RUN = range(14)
XF, ACC, ON, KEPT, Z, Z_BYTES, SCORES, SCORE_BYTES, SCRATCH, SCRATCH_BYTES, STATES = range(14, 25)
# bfloat16 by tiles: lists of tokens and their bytes, hidden activations, neurons of a unit, number of units, columns of an item
LISTS, LIST_BYTES, HIDDEN, UNIT, UNITS, COLUMNS = range(25, 31)
# Written by all threads, away from the entries above; PICKED counts the experts of all tokens.
ERROR, TICKET, PARTIALS, PICKED, NEXT, DONE = 32, 33, 34, 35, 40, 48
XQ, XQ_BYTES = (
    56,
    57,
)  # what the experts read: quantised tokens and bytes of each, or XF; read only, so behind the counters
CALL_SLOTS = 64
WIDEN, FIRST, SECOND, SELECT, EXPERTS, FINISH, LIST, QUANTISE = range(
    8
)  # steps; each has a counter at NEXT and one at DONE
FROM_ROUTER, FROM_IDS, FROM_MASK, FROM_NOTHING = range(4)  # KIND; the last: shared neurons only
