"""A converted layer whose selection can be learned: what end-to-end refinement trains, and nothing runs in production.

Every neuron is computed; an expert's contribution is multiplied by a gate that is 0 or 1 going forward and
sigmoid(z / temperature) going backward (straight-through, Bengio et al. 2013, arXiv 1308.3432), with z = (score -
threshold) / spread of the scores. Under a fixed k the threshold is each token's own, half way between its k-th score and
the next. The router and the compensation learn, and the FFN's weights where they require a gradient (fine-tuning) or
`adapted` makes them of adapters.
Axes as in `ffn`; T is the real tokens of a call.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.routing.router import Router
from moefication_cli.routing.rules import Threshold, TopK, as_mask

_TEMPERATURE = 0.3
_NEAR = 0.25  # |z| of the scores that tell how fast the active share moves with the threshold


class StraightThroughMoEFFN:
    """Stands in for an FFN like `layer.MoEFFN`, with a threshold, a fixed k, or without a router (its shared neurons run).

    Without `constant` no correction is learned where `weights` have none. `as_dense` makes a call compute the whole FFN.
    `shift` raises the threshold, in units of `spread`, the standard deviation of the scores; nothing shifts a fixed k. After a
    call `active` is the share of the neurons that ran per real token, differentiable where gradients are on, and `density` how
    much of it one unit of `shift` takes away.
    """

    def __init__(
        self, weights: ExpertWeights, router: Router | None, rule: Threshold | TopK, constant: bool = True
    ) -> None:
        self.weights = replace(weights, compensation=None)
        self.adapted: Callable[[], FFNWeights] | None = (
            None  # the FFN's weights, where they are more than its parameters
        )
        self.form, self.rule = router, rule
        self.as_dense, self.shift, self.density = False, 0.0, 0.0
        self.spread = 0.0  # measured on the first call
        share = weights.num_shared / weights.ffn.num_neurons
        self.active: Tensor = torch.full((), share, device=weights.ffn.w_up_FD.device)
        extra = weights.compensation or Compensation()
        named = {} if router is None else dict(router.tensors())
        named |= {f"extra.{k}": v for k, v in vars(extra).items() if isinstance(v, Tensor)}
        if constant:
            named.setdefault("extra.constant_D", torch.zeros_like(weights.ffn.w_up_FD[0], dtype=torch.float32))
        self.parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items()}
        self._scale: dict[str, float] = {}

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y of the shape of x [..., D]; padding gets zeros, but for dense calls."""
        if self.as_dense:
            return self.weights.ffn.forward(x)
        x_TD = x.reshape(-1, self.weights.ffn.d_model)
        if token_mask is None:
            return self._compute(x_TD).view(x.shape)
        real_T = token_mask.reshape(-1)
        return torch.zeros_like(x_TD).index_put((real_T,), self._compute(x_TD[real_T])).view(x.shape)

    def _compute(self, x_TD: Tensor) -> Tensor:
        ffn, kept = self.weights.ffn if self.adapted is None else self.adapted(), self.weights.num_shared
        if self.form is None:
            head = ffn.rows(0, kept)
            y_TD = head.hidden(x_TD).to(head.w_down_FD.dtype) @ head.w_down_FD  # T5's is float32 under float16
        else:
            gates_TE = self._gates(x_TD)
            h_TF = ffn.hidden(x_TD)
            gates_TE1 = gates_TE.unsqueeze(-1).to(h_TF.dtype)
            routed_TEN = h_TF[:, kept:].unflatten(1, (-1, self.weights.expert_size)) * gates_TE1
            always_TF, routed_TF = (part.to(ffn.w_down_FD.dtype) for part in (h_TF[:, :kept], routed_TEN.flatten(1)))
            y_TD = routed_TF @ ffn.w_down_FD[kept:] + always_TF @ ffn.w_down_FD[:kept]
        if (extra := self.learned_compensation()) is not None:
            y_TD = y_TD.float() + extra.output(x_TD)  # routers and corrections are float32
        return (y_TD if ffn.b_down_D is None else y_TD + ffn.b_down_D).to(x_TD.dtype)

    def _gates(self, x_TD: Tensor) -> Tensor:
        scores_TE = self.learned_router().scores(x_TD)
        if not self.spread:
            self._measure(x_TD, scores_TE)
        z_TE = (scores_TE - self._level(scores_TE)) / self.spread - self.shift
        chosen_TE = z_TE >= 0 if self.shifts else as_mask(self.rule.select(scores_TE), scores_TE.shape[1])
        gates_TE = chosen_TE.to(scores_TE.dtype)
        routed = 1 - self.weights.num_shared / self.weights.ffn.num_neurons
        if torch.is_grad_enabled():
            soft_TE = torch.sigmoid(z_TE / _TEMPERATURE)
            gates_TE = gates_TE + soft_TE - soft_TE.detach()
        elif self.shifts:
            self.density = routed * float((z_TE.abs() < _NEAR).float().mean()) / (2 * _NEAR)
        self.active = 1 - routed + routed * gates_TE.mean()
        return gates_TE

    @property
    def shifts(self) -> bool:
        """Whether a threshold, which `shift` moves, decides how much is computed."""
        return self.form is not None and isinstance(self.rule, Threshold)

    @torch.no_grad()
    def _level(self, scores_TE: Tensor) -> Tensor | float:
        """The score from which on experts run: a constant, or one per token, [T, 1]."""
        if isinstance(self.rule, Threshold):
            return self.rule.threshold
        return scores_TE.topk(self.rule.top_k + 1, dim=-1).values[:, -2:].mean(-1, keepdim=True)

    @torch.no_grad()
    def _measure(self, x_TD: Tensor, scores_TE: Tensor) -> None:
        """Scales on the first tokens seen: biases start anywhere, so their own size says nothing about a good step."""
        assert self.form is not None
        if not self.shifts:  # of a token's scores only the differences count
            scores_TE = scores_TE - scores_TE.mean(1, keepdim=True)
        self.spread = float(scores_TE.std()) or 1.0
        self._scale = self.form.bias_scales(x_TD)

    def step_size(self, name: str) -> float:
        """The size of a parameter's values, relative to which it should move; known after the first call."""
        return self._scale.get(name) or float(self.parameters[name].detach().square().mean().sqrt()) or 1e-3

    def learned_router(self) -> Router:
        """The router as it stands."""
        assert self.form is not None
        found: dict[str, Any] = {n: t for n, t in self.parameters.items() if not n.startswith("extra.")}
        return self.form.with_tensors(found)

    def learned_compensation(self) -> Compensation | None:
        """The compensation as it stands."""
        found: dict[str, Any] = {n[6:]: t for n, t in self.parameters.items() if n.startswith("extra.")}
        return Compensation(**found) if found else None
