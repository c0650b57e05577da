"""What stands in for an FFN in `eval` and `apply`: its output, what it computes, what it counts."""

import dataclasses

import pytest
import torch
from experts import make, tokens
from tiny_models import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moefication_cli.conversion.plan import LayerPlan, RoutedLayer
from moefication_cli.evaluation.selections import DenseFFN, NeuronOracleFFN, SelectionRow, flops_fractions, prune
from moefication_cli.ffn import Compensation, ExpertWeights, FFNWeights
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import live_weights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold, TopK
from moefication_cli.runtime.backends import BACKENDS
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.runtime.reference import masked
from moefication_cli.split.partition import random_partition, with_shared


def hand_made() -> tuple[FFNWeights, dict[str, Tensor], Tensor]:
    """Four ReLU neurons on x = (a, b): a, b, a + b and -a; four tokens and the neurons' statistics over them."""
    ffn = FFNWeights(
        w_up_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
        w_down_FD=torch.tensor([[1.0, 0.0], [0.0, 0.9], [1.0, 1.0], [0.0, 3.0]]),
        b_down_D=torch.tensor([10.0, 20.0]),
    )
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    statistics = {
        "variance_F": torch.tensor([0.6875, 0.6875, 0.25, 0.0]),
        "contribution_F": torch.tensor([0.75, 0.675, 1.5 * 2**0.5, 0.0]),
        "mean_F": torch.tensor([0.75, 0.75, 1.5, 0.0]),
    }
    return ffn, statistics, x_TD


def test_static_pruning_by_hand() -> None:
    """variance * norm^2 = (0.69, 0.56, 0.5, 0) keeps neurons 0 and 1; what 2 wrote differs from its mean by 0.5 per axis:
    error 2. By contribution 0 and 2 stay: 2.23 with the mean of neuron 1, 4.05 without; the first without its mean: 20."""
    ffn, statistics, x_TD = hand_made()
    pruned, choice = prune(ffn, statistics, 0.5, x_TD)
    assert choice == {"importance": "variance", "compensated": True}
    assert pruned.active_fraction == 0.5
    assert torch.allclose(pruned(torch.tensor([[1.0, 0.0]])), torch.tensor([[1 + 1.5 + 10, 1.5 + 20]]))
    # On tokens where neuron 1 is silent, keeping 0 and 2 loses nothing, and a mean would.
    pruned, choice = prune(ffn, statistics, 0.5, torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert choice == {"importance": "contribution", "compensated": False}
    assert torch.allclose(pruned(torch.tensor([[1.0, 0.0]])), torch.tensor([[12.0, 21.0]]))


def test_static_pruning_keeps_at_least_one_and_at_most_all() -> None:
    ffn, statistics, x_TD = hand_made()
    assert prune(ffn, statistics, 0.01, x_TD)[0].active_fraction == 0.25
    assert torch.allclose(prune(ffn, statistics, 1.0, x_TD)[0](x_TD), ffn.forward(x_TD))


def test_the_neuron_oracle_by_hand() -> None:
    ffn, _, _ = hand_made()
    # x = (1, 2): activations 1, 2, 3, 0 write 1, 1.8 and 4.2: the two largest are neurons 2 and 1.
    found = NeuronOracleFFN(ffn, 2)(torch.tensor([[1.0, 2.0]]))
    assert torch.allclose(found, torch.tensor([[3 + 10, 3 + 1.8 + 20]]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("extra", ["none", "mean", "low-rank"])
def test_always_on_equals_the_reference(gated: bool, extra: str) -> None:
    """The first 2 of 6 experts run for every token: the same as shared neurons in front of four experts that are off."""
    weights = make(d=16, E=6, N=4, S=4, gated=gated)
    x_TD = tokens(5, weights)
    parts = Compensation(torch.full((16,), 0.5)) if extra != "none" else None
    if extra == "low-rank":
        generator = torch.Generator().manual_seed(3)
        low = {name: torch.randn(3, 16, generator=generator) for name in ("w_in_RD", "w_out_RD")}
        parts = Compensation(torch.full((16,), 0.5), **low)
    always = PrunedFFN(ExpertWeights(weights.ffn, num_experts=4, num_shared=12, compensation=parts))
    keep_TE = (torch.arange(6) < 2).expand(5, 6)
    expected = masked(x_TD, keep_TE, dataclasses.replace(weights, compensation=parts))
    assert torch.allclose(always(x_TD), expected, atol=1e-5)
    assert torch.allclose(always(x_TD.view(1, 5, 16)), expected.view(1, 5, 16), atol=1e-5)
    assert always.active_fraction == 12 / 28
    fewer = PrunedFFN(ExpertWeights(weights.ffn, num_experts=5, num_shared=8, compensation=parts))
    assert not torch.allclose(fewer(x_TD), expected, atol=1e-2)  # negative control


@pytest.mark.parametrize("backend", ["reference", "torch", "grouped", "numba"])
def test_compensation_vanishes_when_every_expert_is_on(backend: str) -> None:
    weights = make(fix=True, S=8)
    x_TD = tokens(9, weights)
    everything = torch.arange(12).expand(9, 12)
    y_TD = BACKENDS[backend].compute(x_TD, everything, weights)
    assert torch.allclose(y_TD, weights.ffn.forward(x_TD), atol=1e-5)
    # Negative control: with one expert off, it acts.
    bare = dataclasses.replace(weights, compensation=None)
    some = everything[:, 1:]
    assert (
        BACKENDS[backend].compute(x_TD, some, weights) - BACKENDS[backend].compute(x_TD, some, bare)
    ).abs().max() > 0.1


@pytest.mark.parametrize("gated", [False, True])
def test_shared_and_routed_neurons_add_up_to_the_dense_ffn(gated: bool) -> None:
    """Every neuron counts exactly once: shared ones plus each expert alone, bias apart, is the dense output."""
    F, num_experts, dense = 44, 9, make(d=16, E=44, N=1, gated=gated).ffn
    shared_idx = torch.tensor([3, 40, 7, 12, 25, 0, 43, 18])
    partition = with_shared(random_partition(F - 8, num_experts, 5), shared_idx, F)
    weights = ExpertWeights(dense.permute(partition.order_F()), num_experts, 8)
    x_TD = tokens(6, weights)
    alone = [masked(x_TD, torch.full((6, 1), expert), weights) for expert in range(num_experts)]
    nobody = masked(x_TD, torch.zeros(6, num_experts, dtype=torch.bool), weights)
    assert dense.b_down_D is not None
    head = dense.permute(shared_idx)
    assert torch.allclose(nobody, head.hidden(x_TD) @ head.w_down_FD + dense.b_down_D, atol=1e-5)
    added = torch.stack(alone).sum(0) - (num_experts - 1) * nobody
    assert torch.allclose(added, dense.forward(x_TD), atol=1e-4)
    assert not torch.allclose(added - (alone[0] - nobody), dense.forward(x_TD), atol=1e-2)  # negative control


def counted(layer: object, x_TD: Tensor) -> float:
    """Multiply-adds that torch really did."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x_TD)  # type: ignore[operator]
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("rule", [TopK(3), Threshold(0.2)])
@pytest.mark.parametrize("rank", [0, 3])
def test_flops_fraction_is_what_torch_multiplies(name: str, rule: TopK | Threshold, rank: int) -> None:
    """`ffn_flops_fraction` of a routed, an always-on, a pruned and a dense layer against a count of matrix products."""
    model = tiny_model(name)
    site, generator = find_sites(model)[0], torch.Generator().manual_seed(0)
    dense = live_weights(model, site)
    partition = with_shared(random_partition(40, 10, 1), torch.arange(8), 48)
    router = TwoLayerRouter(torch.randn(5, 16, generator=generator), None, torch.randn(10, 5, generator=generator))
    low = {f"w_{side}_RD": torch.randn(rank, 16, generator=generator) for side in ("in", "out")} if rank else {}
    extra = Compensation(torch.zeros(16), **low)
    routed = RoutedLayer(site, partition, [router], "norm", None, 1)
    ffn = dense.permute(partition.order_F())
    x_TD = torch.randn(50, 16, generator=generator)

    moe = MoEFFN(ExpertWeights(ffn, 10, 8, extra), router, rule, backend="torch")
    moe.count_selections()
    always = PrunedFFN(ExpertWeights(ffn, 8, 16, extra), "torch")
    statistics = {key: torch.rand(48, generator=generator) for key in ("variance_F", "contribution_F", "mean_F")}
    layers = [moe, always, prune(dense, statistics, 0.25, x_TD, "torch")[0], DenseFFN(dense)]
    plans = [
        LayerPlan(routed, rule, 0.0, router, 0, extra),
        LayerPlan(routed, TopK(0), 0.0, None, 2, extra),
        LayerPlan(routed, None, 1.0),
        LayerPlan(routed, None, 1.0),
    ]
    whole = counted(DenseFFN(dense), x_TD)
    expected = [counted(layer, x_TD) / whole for layer in layers]
    found = flops_fractions(SelectionRow("x", "router", 0.2, layers, plans=plans))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected[0] < 0.95
    assert found[0] > moe.active_fraction + 0.1 * rank / 16  # negative control: the router and the correction count
