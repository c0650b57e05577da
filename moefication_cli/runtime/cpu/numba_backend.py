"""The `numba` backend: a layer's tensors as a table of addresses, and one compiled call per forward pass.

CPU, float32 and bfloat16 (weights and inputs alike) and int8 weights with float32 inputs; every activation of
`weights.ACTIVATIONS`, every Router and Rule. Forward only.
Threads come from the OpenMP pool torch itself uses: a second pool (numba's own) would fight the first one for the cores.
Where torch's library offers no GOMP interface the call runs on one thread. Compiled code is cached beside the package.
"""

import ctypes
import struct
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.routing.router import Router, TwoLayerRouter
from moefication_cli.routing.rules import Rule, Threshold, TopK
from moefication_cli.runtime.cpu import bfloat16_paths
from moefication_cli.runtime.cpu import numba_forward as forward
from moefication_cli.runtime.cpu import numba_kernels as kernels
from moefication_cli.runtime.cpu import numba_table as slot
from moefication_cli.runtime.reference import check_form

ACTIVATION_CODES = {
    "relu": kernels.RELU,
    "relu2": kernels.RELU2,
    "gelu": kernels.GELU,
    "gelu_tanh": kernels.GELU_TANH,
    "quick_gelu": kernels.QUICK_GELU,
    "silu": kernels.SILU,
    "tanh": kernels.TANH,
    "identity": kernels.IDENTITY,
    "square": kernels.SQUARE,
}
DTYPES = (torch.float32, torch.bfloat16)
FEW_TOKENS = 2  # of int8 weights: up to here reading them takes the time, and tokens stay float32
SERIAL_WORK = 300_000  # multiply-adds of a call below which a second thread costs more than it brings
TOKENS_TO_SPLIT = 96  # from here on threads take tokens, below they take experts
TILED_TOKENS = 512  # of a bfloat16 call by tiles at most: the second step's sums stay in the second-level cache
# Fewer leave most of a tile empty; measured on a Sapphire Rapids (amx) and a Zen 4 (avx512_bf16, whose tiles have eight rows)
TILED_LEAST_TOKENS, TILED_LEAST_EXPERT = {"amx": 32, "avx512_bf16": 16}, 16
CHUNK_TOKENS = 512  # at most: a chunk reads the experts of its tokens once, and more of it leaves the cache
# Where another process holds one of the cores, a thread of the team waits for it, milliseconds long, while a decode step takes
# microseconds. A call that took a millisecond more than its arithmetic at 0.7 GFLOP/s per second is taken for such a case; the
# next 32 calls of few tokens run on one thread.
BUSY_SECONDS, BUSY_WORK_PER_SECOND, BUSY_CALLS = 1e-3, 0.7e9, 32


def activation_code(name: str) -> int:
    """The kernels' number of an activation. Raises UnavailableError for one they do not compute."""
    if name not in ACTIVATION_CODES:
        raise UnavailableError(f"backend numba does not know the activation {name!r}", "use --backend torch")
    return ACTIVATION_CODES[name]


@lru_cache(maxsize=1)
def openmp() -> tuple[int, int]:
    """Addresses of GOMP_parallel, in the OpenMP library torch has loaded, and of sched_yield; zeros where there is none."""
    found = []
    for name in ("GOMP_parallel", "sched_yield"):
        for path in [*map(str, sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))), None]:
            try:
                function = getattr(ctypes.CDLL(path), name)
            except (OSError, AttributeError, TypeError):
                continue
            found.append(ctypes.cast(function, ctypes.c_void_p).value or 0)
            break
        else:
            found.append(0)
    return found[0], found[1]


def kernels_for(dtype: torch.dtype) -> tuple[int, int]:
    """Addresses of the projection and of the piece for weights of `dtype`."""
    if dtype == torch.int8:
        from moefication_cli.runtime.cpu import numba_int8

        return numba_int8.project_int8.address, numba_int8.piece_int8.address
    if dtype == torch.float32:
        return kernels.project_float32.address, kernels.piece_float32.address
    from moefication_cli.runtime.cpu import numba_bfloat16  # compiled only where it is used

    return numba_bfloat16.project_bfloat16.address, numba_bfloat16.piece_bfloat16.address


class CompiledLayer:
    """A layer ready to be called: the address table and the tensors it points into.

    Without router and rule a call needs a selection; without one it computes what no selection touches: shared neurons, bias,
    compensation. Raises UnavailableError for weights the kernels cannot read. The table follows in-place changes of the
    weights; after the parameters' storage has been replaced (`.to(...)`) build a new one. `bfloat16_path` is one of
    `bfloat16_paths.PATHS`, None for `default_path()`; float32 weights have none.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        router: Router | None = None,
        rule: Rule | None = None,
        bfloat16_path: str | None = None,
        integer_dots: bool | None = None,
    ) -> None:
        """`integer_dots`: of int8 weights, whether more than FEW_TOKENS tokens are multiplied in integers (default: where the CPU can)."""
        ffn, fix = weights.ffn, weights.compensation
        stored, dtype = ffn.w_up_FD.dtype, ffn.dtype
        wide = (ffn.w_up_FD, ffn.w_down_FD) if ffn.w_gate_FD is None else (ffn.w_up_FD, ffn.w_down_FD, ffn.w_gate_FD)
        for tensor in wide:
            if tensor.device.type != "cpu" or tensor.dtype not in (*DTYPES, torch.int8) or tensor.dtype != stored:
                raise UnavailableError(
                    f"backend numba reads float32, bfloat16 or int8 on the CPU; a projection is {tensor.dtype} on {tensor.device}",
                    "use --backend torch",
                )
            if not tensor.is_contiguous():
                raise UnavailableError(
                    "backend numba needs neuron-major, contiguous projections", "use --backend torch"
                )
        self.weights, self.dtype, self.width = weights, dtype, ffn.d_model
        self._wide, self._kept = wide, list[Tensor]()
        table = np.zeros(slot.LAYER_SLOTS, np.int64)
        table[slot.W_UP], table[slot.W_DOWN] = ffn.w_up_FD.data_ptr(), ffn.w_down_FD.data_ptr()
        table[slot.W_GATE] = 0 if ffn.w_gate_FD is None else ffn.w_gate_FD.data_ptr()
        table[slot.B_UP], table[slot.B_GATE] = self._address(ffn.b_up_F), self._address(ffn.b_gate_F)
        table[slot.B_DOWN] = self._address(ffn.b_down_D)
        table[slot.D], table[slot.E] = ffn.d_model, weights.num_experts
        table[slot.N], table[slot.S] = weights.expert_size, weights.num_shared
        table[slot.ACT], table[slot.W_BYTES] = activation_code(ffn.activation), stored.itemsize
        table[slot.X_BYTES], table[slot.C_BYTES] = dtype.itemsize, dtype.itemsize
        if fix is not None:
            table[slot.CONSTANT] = self._address(fix.constant_D)
            if fix.w_in_RD is not None and fix.w_out_RD is not None:
                table[slot.C_IN], table[slot.C_OUT] = (
                    self._address(fix.w_in_RD, dtype),
                    self._address(fix.w_out_RD, dtype),
                )
                table[slot.C_RANK] = fix.w_in_RD.shape[0]
        active = float(weights.num_experts)
        table[slot.R_WIDTH] = weights.num_experts
        self.routed = router is not None and rule is not None
        if router is not None and rule is not None:
            if not isinstance(router, TwoLayerRouter) or not isinstance(rule, TopK | Threshold):
                raise UnavailableError(
                    f"backend numba does not select by a {router.form} router with the rule {rule.name}",
                    "give it the selection",
                )
            table[slot.R_IN], table[slot.R_OUT] = self._address(router.w_in_RD), self._address(router.w_out_ER)
            table[slot.R_B_IN], table[slot.R_B_OUT] = self._address(router.b_in_R), self._address(router.b_out_E)
            table[slot.R_WIDTH] = router.w_in_RD.shape[0]
            table[slot.R_ACT], table[slot.R_NORMALISE] = (
                activation_code(router.activation),
                int(router.normalise),
            )
            if isinstance(rule, TopK):
                table[slot.TOP_K] = active = rule.top_k
            else:
                table[slot.THRESHOLD] = struct.unpack("<q", struct.pack("<fi", rule.threshold, 0))[0]
        # Multiply-adds per token: what is always done, and per expert; the number of experts is learnt where only calls tell it
        self._always = weights.num_shared * ffn.flops_per_neuron + (0 if router is None else router.flops)
        self._per_expert = weights.expert_size * ffn.flops_per_neuron
        self._active = active
        table[slot.PROJECT], table[slot.PIECES] = kernels_for(stored)
        table[slot.C_PROJECT], table[slot.C_PIECES] = kernels_for(dtype)
        table[slot.ROUTE] = kernels.project_float32.address
        self.bfloat16_path = None
        if dtype == torch.bfloat16:
            self.bfloat16_path = bfloat16_path or bfloat16_paths.default_path()
            table[slot.PRODUCT : slot.END + 1] = bfloat16_paths.tile_functions(self.bfloat16_path)
            table[slot.BY_ROWS] = self.bfloat16_path == "avx512_bf16"
        self._tiled_least = sys.maxsize  # tokens of a call from which it goes by tiles
        if table[slot.PRODUCT] and max(weights.expert_size, weights.num_shared) >= TILED_LEAST_EXPERT:
            self._tiled_least = TILED_LEAST_TOKENS[str(self.bfloat16_path)]
        self._table = table
        self._layer = self._many = int(table.ctypes.data)  # address for few tokens, and for more
        if ffn.quantised:
            self._add_scales(ffn, integer_dots)
        self._parallel, give_way = openmp()
        self._functions = (forward.run.address, forward.run_chunks.address, self._parallel, give_way)
        self._serial_calls = 0

    def _add_scales(self, ffn: FFNWeights, integer_dots: bool | None) -> None:
        """Completes the table for int8 matrices, and makes a second one for tokens that are quantised as well."""
        from moefication_cli.runtime.cpu.simd_int8 import has_integer_dots

        table = self._table
        parts = (ffn.scale_up_F, ffn.scale_gate_F, ffn.scale_down_F)
        scales_3F = torch.stack(
            [ffn.w_up_FD.new_zeros(ffn.num_neurons, dtype=torch.float32) if p is None else p for p in parts]
        )
        table[slot.SCALES], table[slot.SCALE_BYTES] = self._address(scales_3F), 4 * ffn.num_neurons
        if not (has_integer_dots() if integer_dots is None else integer_dots):
            return
        from moefication_cli.runtime.cpu import numba_int8_dots as dots

        self._integer = table.copy()
        self._integer[slot.INTEGER], self._integer[slot.PIECES] = (
            dots.quantise_token.address,
            dots.piece_integer.address,
        )
        self._many = int(self._integer.ctypes.data)

    def _address(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """Where the tensor lies, contiguous and in `dtype`; converted copies (biases, small tensors) are kept alive here."""
        if tensor is None:
            return 0
        held = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        self._kept.append(held)
        return int(held.data_ptr())

    def __call__(
        self, x: Tensor, selected: Tensor | None = None, real_T: Tensor | None = None, counts_E: Tensor | None = None
    ) -> Tensor:
        """y of the shape of x [..., D], T tokens in all. Without `selected` the layer's router and rule select, or nothing is.

        `real_T` (bool, contiguous) is False at padding, whose rows of y are zero; `counts_E` (int64) is added the tokens
        each expert got. Raises ConfigError for a bad selection and where gradients are asked for.
        """
        if x.dtype != self.dtype or not x.is_cpu:
            raise UnavailableError(
                f"backend numba got {x.dtype} input on {x.device} for {self.dtype} weights on the CPU",
                "use --backend torch",
            )
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self._wide)):
            raise ConfigError("backend numba computes no gradients", "use torch.inference_mode(), or --backend torch")
        x = x.contiguous()
        y = torch.empty_like(x)
        num_tokens = x.numel() // self.width
        kind, k, address = slot.FROM_ROUTER, 0, 0
        if selected is not None:
            check_form(selected, num_tokens, self.weights.num_experts)
            kind, k = slot.FROM_MASK, selected.shape[1]
            if selected.dtype != torch.bool:
                kind, selected = slot.FROM_IDS, selected.long()
            selected = selected.contiguous()
            address = selected.data_ptr()
        elif not self.routed:
            kind = slot.FROM_NOTHING
        if num_tokens == 0:
            return y
        active = 0.0 if kind == slot.FROM_NOTHING else self._active
        work, threads, chunk = num_tokens * (self._always + active * self._per_expert), 1, 0
        if work >= SERIAL_WORK and self._parallel:
            threads = torch.get_num_threads()
        if num_tokens >= self._tiled_least:
            picked = self._by_tiles(x, y, num_tokens, kind, address, k, real_T, counts_E, threads)
            return self._checked(y, picked, num_tokens)
        if num_tokens >= TOKENS_TO_SPLIT:
            rounds = -(-num_tokens // (CHUNK_TOKENS * threads))
            chunk = -(-num_tokens // (rounds * threads))  # as many for every thread
        elif threads > 1 and self._serial_calls > 0:
            self._serial_calls -= 1
            threads = 1
        layer = self._layer if num_tokens <= FEW_TOKENS else self._many
        start = time.perf_counter()
        picked = forward.forward(
            layer, *self._functions, x.data_ptr(), y.data_ptr(), num_tokens, kind, address, k,
            0 if real_T is None else real_T.data_ptr(), 0 if counts_E is None else counts_E.data_ptr(), threads, chunk,
        )  # fmt: skip
        if threads > 1 and chunk == 0 and time.perf_counter() - start > BUSY_SECONDS + work / BUSY_WORK_PER_SECOND:
            self._serial_calls = BUSY_CALLS
        return self._checked(y, picked, num_tokens)

    def _by_tiles(
        self, x: Tensor, y: Tensor, num_tokens: int, kind: int, address: int, k: int,
        real_T: Tensor | None, counts_E: Tensor | None, threads: int,
    ) -> int:  # fmt: skip
        """`TILED_TOKENS` at a time; gives how many experts the tokens had together, or -1."""
        from moefication_cli.runtime.cpu import numba_tiled as tiled  # compiled only where it is used

        picked, rounds = 0, -(-num_tokens // TILED_TOKENS)
        step = -(-num_tokens // rounds)
        row = self.width * x.itemsize
        of_token = {slot.FROM_IDS: 8 * k, slot.FROM_MASK: self.weights.num_experts}.get(kind, 0)
        for first in range(0, num_tokens, step):
            here = tiled.forward_tiled(
                self._layer, tiled.run_tiled.address, *self._functions[2:], x.data_ptr() + first * row,
                y.data_ptr() + first * row, min(step, num_tokens - first), kind, address + first * of_token, k,
                0 if real_T is None else real_T.data_ptr() + first, 0 if counts_E is None else counts_E.data_ptr(), threads,
            )  # fmt: skip
            if here < 0:
                return -1
            picked += here
        return picked

    def _checked(self, y: Tensor, picked: int, num_tokens: int) -> Tensor:
        if picked < 0:
            raise ConfigError(f"selected expert id out of range: the layer has {self.weights.num_experts} experts")
        self._active += (picked / num_tokens - self._active) / 8
        return y


def compute(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """The backend's one-off form (see `runtime.reference` for the arguments). Raises ConfigError where gradients are asked for."""
    return CompiledLayer(weights)(x_TD, selected)
