"""The layer that routes, chooses a backend and skips padding, and the one without a router."""

import dataclasses
import threading

import pytest
import torch
from experts import error, float32, make, tokens
from torch import Tensor, nn

from moefication_cli.errors import ConfigError, UnavailableError
from moefication_cli.ffn import ExpertWeights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold, TopK
from moefication_cli.runtime.backends import ALL_ON_TOKENS
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.runtime.reference import masked


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
