"""Every backend against the masked reference; the layer that routes, chooses a backend and skips padding.

CPU backends run here; CUDA ones have a class of their own. Tolerances: relative to the largest output, because backends sum in
other orders: 2e-6 in float32, 2e-2 in bfloat16 (judged by the reference in float32 on the same rounded weights).
"""

import dataclasses
import sys
import threading
import types

import pytest
import torch
from torch import Tensor, nn

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ACTIVATIONS, Compensation, ExpertWeights, FFNWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold, TopK
from moefication_cli.runtime import backends, reference, torch_backends
from moefication_cli.runtime.backends import ALL_ON_TOKENS, BACKENDS, available, choose
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.runtime.reference import masked

SPARSE = ["torch", "grouped", "numba"]


def make(
    d: int = 32,
    E: int = 12,
    N: int = 8,
    S: int = 0,
    gated: bool = False,
    bias: bool = True,
    act: str = "relu",
    fix: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    """Random weights of unit scale."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    F = S + E * N
    ffn = FFNWeights(
        rand(F, d, scale=d**-0.5),
        rand(F, d, scale=F**-0.5),
        rand(F, d, scale=d**-0.5) if gated else None,
        rand(F, scale=0.3) if bias else None,
        rand(F, scale=0.3) if bias and gated else None,
        rand(d, scale=0.3) if bias else None,
        act,
    )
    parts = Compensation(rand(d), rand(5, d, scale=d**-0.5), rand(5, d)) if fix else None
    return ExpertWeights(ffn, E, S, parts)


def ids(T: int, E: int, k: int, seed: int = 1) -> Tensor:
    """Distinct random experts of each token, [T, k]."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).topk(k, dim=1).indices


def some(T: int, E: int) -> Tensor:
    """About 0.4 of the experts of each token, [T, E] bool; another count for each token, at least one expert in all."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(T)) < 0.4


def tokens(T: int, w: ExpertWeights, seed: int = 2) -> Tensor:
    x = torch.randn(T, w.ffn.d_model, generator=torch.Generator().manual_seed(seed))
    return x.to(w.ffn.w_up_FD.dtype)


def float32(w: ExpertWeights) -> ExpertWeights:
    """The same numbers in float32."""

    def wide(record: object) -> object:
        changed = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}  # type: ignore[arg-type]
        return dataclasses.replace(record, **{k: t.float() for k, t in changed.items() if isinstance(t, Tensor)})  # type: ignore[type-var]

    return dataclasses.replace(
        w, ffn=wide(w.ffn), compensation=None if w.compensation is None else wide(w.compensation)
    )


def error(y: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected output."""
    return float((y.float() - expected.float()).abs().max() / expected.float().abs().max())


def judge(name: str, w: ExpertWeights, x: Tensor, selected: Tensor) -> None:
    """Backend `name` equals the reference on this selection, and would be told from another selection."""
    with torch.inference_mode():
        y = BACKENDS[name].compute(x, selected, w)
        expected = masked(x.float(), selected, float32(w))
    assert y.shape == x.shape and y.dtype == x.dtype
    assert error(y, expected) < (2e-6 if x.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_backends_equal_the_reference(name: str, dtype: torch.dtype, gated: bool, bias: bool) -> None:
    act = "silu" if gated else "relu"
    for S, fix in ((0, False), (16, False), (0, True), (16, True)):
        w = make(S=S, gated=gated, bias=bias, act=act, fix=fix, dtype=dtype)
        for T in (1, 2, 7, 130):
            x = tokens(T, w)
            for k in (1, 5, w.num_experts):
                judge(name, w, x, ids(T, w.num_experts, k))
            judge(name, w, x, some(T, w.num_experts))


@pytest.mark.parametrize("name", SPARSE)
def test_another_selection_is_told_apart(name: str) -> None:
    w, x = make(), tokens(9, make())
    chosen = ids(9, 12, 4)
    other = chosen.clone()
    other[3, 0] = next(e for e in range(12) if e not in chosen[3].tolist())
    with torch.inference_mode():
        y, expected = BACKENDS[name].compute(x, other, w), masked(x, chosen, w)
    assert error(y, expected) > 1e-2
    same = torch.arange(9) != 3
    assert error(y[same], expected[same]) < 2e-6


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_numba_knows_every_activation(act: str, gated: bool) -> None:
    w = make(act=act, gated=gated)
    x = 4 * tokens(6, w)
    judge("numba", w, x, ids(6, 12, 5))
    other = "tanh" if act != "tanh" else "relu"
    with torch.inference_mode():
        wrong = masked(x, ids(6, 12, 5), dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, activation=other)))
        assert error(BACKENDS["numba"].compute(x, ids(6, 12, 5), w), wrong) > 1e-3


@pytest.mark.parametrize(
    ("d", "E", "N", "S"), [(64, 43, 4, 0), (36, 5, 3, 7), (20, 3, 1, 0), (300, 6, 33, 40), (1056, 4, 130, 0)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_numba_takes_any_shape(d: int, E: int, N: int, S: int, gated: bool) -> None:
    w = make(d=d, E=E, N=N, S=S, gated=gated, act="relu", fix=True)
    for T in (1, 2, 3, 4, 6, 65, 140):
        judge("numba", w, tokens(T, w), ids(T, E, max(1, E // 3)))


@pytest.mark.parametrize("name", SPARSE)
def test_experts_that_nobody_selects_and_tokens_without_experts(name: str) -> None:
    w = make(S=8, fix=True)
    x = tokens(10, w)
    judge(name, w, x, torch.full((10, 1), 7))
    judge(name, w, x, torch.zeros(10, 12, dtype=torch.bool))


@pytest.mark.parametrize("name", SPARSE)
def test_no_token_and_non_contiguous_input(name: str) -> None:
    w = make()
    with torch.inference_mode():
        assert BACKENDS[name].compute(tokens(0, w), ids(0, 12, 3), w).shape == (0, 32)
    wide = torch.randn(6, 64)
    judge(name, w, wide[:, ::2], ids(6, 12, 3))
    judge(name, w, torch.randn(32, 6).t(), ids(12, 12, 3)[::2])
    judge(name, w, tokens(6, w), some(12, 6).t())


@pytest.mark.parametrize("name", ["reference", *SPARSE])
def test_bad_selections_are_errors(name: str) -> None:
    w, x = make(), tokens(4, make())
    run = BACKENDS[name].compute
    with torch.inference_mode():
        for wrong in (12, -1, 10**9):
            bad = ids(4, 12, 3).clone()
            bad[2, 1] = wrong
            with pytest.raises(ConfigError, match=f"{wrong}|out of range"):
                run(x, bad, w)
        with pytest.raises(ConfigError, match="selection"):
            run(x, ids(5, 12, 3), w)
        with pytest.raises(ConfigError, match="11 experts"):
            run(x, torch.ones(4, 11, dtype=torch.bool), w)
        with pytest.raises(ConfigError, match="float"):
            run(x, torch.ones(4, 12), w)


@pytest.mark.parametrize("name", SPARSE)
def test_an_expert_named_twice_counts_once(name: str) -> None:
    w, x = make(fix=True), tokens(5, make())
    twice = torch.cat([ids(5, 12, 3), ids(5, 12, 3)[:, :1]], dim=1)
    judge(name, w, x, twice)
    with torch.inference_mode():
        assert error(BACKENDS[name].compute(x, twice, w), masked(x, ids(5, 12, 3), w)) < 2e-6


def test_gradients() -> None:
    w, chosen = make(fix=True), ids(5, 12, 4)
    x = tokens(5, w).requires_grad_()
    (expected,) = torch.autograd.grad(masked(x, chosen, w).square().sum(), x)
    for name in ("torch", "grouped"):
        (got,) = torch.autograd.grad(BACKENDS[name].compute(x, chosen, w).square().sum(), x)
        assert error(got, expected) < 1e-5
    with pytest.raises(ConfigError, match="gradients"):
        BACKENDS["numba"].compute(x, chosen, w)
    w.ffn.w_up_FD.requires_grad_()
    with pytest.raises(ConfigError, match="gradients"):
        BACKENDS["numba"].compute(x.detach(), chosen, w)
    with torch.no_grad():
        assert error(BACKENDS["numba"].compute(x, chosen, w), masked(x, chosen, w)) < 2e-6


def test_bfloat16_conversion_keeps_nan_and_rounds_to_even() -> None:
    w = make(E=2, N=8, bias=False, act="identity", dtype=torch.bfloat16)
    eye = torch.zeros(16, 32, dtype=torch.bfloat16)
    eye[:, :16] = torch.eye(16)
    w = dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, w_up_FD=eye, w_down_FD=eye))
    x = tokens(3, w)
    x[1, 3] = float("nan")
    x[2, 5] = float("inf")
    with torch.inference_mode():
        y = BACKENDS["numba"].compute(x, torch.ones(3, 2, dtype=torch.bool), w)
    assert torch.equal(y[0, :16], x[0, :16]) and y[1].isnan().any() and not y[0].isnan().any()
    halves = make(E=2, N=8, bias=False, act="identity", dtype=torch.bfloat16)
    with torch.inference_mode():
        y = BACKENDS["numba"].compute(x[:1], torch.ones(1, 2, dtype=torch.bool), halves)
        exact = masked(x[:1].float(), torch.ones(1, 2, dtype=torch.bool), float32(halves))
    assert (y.float() - exact).abs().max() <= exact.abs().max() * 2**-8


def _router_tensors() -> dict[str, TwoLayerRouter]:
    g = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "linear": TwoLayerRouter(rand(12, 32)),
        "similarity": TwoLayerRouter(rand(12, 32), rand(12), normalise=True),
        "mlp": TwoLayerRouter(rand(12, 32), None, torch.eye(12), None, "tanh", True),
        "regression": TwoLayerRouter(rand(21, 32), rand(21), rand(12, 21), rand(12), "relu"),
        "quadratic": TwoLayerRouter(rand(40, 32), None, rand(12, 40), None, "square"),
    }


ROUTERS = _router_tensors()


def clear(scores: Tensor, rule: TopK | Threshold) -> Tensor:
    """Tokens whose selection rounding cannot change, [T] bool."""
    if isinstance(rule, Threshold):
        margin = (scores - rule.threshold).abs().min(dim=1).values
    else:
        best = scores.sort(dim=1, descending=True).values
        margin = best[:, rule.top_k - 1] - best[:, rule.top_k]
    return margin > 1e-4 * scores.abs().max()


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_router_selects_what_the_router_selects(kind: str, dtype: torch.dtype) -> None:
    w, router = make(S=8, fix=True, dtype=dtype), ROUTERS[kind]
    for T in (1, 3, 33, 300):
        x = tokens(T, w)
        with torch.inference_mode():
            scores = router.scores(x.float())
            for rule in (TopK(3), TopK(11), Threshold(float(scores.median()) + 1e-3)):
                layer = MoEFFN(w, router, rule, "numba")
                layer.count_selections()
                sure, selected = clear(scores, rule), rule.select(scores)
                expected = masked(x.float(), selected, float32(w))
                assert sure.float().mean() > 0.9 or T < 300
                if sure.any():
                    assert error(layer(x)[sure], expected[sure]) < (5e-6 if dtype == torch.float32 else 2e-2)
                    lower = MoEFFN(w, dataclasses.replace(router, w_in_RD=-router.w_in_RD), rule, "numba")
                    if kind != "quadratic" and T > 1:
                        assert error(lower(x), expected) > 1e-2
                    assert layer.counts_E is not None and layer.num_counted == T
                    count = selected.sum() if selected.dtype == torch.bool else selected.numel()
                    assert abs(int(layer.counts_E.sum()) - int(count)) <= int((~sure).sum()) * isinstance(
                        rule, Threshold
                    )


def test_equal_scores_select_exactly_k() -> None:
    w = make()
    layer = MoEFFN(w, TwoLayerRouter(torch.zeros(12, 32)), TopK(5), "numba")
    layer.count_selections()
    with torch.inference_mode():
        layer(tokens(7, w))
    assert layer.counts_E is not None and layer.counts_E.tolist() == [7] * 5 + [0] * 7
    assert layer.active_fraction == pytest.approx(5 / 12)


class TestLayer:
    """MoEFFN: shapes, padding, hooks, the choice of a path."""

    router = TwoLayerRouter(torch.randn(12, 32, generator=torch.Generator().manual_seed(5)))

    @pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
    def test_shapes_and_padding(self, backend: str) -> None:
        w = make(S=8, fix=True)
        layer = MoEFFN(w, self.router, TopK(4), backend)
        x = torch.randn(3, 50, 32)
        real = torch.ones(3, 50, dtype=torch.bool)
        real[1, 20:] = False
        real[2, 1:] = False
        layer.count_selections()
        with torch.inference_mode():
            expected = masked(x.view(-1, 32), TopK(4).select(self.router.scores(x.view(-1, 32))), w).view(x.shape)
            y = layer(x, real)
            assert error(y[real], expected[real]) < 5e-6
            assert y[~real].abs().max() == 0
            assert layer.num_counted == int(real.sum()) and int(layer.counts_E.sum()) == 4 * layer.num_counted  # type: ignore[union-attr]
            assert error(layer(x), expected) < 5e-6
            assert error(layer(x.transpose(0, 1)), expected.transpose(0, 1)) < 5e-6
            assert layer(x[:, :0]).shape == (3, 0, 32)
            assert layer(x[0, 0]).shape == (32,)
        with pytest.raises(ConfigError, match="padding mask"):
            layer(x, real[:2])
        with pytest.raises(ConfigError, match="width 31"):
            layer(x[..., :31])

    @pytest.mark.parametrize("gated", [False, True])
    def test_everything_on_is_dense(self, gated: bool) -> None:
        w = make(S=8, gated=gated, fix=True)
        layer = MoEFFN(w, self.router, TopK(12))
        layer.count_selections()
        half = MoEFFN(w, self.router, TopK(6), may_go_dense=False)
        with torch.inference_mode():
            for T, path in ((9, "numba"), (ALL_ON_TOKENS, "dense"), (3, "numba")):
                x = tokens(T, w)
                real = torch.arange(T) != 1
                assert error(layer(x, real)[real], w.ffn.forward(x)[real]) < 2e-6
                assert layer.last_backend == path and layer.active_fraction == 1.0
                assert error(half(x), w.ffn.forward(x)) > 1e-2
        assert layer.num_counted == 8 + ALL_ON_TOKENS - 1 + 2

    def test_a_selection_of_ones_own(self) -> None:
        w, x = make(), tokens(6, make())
        seen = []

        def select(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
            seen.append(x_TD.shape[0])
            return torch.full((x_TD.shape[0], 1), 3)

        for backend in ("torch", "numba", "reference"):
            layer = MoEFFN(w, None, None, backend, select)
            layer.count_selections()
            with torch.inference_mode():
                assert error(layer(x), masked(x, torch.full((6, 1), 3), w)) < 2e-6
            assert layer.counts_E is not None and layer.counts_E.tolist() == [0] * 3 + [6] + [0] * 8
        assert seen == [6, 6, 6]

    def test_weights_are_shared_with_the_model(self) -> None:
        """A down-projection kept neuron-major behind its dense name and shape: one copy, dense names, live updates."""
        w = make(bias=False)
        up, down = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)
        packed_FD = w.ffn.w_down_FD.clone()
        up.weight, down.weight = nn.Parameter(w.ffn.w_up_FD.clone()), nn.Parameter(packed_FD.t())
        views = dataclasses.replace(w.ffn, w_up_FD=up.weight, w_down_FD=down.weight.t())
        layer = MoEFFN(ExpertWeights(views, 12), self.router, TopK(4), "numba")
        x = tokens(5, w)
        with torch.inference_mode():
            before = layer(x)
            dense = down(torch.relu(up(x)))
            assert error(dense, w.ffn.forward(x)) < 2e-6
        with torch.no_grad():
            down.weight.mul_(2.0)
        with torch.inference_mode():
            assert error(layer(x), 2 * before) < 2e-6
        assert down.weight.t().data_ptr() == packed_FD.data_ptr()

    def test_new_routers_and_rules_take_effect(self) -> None:
        w, x = make(), tokens(5, make())
        layer = MoEFFN(w, self.router, TopK(4), "numba")
        with torch.inference_mode():
            first = layer(x)
            layer.rule = TopK(7)
            assert error(layer(x), masked(x, TopK(7).select(self.router.scores(x)), w)) < 5e-6
            assert error(layer(x), first) > 1e-2

    def test_several_threads_at_once(self) -> None:
        w = make(d=64, E=32, N=16)
        layer = MoEFFN(w, TwoLayerRouter(torch.randn(32, 64)), TopK(8), "numba")
        inputs = [tokens(T, w, seed=T) for T in (1, 5, 40, 200)]
        with torch.inference_mode():
            expected = [layer(x) for x in inputs]
        wrong: list[float] = []

        def work(i: int) -> None:
            with torch.inference_mode():
                for _ in range(30):
                    wrong.append(error(layer(inputs[i]), expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == 120 and max(wrong) < 2e-6

    def test_thread_counts_agree(self) -> None:
        w = make(d=256, E=32, N=32)
        layer = MoEFFN(w, TwoLayerRouter(torch.randn(32, 256)), TopK(8), "numba")
        before = torch.get_num_threads()
        try:
            for T in (1, 9, 300):
                outputs = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    with torch.inference_mode():
                        outputs.append(layer(tokens(T, w)))
                assert max(error(y, outputs[0]) for y in outputs) < 2e-6
        finally:
            torch.set_num_threads(before)

    def test_a_call_that_needs_gradients_uses_a_backend_that_has_them(self) -> None:
        w = make()
        layer = MoEFFN(w, self.router, TopK(4))
        x = tokens(5, w).requires_grad_()
        layer(x).sum().backward()
        assert layer.last_backend == "torch" and x.grad is not None
        with torch.no_grad():
            layer(x)
        assert layer.last_backend == "numba"
        layer.backend = "numba"
        with pytest.raises(ConfigError, match="gradients"):
            layer(x)

    def test_bad_settings(self) -> None:
        w = make()
        with pytest.raises(ConfigError, match="router"):
            MoEFFN(w)
        with pytest.raises(ConfigError, match="11 experts"):
            MoEFFN(w, TwoLayerRouter(torch.randn(11, 32)), TopK(3))
        for k in (0, 13):
            with pytest.raises(ConfigError, match="top_k"):
                MoEFFN(w, self.router, TopK(k))
        with pytest.raises(UnavailableError, match="fast"):
            MoEFFN(w, self.router, TopK(3), "fast")


class TestAlways:
    """PrunedFFN: the shared neurons and the compensation, whatever the path."""

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    @pytest.mark.parametrize("shared", [0, 24])
    def test_is_the_reference_with_no_expert_on(self, backend: str, shared: int) -> None:
        w = make(S=shared, gated=shared > 0, act="silu", fix=True)
        layer = PrunedFFN(w, backend)
        assert layer.active_fraction == shared / w.ffn.num_neurons
        for T in (1, 5, 150):
            x = tokens(T, w)
            with torch.inference_mode():
                y, expected = layer(x.view(1, T, 32)), masked(x, torch.zeros(T, 12, dtype=torch.bool), w)
                assert error(y[0], expected) < 2e-6
                assert error(y[0], masked(x, torch.arange(12) < torch.ones(T, 1), w)) > 1e-2
            assert layer.last_backend == ("torch" if backend == "torch" else "numba")

    def test_padding_gradients_and_new_weights(self) -> None:
        w, x = make(S=24, fix=True), tokens(6, make())
        layer, others = PrunedFFN(w), make(S=24, fix=True, seed=4)
        with torch.inference_mode():
            before = layer(x, torch.arange(6) != 2)
            assert before[2].abs().max() == 0 and error(before[3:], layer(x)[3:]) < 2e-6
            layer.weights = others
            assert error(layer(x), before) > 1e-2
        x.requires_grad_()
        layer(x).sum().backward()
        assert layer.last_backend == "torch" and x.grad is not None
        with pytest.raises(ConfigError, match="gradients"):
            PrunedFFN(w, "numba")(x)
        with pytest.raises(UnavailableError, match="float64"):
            PrunedFFN(make(S=24, dtype=torch.float64), "numba")
        wide = PrunedFFN(make(S=24, dtype=torch.float64))
        assert wide(x.detach().double()).dtype == torch.float64 and wide.last_backend == "torch"


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("S", [0, 16])
def test_half_precision_is_added_up_in_float32(name: str, S: int) -> None:
    """A hundred experts a token: every sum in bfloat16 rounds, in float32 only the result does."""
    w = make(E=256, N=4 if name == "grouped" else 8, S=S, dtype=torch.bfloat16)  # experts of 4: rows of 8 bytes
    x, mask_TE = tokens(40, w), some(40, 256)
    with torch.inference_mode():
        y, exact = BACKENDS[name].compute(x, mask_TE, w), masked(x.float(), mask_TE, float32(w))
        other = masked(x.float(), ~mask_TE, float32(w))
        in_half = torch.zeros_like(x)
        for e in range(256):
            alone = torch.zeros_like(mask_TE)
            alone[:, e] = mask_TE[:, e]
            in_half += masked(x, alone, dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, b_down_D=None)))
    assert y.dtype == torch.bfloat16
    lost, lost_in_half = (float((found.float() - exact).std()) for found in (y, in_half + w.ffn.b_down_D))
    assert float((other - exact).std()) > 50 * lost  # another selection would be seen
    if not S:
        assert lost < 0.6 * lost_in_half


def test_kernels_know_every_activation_and_no_other() -> None:
    from moefication_cli.ffn import ACTIVATIONS
    from moefication_cli.routing.router import ROUTER_ACTIVATIONS
    from moefication_cli.runtime.cpu.numba_backend import ACTIVATION_CODES, activation_code

    assert set(ACTIVATION_CODES) == {*ACTIVATIONS, *ROUTER_ACTIVATIONS}
    with pytest.raises(UnavailableError, match="'mish'"):
        activation_code("mish")


def test_unavailable_backends_name_what_is_missing() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UnavailableError, match="no backend 'nmuba'"):
        available("nmuba", cpu, torch.float32)
    with pytest.raises(UnavailableError, match="runs on cuda"):
        available("triton", cpu, torch.float32)
    with pytest.raises(UnavailableError, match="fmoe is not installed"):
        available("fastmoe", cuda, torch.float32)
    with pytest.raises(UnavailableError, match="float64"):
        available("numba", cpu, torch.float64)
    with pytest.raises(UnavailableError, match="experts of 6"):
        available("grouped", cpu, torch.float32, make(N=6, E=11))
    with pytest.raises(UnavailableError, match="d_model 33"):
        torch_backends.grouped(tokens(3, make(d=33)), ids(3, 12, 2), make(d=33))
    for N, E in ((4, 11), (6, 12)):
        available("grouped", cpu, torch.float32, make(N=N, E=E))


def test_auto_choices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    w, cpu, cuda = make(), torch.device("cpu"), torch.device("cuda")
    assert choose(cpu, torch.float32, 1, w, 0.2) == "numba"
    assert choose(cpu, torch.float32, 1, w, 1.0) == "numba"
    assert choose(cpu, torch.float32, ALL_ON_TOKENS, w, 1.0) == "dense"
    assert choose(cpu, torch.float32, 1, w, 1.0, needs_grad=True) == "dense"
    assert choose(cpu, torch.float32, 1, w, 0.95) == "dense"
    assert choose(cpu, torch.float32, 1, w, 0.2, needs_grad=True) == "torch"
    assert choose(cpu, torch.float64, 1000, w, 0.2) == "torch"
    assert choose(cuda, torch.bfloat16, 512, make(N=32, dtype=torch.bfloat16), 0.2) == "grouped"
    assert choose(cuda, torch.bfloat16, 512, make(N=4, dtype=torch.bfloat16), 0.2) == "dense"  # by arithmetic
    assert choose(cuda, torch.bfloat16, 512, make(N=32, dtype=torch.bfloat16), 0.6) == "dense"
    # A kernel that works on addresses never gets rows it would misread
    strided = dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, w_down_FD=w.ffn.w_down_FD.t().contiguous().t()))
    assert choose(cpu, torch.float32, 1, strided, 0.2) == "torch"
    assert choose(cpu, torch.float16, 1, w, 0.2) == "torch"  # the mixture, not the dense function
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert choose(cuda, torch.float32, 1, w, 0.2) == "triton"
    assert choose(cuda, torch.float32, 1, make(N=32, E=3), 0.2) == "triton"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends._warn_once.cache_clear()
    caplog.clear()
    assert choose(cpu, torch.float32, 1, w, 0.2) == "torch"
    assert choose(cpu, torch.float32, 512, w, 0.2) == "torch"
    assert caplog.messages == [
        "backend numba is not available: the package numba is not installed; the next best is used"
    ]


def _triton(monkeypatch: pytest.MonkeyPatch) -> object:
    """The triton backend on the CPU, by Triton's interpreter; skips where triton is not installed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed (it comes with CUDA builds of torch)")
    from moefication_cli.runtime.cuda import triton_kernels

    return triton_kernels.compute


def test_triton_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", _triton(monkeypatch))  # type: ignore[arg-type]
    for gated, act, S, d in (
        (False, "relu", 0, 32),
        (True, "silu", 8, 200),
        (False, "gelu", 0, 36),
        (False, "tanh", 4, 64),
    ):
        w = make(d=d, gated=gated, act=act, S=S, N=6, fix=bool(S))
        for T in (0, 1, 3):
            judge("triton", w, tokens(T, w), ids(T, 12, 5)) if T else None
        judge("triton", w, tokens(4, w), some(4, 12))
        judge("triton", w, tokens(2, w), torch.tensor([[3, 3, 7], [1, 2, 1]]))
        judge("triton", w, tokens(2, w), torch.zeros(2, 12, dtype=torch.bool))


class _StubOfFourFunctions:
    """A stub, in plain torch, of the four single-worker functions of `fmoe_cuda`. It is not FastMoE."""

    @staticmethod
    def expert_count(gate: Tensor, count: Tensor) -> None:
        count += torch.bincount(gate, minlength=count.shape[0]).int()

    @staticmethod
    def assign_pos(ends: Tensor, gate: Tensor, pos: Tensor) -> None:
        for i, expert in enumerate(gate.tolist()):  # as the atomics do: any order within an expert, `ends` counted down
            ends[expert] -= 1
            pos[int(ends[expert])] = i

    @staticmethod
    def linear_forward(x: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = x.split(count.tolist())
        return torch.cat(
            [nn.functional.linear(p, weight[e], None if bias is None else bias[e]) for e, p in enumerate(parts)]
        )

    @staticmethod
    def linear_backward(*args: Tensor) -> None:
        raise NotImplementedError


class TestFastMoEAdapter:
    """The adapter against the stub above: what it passes and how it reads the answer, not that FastMoE works."""

    def use(self, monkeypatch: pytest.MonkeyPatch, functions: object) -> None:
        monkeypatch.setitem(sys.modules, "fmoe", types.ModuleType("fmoe"))
        monkeypatch.setitem(sys.modules, "fmoe_cuda", functions)  # type: ignore[arg-type]
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(reference.torch, "_assert_async", lambda ok, text: None)

    def test_equals_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, _StubOfFourFunctions)
        for gated, bias, S, fix in ((False, True, 0, False), (True, False, 8, True), (True, True, 0, False)):
            w = make(gated=gated, bias=bias, S=S, fix=fix, act="silu" if gated else "relu")
            judge("fastmoe", w, tokens(7, w), ids(7, 12, 4))
            judge("fastmoe", w, tokens(7, w), some(7, 12))
            judge("fastmoe", w, tokens(7, w), torch.zeros(7, 12, dtype=torch.bool))

    def test_a_wrong_answer_fails_the_self_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Zero(_StubOfFourFunctions):
            @staticmethod
            def linear_forward(x: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return torch.zeros(x.shape[0], weight.shape[1])  # what version 1.0.2 did in bfloat16

        self.use(monkeypatch, Zero)
        with pytest.raises(UnavailableError, match="self-check"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())

    def test_is_not_used_where_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UnavailableError, match="cuda"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
        with pytest.raises(UnavailableError, match="fmoe"):
            BACKENDS["fastmoe"].compute(tokens(3, make()), ids(3, 12, 2), make())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    """Every CUDA backend against the reference on the CPU."""

    @pytest.mark.parametrize("name", ["torch", "grouped", "triton", "fastmoe"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gated", [False, True])
    def test_equals_the_reference(self, name: str, dtype: torch.dtype, gated: bool) -> None:
        cpu = make(d=64, E=16, N=16, S=16, gated=gated, act="silu" if gated else "relu", fix=True, dtype=dtype)
        moved = {f.name: getattr(cpu.ffn, f.name) for f in dataclasses.fields(cpu.ffn)}
        ffn = FFNWeights(**{k: t.cuda() if isinstance(t, Tensor) else t for k, t in moved.items()})
        fix = cpu.compensation
        assert fix is not None and fix.constant_D is not None
        parts = Compensation(*(getattr(fix, f.name).cuda() for f in dataclasses.fields(fix)))
        w = ExpertWeights(ffn, 16, 16, parts)
        try:
            available(name, torch.device("cuda"), dtype, w)
        except UnavailableError as missing:
            pytest.skip(missing.message)
        for T in (1, 8, 300):
            x = tokens(T, cpu)
            for chosen in (ids(T, 16, 3), some(T, 16)):
                with torch.inference_mode():
                    y = BACKENDS[name].compute(x.cuda(), chosen.cuda(), w).cpu()
                    expected = masked(x.float(), chosen, float32(cpu))
                    wrong = masked(x.float(), ids(T, 16, 3, seed=9), float32(cpu))
                assert error(y, expected) < (5e-3 if dtype == torch.float32 else 3e-2)  # TF32 may be on
                assert error(y, wrong) > 5e-2
