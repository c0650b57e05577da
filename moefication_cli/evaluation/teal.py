"""`teal`: input sparsity, a peer without experts. Small inputs of all projections are set to zero, each with its threshold.

Source: TEAL (Liu et al., arXiv 2408.14690), sections 4.1 (thresholds by quantile of the magnitude) and 4.2 (Algorithm 1).
An input that is zero saves the multiply-adds of its column: those of x in gate and up, those of h in down. All matrices
of an FFN are equally large, so an FFN costs the mean over its projections of the share of inputs that are kept.

How the sparsity is divided: by the paper's greedy search within the FFN. From inputs as they are (what is zero already, as
after ReLU, costs nothing), the projection whose next step of 5 % of the FFN's cost loses least output on calibration
tokens takes it, until nothing is left; a budget is a point on that path, between two steps by interpolation. gate and up
have thresholds of their own on the same x. All layers get the same budget, as in the paper. The threshold of h is set on
what h is once x is sparse, so that the calibration tokens cost the budget. Ungated FFNs: up and down, likewise.

Not done here: the other linear layers, which TEAL thresholds as well, and its kernels: a mask over the dense FFN is computed, no
time is saved. Axes: T tokens, D model width, F neurons, P projections (gate where gated, up, down), C steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moefication_cli.config import Options, option
from moefication_cli.evaluation.selections import SelectionRow
from moefication_cli.ffn import ACTIVATIONS, FFNWeights
from moefication_cli.models.installed import FFNLayer
from moefication_cli.models.surgery import live_weights
from moefication_cli.runs.control import Control
from moefication_cli.runs.inputs import RunModel, layer_options, layer_seed, read_tokens
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

_THRESHOLD_TOKENS = 2048


@dataclass(frozen=True)
class TealConfig(Options):
    """What RUN/baseline/teal is made with."""

    step: float = option(0.05, "Share of the FFN's cost that a step of the search takes away", above=0, maximum=0.5)
    max_tokens: int = option(512, "Calibration tokens whose output error is compared", minimum=1)


class TealFFN:
    """The dense FFN whose inputs x and h are zero where their magnitude does not exceed the projection's threshold.

    `threshold_P`: of gate (where gated), up and down. Counts what real tokens keep since `count_selections`.
    """

    last_backend = "reference"

    def __init__(self, dense: FFNWeights, threshold_P: Sequence[float]) -> None:
        self.dense, self.threshold_P = dense, tuple(threshold_P)
        self.count_selections()

    def count_selections(self) -> None:
        """Starts counting, from zero."""
        self._kept_P = torch.zeros(len(self.threshold_P), dtype=torch.float64)
        self._tokens = 0

    @property
    def kept_P(self) -> Tensor:
        """Measured share of each projection's inputs that were kept; NaN before any token."""
        return self._kept_P / self._tokens if self._tokens else torch.full_like(self._kept_P, float("nan"))

    @property
    def active_fraction(self) -> float:
        """Measured share of the neurons that write: of down's inputs."""
        return float(self.kept_P[-1])

    @property
    def flops_fraction(self) -> float:
        """Measured multiply-adds relative to dense."""
        return float(self.kept_P.mean())

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]. Padding (`token_mask` [...] False) is computed like any token and not counted."""
        ffn, kept = self.dense, []

        def sparse(values: Tensor, threshold: float) -> Tensor:
            keep = values.abs() > threshold
            share = keep.float().mean(-1)
            kept.append(share.sum() if token_mask is None else share[token_mask].sum())
            return values * keep

        h = _hidden(ffn, [sparse(x.to(ffn.w_up_FD.dtype), threshold) for threshold in self.threshold_P[:-1]])
        y = sparse(h, self.threshold_P[-1]).to(ffn.w_down_FD.dtype) @ ffn.w_down_FD
        self._kept_P += torch.stack(kept).double().cpu()
        self._tokens += x[..., 0].numel() if token_mask is None else int(token_mask.sum())
        return (y if ffn.b_down_D is None else y + ffn.b_down_D).to(x.dtype)


def _hidden(ffn: FFNWeights, inputs: Sequence[Tensor]) -> Tensor:
    """h of the FFN whose gate (where gated) and up read inputs of their own, [..., D] each."""
    act, up = ACTIVATIONS[ffn.activation], functional.linear(inputs[-1], ffn.w_up_FD, ffn.b_up_F)
    return act(up) if ffn.w_gate_FD is None else act(functional.linear(inputs[0], ffn.w_gate_FD, ffn.b_gate_F)) * up


def magnitude_above(values: Tensor, share: float) -> float:
    """The threshold that at most this share of all entries' magnitudes exceeds, as nearly as ties allow; 0 keeps all but zeros."""
    entries = values.abs().flatten().float()
    below = len(entries) - round(min(max(share, 0.0), 1.0) * len(entries))
    if below == 0:
        return 0.0
    if entries.is_cuda:
        return float(entries.kthvalue(below).values)
    return float(np.partition(entries.numpy(), below - 1)[below - 1])  # torch's slows down by 10 where many are equal


def greedy_path(ffn: FFNWeights, x_TD: Tensor, step: float) -> Tensor:
    """kept_CP: the share of each projection's inputs that is kept, from all that are not zero down to none.

    Each row costs about `step` less (the mean over P) than the one before: Algorithm 1 of the paper, within one FFN.
    """
    count = 3 if ffn.gated else 2
    full_TD = ffn.hidden(x_TD) @ ffn.w_down_FD
    products: dict[tuple[int, float], Tensor] = {}  # of gate and up with x cut at a threshold: most are needed again

    def hidden(threshold_P: Sequence[float]) -> Tensor:
        weights = [(ffn.w_up_FD, ffn.b_up_F)]
        if ffn.w_gate_FD is not None:
            weights.insert(0, (ffn.w_gate_FD, ffn.b_gate_F))
        for p, (weight_FD, bias_F) in enumerate(weights):
            if (p, threshold_P[p]) not in products:
                cut_TD = x_TD * (x_TD.abs() > threshold_P[p])
                products[p, threshold_P[p]] = functional.linear(cut_TD, weight_FD, bias_F)
        parts = [products[p, threshold_P[p]] for p in range(len(weights))]
        h_TF = ACTIVATIONS[ffn.activation](parts[0])
        return h_TF * parts[1] if ffn.gated else h_TF

    @cache
    def cut(share: float) -> tuple[float, float]:
        """(threshold of x, share it keeps in truth)."""
        threshold = magnitude_above(x_TD, share)
        return threshold, float((x_TD.abs() > threshold).float().mean())

    def measured(wished_P: Sequence[float]) -> tuple[float, list[float]]:
        """(output error, shares kept in truth) where so much is wished."""
        inputs = [cut(share) for share in wished_P[:-1]]
        h_TF = hidden([threshold for threshold, _ in inputs])
        keep_TF = h_TF.abs() > magnitude_above(h_TF, wished_P[-1])
        error = float((full_TD - (h_TF * keep_TF) @ ffn.w_down_FD).square().sum())
        return error, [*(kept for _, kept in inputs), float(keep_TF.float().mean())]

    kept_P = measured([1.0] * count)[1]
    path = [kept_P]
    while max(kept_P) > 0:
        best: tuple[float, list[float]] | None = None
        for p, share in enumerate(kept_P):
            if share > 0:
                left = max(0.0, share - step * count)
                found = measured([*kept_P[:p], left if left > 1e-6 else 0.0, *kept_P[p + 1 :]])
                best = found if best is None or found[0] < best[0] else best
        assert best is not None
        kept_P = best[1]
        path.append(kept_P)
        # Thresholds only rise: products at lower ones are not needed again
        lowest = [cut(share)[0] for share in kept_P[:-1]]
        products = {key: value for key, value in products.items() if key[1] >= lowest[key[0]]}
    return torch.tensor(path)


def shares_at(kept_CP: Tensor, fraction: float) -> list[float]:
    """The shares to keep where the FFN may cost this fraction of dense: between two rows of `greedy_path`."""
    rows = kept_CP.tolist()
    costs = kept_CP.mean(1).tolist()
    if fraction >= costs[0]:
        return [1.0] * kept_CP.shape[1]
    for (high, low), (above, below) in zip(pairwise(costs), pairwise(rows), strict=True):
        if low <= fraction < high:
            part = (fraction - low) / (high - low)
            return [part * a + (1 - part) * b for a, b in zip(above, below, strict=True)]
    return list(rows[-1])


def thresholds_at(ffn: FFNWeights, kept_CP: Tensor, fraction: float, x_TD: Tensor) -> list[float]:
    """threshold_P at which these tokens cost `fraction` of the dense FFN, or less where zeros alone save more."""
    shares = shares_at(kept_CP, fraction)
    found = [magnitude_above(x_TD, share) for share in shares[:-1]]
    spent = sum(float((x_TD.abs() > threshold).float().mean()) for threshold in found)
    h_TF = _hidden(ffn, [x_TD * (x_TD.abs() > threshold) for threshold in found])
    return [*found, magnitude_above(h_TF, len(shares) * fraction - spent)]


def build_teal(run: RunDir, model: RunModel, control: Control) -> Artifact:
    """RUN/baseline/teal: the path of every layer's greedy search, from which any budget is taken."""
    activations, config = run.require("activations"), TealConfig()
    options = replace(layer_options(config, control, model, {"activations": activations}), only=None)
    with run.begin("baseline/teal", options) as work:
        for index in control.track(work.pending(), "TEAL", len(model.sites)):
            tokens = read_tokens(activations, index, config.max_tokens, layer_seed(control.seed, index))
            kept_CP = greedy_path(model.read_ffn(index), tokens.x_TD.to(model.device), config.step)
            work.save(index, {"kept_CP": kept_CP}, {}, metrics={"steps": len(kept_CP) - 1})
        work.finish()
    return run.read_stage("baseline/teal")


def teal_row(
    run: RunDir, model: RunModel, activations: Artifact, net: torch.nn.Module, fraction: float, control: Control
) -> SelectionRow:
    """TEAL at this fraction of the multiply-adds, on the weights of `net`."""
    stage = build_teal(run, model, control)
    layers: list[FFNLayer] = []
    for index, site in enumerate(model.sites):
        kept_CP = stage.read_layer(index)[0]["kept_CP"]
        tokens = read_tokens(activations, index, _THRESHOLD_TOKENS, layer_seed(control.seed, index))
        found = thresholds_at(model.read_ffn(index), kept_CP, fraction, tokens.x_TD.to(model.device))
        layers.append(TealFFN(live_weights(net, site), found))
    return SelectionRow("teal", "baseline", fraction, layers, meta={"rule": "threshold", "score": "magnitude"})
