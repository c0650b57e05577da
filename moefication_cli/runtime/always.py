"""A converted layer without a router: its shared neurons run for every token, the rest never does.

What a budget chooses where routing would cost more than it saves. The dropped neurons are stood in for by the
compensation; this is static pruning with a better bias. Axes as in `ffn`.
"""

from torch import Tensor

from moefication_cli.ffn import ExpertWeights
from moefication_cli.runtime.portable import rows


class AlwaysFFN:
    """y = FFN of the first `num_shared` neurons (+ compensation). Padding is computed like any token."""

    last_backend = "torch"

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights

    @property
    def active_fraction(self) -> float:
        """Share of the neurons that run."""
        return self.weights.num_shared / self.weights.ffn.num_neurons

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]."""
        ffn, extra, kept = self.weights.ffn, self.weights.compensation, self.weights.num_shared
        head = rows(ffn, 0, kept)
        y = head.hidden(x) @ head.w_down_FD
        for bias_D in (ffn.b_down_D, None if extra is None else extra.constant_D):
            y = y if bias_D is None else y + bias_D
        if extra is not None and extra.w_in_RD is not None and extra.w_out_RD is not None:
            y = y + (x @ extra.w_in_RD.T) @ extra.w_out_RD
        return y
