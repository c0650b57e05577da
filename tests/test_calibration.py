"""Calibration curves and budgets: regression against least squares, thresholds on unseen tokens, sharing against brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.routing.budget import allocate, best_within, lower_hull
from moefication_cli.routing.calibrate import QUANTILES, calibration_curve
from moefication_cli.routing.compensation import (
    RIDGE,
    Dropped,
    ReducedRank,
    fit_compensation,
    ranks_for,
    top_right_directions,
)
from moefication_cli.routing.dropped_cpu import add_dropped
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import quantile
from moefication_cli.routing.tokens import Tokens
from moefication_cli.runtime.reference import masked

D, E, N, S = 12, 6, 4, 4


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(num_shared: int = S) -> ExpertWeights:
    F = num_shared + E * N
    ffn = FFNWeights(
        rand(F, D, seed=0), rand(F, D, seed=1), b_up_F=rand(F, seed=2), b_down_D=rand(D, seed=3), activation="relu"
    )
    return ExpertWeights(ffn, E, num_shared)


def sample(count: int, seed: int) -> Tokens:
    return Tokens(rand(count, D, seed=seed), rand(count, seed=seed + 100).square())


def regressed(tokens: Tokens, target_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(constant, map [D, D]) of the weighted, damped reduced-rank regression, by stacked least squares and one SVD."""
    share_T1 = (tokens.weight_T / tokens.weight_T.sum()).unsqueeze(1)
    x_mean_D, y_mean_D = (share_T1 * tokens.x_TD).sum(0), (share_T1 * target_TD).sum(0)
    root_T1 = tokens.weight_T.sqrt().unsqueeze(1)
    x_TD, y_TD = (tokens.x_TD - x_mean_D) * root_T1, (target_TD - y_mean_D) * root_T1
    damping = RIDGE * float(x_TD.square().sum()) / D
    stacked = torch.cat([x_TD, damping**0.5 * torch.eye(D)])
    full_DD = torch.linalg.lstsq(stacked, torch.cat([y_TD, torch.zeros(D, target_TD.shape[1])])).solution
    right = torch.linalg.svd(stacked @ full_DD, full_matrices=False).Vh[:rank]
    slope_DD = full_DD @ right.T @ right
    return y_mean_D - x_mean_D @ slope_DD, slope_DD


@pytest.mark.parametrize("rank", [1, 3, D])
def test_reduced_rank_regression_equals_least_squares(rank: int) -> None:
    tokens = sample(400, 5)
    target_TD = torch.tanh(tokens.x_TD @ rand(D, D, seed=6)) + 2
    expected_D, slope_DD = regressed(tokens, target_TD, rank)
    found = ReducedRank(tokens).fit(target_TD, rank).compensation(rank)
    assert found.w_in_RD is not None and found.w_out_RD is not None and found.constant_D is not None
    assert torch.allclose(found.w_in_RD.T @ found.w_out_RD, slope_DD, atol=1e-4)
    assert torch.allclose(found.constant_D, expected_D, atol=1e-4)
    # Negative control: tokens that weigh the same give another regression.
    flat = ReducedRank(Tokens(tokens.x_TD, torch.ones(400))).fit(target_TD, rank).compensation(rank)
    assert not torch.allclose(flat.constant_D, expected_D, atol=1e-3)  # type: ignore[arg-type]


def test_rank_zero_is_the_weighted_mean_and_smaller_ranks_are_cut_from_larger_ones() -> None:
    tokens, target_TD = sample(200, 7), rand(200, D, seed=8)
    regression = ReducedRank(tokens)
    mean_D = (tokens.weight_T.unsqueeze(1) * target_TD).sum(0) / tokens.weight_T.sum()
    only_mean = regression.fit(target_TD, 0).compensation(0)
    assert only_mean.w_in_RD is None and torch.allclose(only_mean.constant_D, mean_D, atol=1e-6)  # type: ignore[arg-type]
    two, cut = regression.fit(target_TD, 2).compensation(2), regression.fit(target_TD, 6).compensation(2)
    assert torch.allclose(two.w_in_RD.T @ two.w_out_RD, cut.w_in_RD.T @ cut.w_out_RD, atol=1e-5)  # type: ignore[union-attr,operator]


def test_wide_models_find_the_same_directions() -> None:
    """Above 512 columns the directions come from subspace iteration: same fit as the exact one."""
    matrix = rand(600, 3, seed=9) @ rand(3, 600, seed=10) + 0.001 * rand(600, 600, seed=11)
    found = top_right_directions(matrix, 3)
    exact = torch.linalg.svd(matrix).Vh[:3].T
    assert torch.allclose(found @ found.T, exact @ exact.T, atol=1e-4)
    assert not torch.allclose(found @ found.T, torch.eye(600), atol=0.5)


# float32 by the kernel; float64 by products over experts one by one, in pairs, all together
@pytest.mark.parametrize(("dtype", "block"), [("float32", 1), ("float64", 1), ("float64", 2 * N), ("float64", 1000)])
def test_dropped_output_grows_by_what_is_newly_left_out(dtype: str, block: int) -> None:
    weights, x_TD = layer(), rand(40, D, seed=20)
    dense_TD, scores_TE = weights.ffn.forward(x_TD), rand(40, E, seed=21)
    h_TF = weights.ffn.hidden(x_TD).to(getattr(torch, dtype))
    wide = replace(weights.ffn, w_down_FD=weights.ffn.w_down_FD.to(h_TF.dtype))
    dropped = Dropped(replace(weights, ffn=wide), h_TF, block)
    assert not dropped.output(torch.ones(40, E, dtype=torch.bool)).any()
    for threshold in (-1.0, 0.0, 0.0, 0.7, 9.0):
        found_TD = dropped.output(scores_TE >= threshold).float()
        assert torch.allclose(found_TD, dense_TD - masked(x_TD, scores_TE >= threshold, weights), atol=1e-4)
    assert not torch.allclose(found_TD, dense_TD - masked(x_TD, scores_TE >= 0, weights), atol=1e-2)


def test_the_kernel_adds_what_products_add_for_any_number_of_threads() -> None:
    """Tiles that do not divide tokens or experts, shared neurons, neurons that do not fire, fewer tokens than threads."""
    for tokens, width, experts, size, shared in ((301, 200, 37, 5, 3), (1, 40, 3, 1, 0), (70, 9000, 4, 3, 0)):
        h_TF = torch.relu(rand(tokens, shared + experts * size, seed=1))
        w_down_FD, drop_TE = rand(shared + experts * size, width, seed=2), rand(tokens, experts, seed=3) > 0.3
        start_TD = rand(tokens, width, seed=4)
        expected_TD = start_TD + (h_TF[:, shared:] * drop_TE.repeat_interleave(size, 1)) @ w_down_FD[shared:]
        found = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            found.append(start_TD.clone())
            add_dropped(drop_TE, h_TF, w_down_FD, shared, found[-1])
            torch.set_num_threads(before)
        assert torch.allclose(found[0], expected_TD, atol=1e-4)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        add_dropped(~drop_TE, h_TF, w_down_FD, shared, start_TD)
        assert not torch.allclose(start_TD, expected_TD, atol=1e-2)


def test_curve_rows_are_what_the_reference_computes() -> None:
    weights, fit, heldout = layer(), sample(600, 12), sample(500, 13)
    routers = [
        TwoLayerRouter(rand(3, D, seed=14), None, rand(E, 3, seed=15), activation="relu"),
        TwoLayerRouter(rand(E, D, seed=16)),
    ]
    curve = calibration_curve(weights, routers, fit, heldout)
    dense_flops = weights.ffn.num_neurons * 2 * D
    full_TD = weights.ffn.forward(heldout.x_TD)
    assert len(curve.error_C) == (len(QUANTILES) + 1 + 2 * len(QUANTILES)) * len(ranks_for(weights)) + 1
    for row in range(0, len(curve.error_C) - 1, 7):
        number, threshold, rank = int(curve.router_C[row]), float(curve.threshold_C[row]), int(curve.rank_C[row])
        if number < 0:
            assert threshold == 0
            on_E = torch.arange(E) < int(curve.experts_C[row])
            fit_keep_TE, keep_TE = (on_E.expand(len(part), E) for part in (fit, heldout))
        else:
            assert int(curve.experts_C[row]) == 0
            fit_keep_TE, keep_TE = (routers[number].scores(part.x_TD) >= threshold for part in (fit, heldout))
        extra = fit_compensation(weights, fit_keep_TE, rank, fit)
        out_TD = masked(heldout.x_TD, keep_TE, weights) + extra.output(heldout.x_TD)
        error = float((heldout.weight_T.unsqueeze(1) * (full_TD - out_TD).square()).sum()) / (2 * D * 500)
        active = (S + N * float(keep_TE.sum()) / 500) / weights.ffn.num_neurons
        extra_flops = 2 * rank * D + (0, E * D, 3 * D + E * 3)[{-1: 0, 1: 1, 0: 2}[number]]
        assert float(curve.error_C[row]) == pytest.approx(error, rel=1e-3)
        assert float(curve.active_C[row]) == pytest.approx(active, abs=1e-6)
        assert float(curve.flops_C[row]) == pytest.approx(active + extra_flops / dense_flops, abs=1e-6)
    assert (float(curve.flops_C[-1]), float(curve.error_C[-1])) == (1.0, 0.0)


def test_thresholds_keep_their_share_of_unseen_tokens() -> None:
    weights, fit, heldout = layer(), sample(4000, 17), sample(4000, 18)
    router = TwoLayerRouter(rand(E, D, seed=19))
    curve = calibration_curve(weights, [router], fit, heldout, rank_limit=0)
    routed = curve.router_C == 0
    shares = [(float(active) * (S + E * N) - S) / (E * N) for active in curve.active_C[routed]]
    assert shares == pytest.approx(QUANTILES, abs=0.015)
    # Negative control: the same thresholds on tokens of another kind keep another share.
    louder = Tokens(2 * heldout.x_TD, heldout.weight_T)
    moved = calibration_curve(weights, [router], fit, louder, rank_limit=0).active_C[routed]
    assert (moved - curve.active_C[routed]).abs().max() > 0.1


def test_quantiles_count_entries_beyond_the_limit_of_torch() -> None:
    values = torch.arange(101.0).flip(0)
    assert quantile(values, 0.25) == 24.0
    assert quantile(torch.zeros(2**24 + 2), 0.5) == 0.0


def test_lower_hull_by_hand() -> None:
    cost = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.5, 0.9])
    error = torch.tensor([10.0, 9.0, 4.0, 5.0, 4.0, 1.0])
    assert lower_hull(cost, error) == [0, 2, 5]  # 1 lies above the line 0-2, 3 beside 2, 4 saves nothing


def problem(seed: int, layers: int = 3, candidates: int = 6) -> tuple[list[Tensor], list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(candidates, generator=generator) for _ in range(layers)]
    errors = [torch.rand(candidates, generator=generator) * (1.1 - cost) for cost in costs]
    shares = torch.rand(layers, generator=generator) + 0.2
    return costs, errors, (shares / shares.sum()).tolist()


def totals(choice: tuple[int, ...], values: list[Tensor], shares: list[float] | None = None) -> float:
    return sum(float(v[i]) * s for i, v, s in zip(choice, values, shares or [1.0] * len(values), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_allocation_against_every_combination(seed: int) -> None:
    """Never over budget, and less than one step of a hull worse than the best combination there is."""
    costs, errors, shares = problem(seed)
    every = [
        (totals(choice, costs, shares), totals(choice, errors)) for choice in itertools.product(range(6), repeat=3)
    ]
    hulls = [lower_hull(cost, error) for cost, error in zip(costs, errors, strict=True)]
    cheapest = totals(tuple(hull[0] for hull in hulls), costs, shares)
    step = max(
        float(error[a] - error[b])
        for error, hull in zip(errors, hulls, strict=True)
        for a, b in itertools.pairwise(hull)
    )
    for budget in torch.linspace(cheapest + 1e-6, 1.0, 40).tolist():
        found = tuple(allocate(costs, errors, shares, budget))
        spent, error = totals(found, costs, shares), totals(found, errors)
        best = min(e for c, e in every if c <= budget + 1e-9)
        assert spent <= budget + 1e-6
        assert best - 1e-6 <= error < best + step
    everything = tuple(allocate(costs, errors, shares, 10.0))
    assert totals(everything, errors) == pytest.approx(sum(float(error.min()) for error in errors))


def test_allocation_is_exact_where_a_step_ends() -> None:
    for seed in range(12):
        costs, errors, shares = problem(seed)
        hulls = [lower_hull(cost, error) for cost, error in zip(costs, errors, strict=True)]
        gains = sorted(
            ((float(errors[n][a] - errors[n][b]) / (shares[n] * float(costs[n][b] - costs[n][a])), n)
             for n, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)),
            reverse=True,
        )  # fmt: skip
        place = [0] * 3
        for _, moved in gains:
            place[moved] += 1
            choice = tuple(hull[p] for hull, p in zip(hulls, place, strict=True))
            budget = totals(choice, costs, shares)
            best = min(
                totals(other, errors)
                for other in itertools.product(range(6), repeat=3)
                if totals(other, costs, shares) <= budget + 1e-9
            )
            assert totals(tuple(allocate(costs, errors, shares, budget)), errors) == pytest.approx(best, abs=1e-6)


def test_sharing_beats_the_same_budget_for_every_layer() -> None:
    costs = [torch.tensor([0.1, 0.5, 0.9])] * 2
    errors = [torch.tensor([10.0, 1.0, 0.0]), torch.tensor([1.0, 0.9, 0.8])]
    assert [best_within(cost, error, 0.31) for cost, error in zip(costs, errors, strict=True)] == [0, 0]
    assert allocate(costs, errors, [0.5, 0.5], 0.31) == [1, 0]
    assert allocate(costs, errors, [0.5, 0.5], 0.51) == [2, 0]


def test_a_budget_nobody_can_meet_says_what_is_needed() -> None:
    costs, errors = [torch.tensor([0.4, 0.8])] * 2, [torch.tensor([2.0, 1.0])] * 2
    with pytest.raises(ConfigError, match=r"0\.400"):
        allocate(costs, errors, [0.5, 0.5], 0.3)
    with pytest.raises(ConfigError, match=r"0\.400"):
        best_within(costs[0], errors[0], 0.3)
