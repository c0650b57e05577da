"""The `triton` backend: one layer, routing included; for a handful of tokens in five launches (four for one-layer routers).

Those read the rows of the experts that any of the tokens selected, once for every tile of 16 tokens, and nothing of the others.
Together many tokens select nearly all experts: they are sorted by expert (`triton_many`). Nothing waits for the GPU, so a call
can be captured in a CUDA graph. Axes as in `triton_kernels`, shapes as in `runtime.reference`.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import Router, TwoLayerRouter
from moefication_cli.routing.rules import Rule, Threshold, TopK
from moefication_cli.runtime.cuda import triton_kernels as kernels
from moefication_cli.runtime.cuda import triton_many
from moefication_cli.runtime.reference import selection_mask

MANY_TOKENS = 128  # from which they are sorted by expert
TOKENS = 16  # per tile, unless there is only one token: the least that tensor cores multiply


@dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces that one program computes, for a tile of that many tokens."""

    tokens: int
    hidden_rows: int
    hidden_block: int
    output_rows: int
    output_block: int
    most_splits: int = 16  # parts of the neurons in the last launch, added up by one program each
    programs: int = 8  # of the last launch for every multiprocessor: what the splits are for


# The fastest of those tried on an H200: tests/benchmarks/cuda.md
ONE, FEW = Tiles(1, 8, 512, 32, 128), Tiles(TOKENS, 32, 256, 32, 128)
UNITS_WITHOUT_GPU = 4  # multiprocessors that Triton's interpreter stands for


class TritonLayer:
    """A layer ready to be called; follows in-place changes of the weights.

    Without router and rule every call needs a selection. Raises UnavailableError for a router or rule whose scores these
    kernels do not compute.
    """

    def __init__(self, weights: ExpertWeights, router: Router | None = None, rule: Rule | None = None) -> None:
        ffn, fix = weights.ffn, weights.compensation
        if router is not None and not (isinstance(router, TwoLayerRouter) and isinstance(rule, TopK | Threshold)):
            named = "none" if rule is None else rule.name
            raise UnavailableError(
                f"backend triton does not select by a {router.form} router with the rule {named}",
                "give it the selection",
            )
        self.weights, self.router, self.rule = weights, router, rule
        self.dtype, self.width = ffn.w_up_FD.dtype, ffn.d_model
        self._rank = 0 if fix is None or fix.w_in_RD is None else len(fix.w_in_RD)
        device = ffn.w_up_FD.device
        self._cuda = device if device.type == "cuda" else None
        self._together = triton_many.group_size(weights)  # None: too odd a number of experts to be sorted by
        self._units = (
            torch.cuda.get_device_properties(device).multi_processor_count if self._cuda else UNITS_WITHOUT_GPU
        )

    def __call__(self, x: Tensor, selected: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]. Without `selected` the layer's router and rule select.

        Raises ConfigError for a bad selection and where gradients are asked for.
        """
        ffn, weights = self.weights.ffn, self.weights
        if torch.is_grad_enabled() and (x.requires_grad or ffn.w_up_FD.requires_grad):
            raise ConfigError("backend triton computes no gradients", "call it under torch.inference_mode()")
        x = x.contiguous()
        num_tokens = x.numel() // self.width
        if selected is not None:
            selected = selection_mask(selected, num_tokens, weights.num_experts)
        if num_tokens == 0:
            return torch.empty_like(x)
        # Triton launches on the current device, whatever the tensors are on
        with torch.cuda.device(self._cuda) if self._cuda is not None else nullcontext():
            if num_tokens >= MANY_TOKENS and self._together is not None:
                return self._many(x.view(num_tokens, self.width), selected, self._together).view(x.shape)
            return self._launch(x, num_tokens, selected)

    def _many(self, x_TD: Tensor, mask_TE: Tensor | None, together: int) -> Tensor:
        most = self.weights.num_experts
        if mask_TE is None:
            if not isinstance(self.router, TwoLayerRouter):
                raise ConfigError("a layer without a router needs a selection")
            mask_TE = triton_many.selection(x_TD, self.router, self.rule)
            most = self.rule.top_k if isinstance(self.rule, TopK) else most
        return triton_many.compute(x_TD, mask_TE, self.weights, together, most)

    def _launch(self, x: Tensor, T: int, mask_TE: Tensor | None) -> Tensor:
        weights, ffn, fix = self.weights, self.weights.ffn, self.weights.compensation
        D, F, S, E, N = ffn.d_model, ffn.num_neurons, weights.num_shared, weights.num_experts, weights.expert_size
        router = self.router if mask_TE is None else None
        if mask_TE is None and router is None:
            raise ConfigError("a layer without a router needs a selection")
        assert router is None or isinstance(router, TwoLayerRouter)
        sizes = ONE if T == 1 else FEW
        tiles, blocks = triton.cdiv(T, sizes.tokens), triton.cdiv(D, sizes.output_block)
        R, C, locks = 0 if router is None else router.width, self._rank, blocks * tiles
        z_TR = x.new_empty(T, max(1, R + C), dtype=torch.float32)
        counts = x.new_empty(T + locks + 2, dtype=torch.int32)  # tokens' experts, locks, the last lock, listed experts
        list_E = x.new_empty(E, dtype=torch.int32)
        none = x  # stands for tensors that are not there: never read
        c_in_RD = none if fix is None or fix.w_in_RD is None else fix.w_in_RD
        most = F
        if router is None:
            self._project(x, none, None, c_in_RD, z_TR, counts, (D, 0, C, D, locks + 2), "identity", False)
            assert mask_TE is not None
            how, scores_TE, k, threshold = "mask", z_TR, 0, 0.0
        else:
            sides = (D, R, C, D, locks + 2)
            self._project(
                x, router.w_in_RD, router.b_in_R, c_in_RD, z_TR, counts, sides, router.activation, router.normalise
            )
            scores_TE = z_TR
            if router.w_out_ER is not None:
                scores_TE = z_TR.new_empty(T, E)
                sides = (R, E, 0, z_TR.shape[1], locks + 2)
                self._project(z_TR, router.w_out_ER, router.b_out_E, none, scores_TE, counts, sides, "identity", False)
            mask_TE = z_TR.new_empty(T, E, dtype=torch.int8)
            how, k, threshold = triton_many.how_selected(self.rule)
            if how == "top_k":
                most = min(F, S + T * k * N)
        kernels.select[(T,)](
            scores_TE, mask_TE, list_E, counts, T, E, k, scores_TE.shape[1], threshold, locks,
            RULE=how, LIST=True, BLOCK=triton.next_power_of_2(E),
        )  # fmt: skip
        h_TF = x.new_empty(T, F, dtype=ffn.w_down_FD.dtype)
        kernels.hidden[(triton.cdiv(most, sizes.hidden_rows), tiles)](
            x, mask_TE, list_E, ffn.w_up_FD, none if ffn.w_gate_FD is None else ffn.w_gate_FD,
            none if ffn.b_up_F is None else ffn.b_up_F, none if ffn.b_gate_F is None else ffn.b_gate_F, h_TF, counts,
            T, D, F, S, N, E, locks,
            ACT=ffn.activation, GATED=ffn.gated, BIAS_UP=ffn.b_up_F is not None, BIAS_GATE=ffn.b_gate_F is not None,
            TOKENS=sizes.tokens, ROWS=sizes.hidden_rows, BLOCK=min(sizes.hidden_block, triton.next_power_of_2(D)),
        )  # fmt: skip
        wanted = min(
            sizes.most_splits, sizes.programs * self._units // (blocks * tiles), triton.cdiv(F, sizes.output_rows)
        )
        splits = 1 << max(0, wanted.bit_length() - 1)  # a power of two: few versions to compile
        part = z_TR if splits == 1 else x.new_empty(splits * T * D, dtype=torch.float32)
        y = torch.empty_like(x)
        constant_D = none if fix is None or fix.constant_D is None else fix.constant_D
        c_out_RD = none if fix is None or fix.w_out_RD is None else fix.w_out_RD
        kernels.output[(blocks, splits, tiles)](
            h_TF, list_E, ffn.w_down_FD, z_TR, constant_D, c_out_RD, none if ffn.b_down_D is None else ffn.b_down_D, part,
            counts, y, T, D, F, S, N, E, R, C, z_TR.shape[1], locks,
            BIAS=ffn.b_down_D is not None, CONSTANT=constant_D is not none, RANK=C > 0, SPLITS=splits,
            TOKENS=sizes.tokens, ROWS=sizes.output_rows, BLOCK=sizes.output_block,
        )  # fmt: skip
        return y

    def _project(
        self, x: Tensor, w_RD: Tensor, b_R: Tensor | None, c_CD: Tensor, z_TR: Tensor, counts: Tensor,
        sides: tuple[int, int, int, int, int], act: str, normalise: bool,
    ) -> None:  # fmt: skip
        """z_TR of `x`; `sides`: width of a row, rows of the router and of the compensation, stride of x, locks."""
        D, R, C, stride, locks = sides
        rows = max(1, min(8, triton.next_power_of_2(triton.cdiv(R + C, 256))))
        kernels.project[(max(1, triton.cdiv(R + C, rows)), len(z_TR))](
            x, w_RD, x if b_R is None else b_R, c_CD, z_TR, counts, D, R, C, stride, z_TR.shape[1], locks,
            ACT=act, NORMALISE=normalise, BIAS=b_R is not None, EXTRA=C > 0, ROWS=rows,
            BLOCK=min(1024, triton.next_power_of_2(D)), LOCKS=triton.next_power_of_2(locks),
        )  # fmt: skip


def compute(x_TD: Tensor, selected: Tensor, weights: ExpertWeights) -> Tensor:
    """y_TD of given selections (see `runtime.reference`): the one-off form of `TritonLayer`."""
    return TritonLayer(weights)(x_TD, selected)
