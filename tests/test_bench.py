"""bench: the rows of every mode on tiny models, the bound by hand, twins that leave the dense model alone."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from tiny_models import D, F, save_tiny, tiny_inputs, tiny_model
from torch import nn

from moefication_cli.benchmark import shapes
from moefication_cli.benchmark.bounds import FFNCost, Rates, ffn_bound, whole_bound
from moefication_cli.benchmark.calls import Decoder
from moefication_cli.benchmark.layers import (
    FFN,
    Recorder,
    cost_of,
    firing_share,
    fixed_cost,
    held_bytes,
    random_setup,
    rotation,
    sample_inputs,
    to_moe,
)
from moefication_cli.benchmark.rows import fastest_way, measured
from moefication_cli.benchmark.shapes import find_shape, set_firing, shape_model, share, without_ffns
from moefication_cli.benchmark.timing import READ_BYTES, Call, Paired, alternate
from moefication_cli.config import BenchConfig
from moefication_cli.errors import ConfigError
from moefication_cli.ffn import ExpertWeights, FFNWeights
from moefication_cli.models.loading import load
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import installed_layers, live_weights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import TopK
from moefication_cli.runtime.kernel_times import TOKENS, KernelTimes
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.runtime.pruned import PrunedFFN
from moefication_cli.stages.bench import slower_rows

CPU = torch.device("cpu")
QUICK = [
    "--tokens",
    "1,8",
    "--seq",
    "8",
    "--prompt-tokens",
    "4",
    "--new-tokens",
    "3",
    "--seconds",
    "0",
    "--repeats",
    "3",
]
FIELDS = {
    "mode", "tokens", "batch", "seq", "fraction", "dtype", "device", "threads", "backend", "dense_seconds",
    "moe_seconds", "speedup", "bound", "min", "max", "activation", "gated", "firing", "expert_size", "d_model",
    "num_neurons",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefication_cli.benchmark.subjects.COLD_BYTES", 1 << 15)
    monkeypatch.setattr("moefication_cli.benchmark.subjects.CACHES", 0)
    monkeypatch.setitem(READ_BYTES, "cpu", 1 << 20)


def saved(name: str, folder: Path) -> Path:
    save_tiny(name, folder, tokenizer=False)
    return folder


# -- the bound ---------------------------------------------------------------------------------------------------------


def cost(**changes: Any) -> FFNCost:
    """100 neurons of 10 columns in 10 experts, two used per token, a router of 100 weights; 2000 weights in all."""
    values: dict[str, Any] = {
        "tokens": 1, "d_model": 10, "num_neurons": 100, "projections": 2, "item_bytes": 4, "num_experts": 10,
        "experts_per_token": 2.0, "experts_touched": 2.0, "overhead": 100, "overhead_bytes": 400,
    }  # fmt: skip
    return FFNCost(**values | changes)


def test_bound_of_one_token_is_bytes() -> None:
    rates = Rates(flops_per_second=1e6, bytes_per_second=1e3)
    # bytes: 8000 against 0.2 * 8000 + 400; arithmetic takes 4 ms and does not matter
    assert cost().dense_seconds(rates) == pytest.approx(8.0)
    assert cost().moe_seconds(rates) == pytest.approx(2.0)
    assert ffn_bound([cost()], rates) == pytest.approx(4.0)


def test_bound_of_many_tokens_counts_the_union() -> None:
    rates = Rates(flops_per_second=1e6, bytes_per_second=1e3)
    # bytes decide for both: the 8 tokens touch 8 of 10 experts
    assert ffn_bound([cost(tokens=8, experts_touched=8.0)], rates) == pytest.approx(8.0 / 6.8)


def test_bound_where_arithmetic_decides() -> None:
    rates = Rates(flops_per_second=1e3, bytes_per_second=1e9)
    # 2 * 100 tokens * 2000 weights against 2 * 100 * (400 + 100)
    assert cost(tokens=100, experts_touched=10.0).dense_seconds(rates) == pytest.approx(400.0)
    assert ffn_bound([cost(tokens=100, experts_touched=10.0)], rates) == pytest.approx(4.0)


def test_bound_takes_the_larger_time_of_each_side() -> None:
    # dense multiplies for 4 s and reads for 1 s; the MoE multiplies for 1 s and reads for 0.85 s
    rates = Rates(flops_per_second=1e4, bytes_per_second=8e3)
    found = ffn_bound([cost(tokens=10, experts_touched=8.0)], rates)
    assert found == pytest.approx(4.0)


def test_bound_counts_shared_neurons_and_is_one_with_all_experts_on() -> None:
    rates = Rates(1e6, 1e3)
    shared = cost(num_shared=50, experts_per_token=2.0, experts_touched=2.0)  # 50 + 2 * 5 neurons
    assert shared.active_share == pytest.approx(0.6)
    assert shared.moe_seconds(rates) == pytest.approx(0.6 * 8 + 0.4)
    assert ffn_bound([cost(experts_per_token=10.0, experts_touched=10.0)], rates) == 1.0


def test_amdahl() -> None:
    assert whole_bound(10.0, 4.0, 3.0) == pytest.approx(10 / (4 + 6 / 3))
    assert whole_bound(10.0, 11.0, 3.0) == 1.0


def test_cost_of_a_selection() -> None:
    ffn = FFNWeights(torch.zeros(12, 5), torch.zeros(12, 5), activation="relu")
    router = TwoLayerRouter(torch.zeros(3, 5), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))
    layer = MoEFFN(ExpertWeights(ffn, 4), router, TopK(2))
    by_ids = cost_of(layer, torch.tensor([[0, 1], [0, 3]]))
    assert (by_ids.tokens, by_ids.experts_per_token, by_ids.experts_touched) == (2, 2.0, 3)
    assert by_ids.overhead == 3 * 5 + 4 * 3
    by_mask = cost_of(layer, torch.tensor([[True, False, False, False], [True, True, True, False]]))
    assert (by_mask.experts_per_token, by_mask.experts_touched) == (2.0, 3)


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_preparation_is_not_timed() -> None:
    seen: list[str] = []
    calls = [Call(lambda: seen.append("a"), lambda: seen.append("prepare")), Call(lambda: seen.append("b"))]
    taken = alternate(calls, repeats=3, seconds=10, warmup=1, device=CPU)
    assert [len(t) for t in taken] == [3, 3]
    assert seen[-6:-3] == ["b", "prepare", "a"]  # the second round starts with b
    assert seen.count("prepare") == seen.count("a") == seen.count("b") == 1 + 1 + 3


def test_the_cpu_clock_does_not_count_waiting() -> None:
    wall, cpu = (
        alternate([Call(lambda: time.sleep(0.05))], repeats=1, seconds=0, warmup=0, device=CPU, clock=clock)[0][0]
        for clock in ("wall", "cpu")
    )
    assert cpu < 0.05 <= wall


def test_speedup_is_the_median_of_pairs() -> None:
    summary = Paired([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]).summary()
    assert (summary["speedup"], summary["min"], summary["max"]) == (2.0, 1.5, 3.0)
    assert summary["dense_seconds"] == 3.0
    assert summary["quartiles"] == [1.75, 2.5]


# -- twins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "t5-gated", "opt", "bert-bare", "llama", "gpt2"])
def test_twins_leave_the_dense_model_as_it_was(name: str) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, padded=False)
    before = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        sites = find_sites(model)
        x_TD = sample_inputs(model, sites, lambda: model(**inputs), None)
        setups = [random_setup(s, BenchConfig(), 8, x, 0) for s, x in zip(sites, x_TD, strict=True)]
        moe, other = to_moe(model, sites, setups, "torch"), without_ffns(model, sites)
        for layer in installed_layers(moe).values():
            layer.rule = TopK(6)  # all experts: the MoE is the dense model
        torch.testing.assert_close(moe(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(other(**inputs)[0], expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(model(**inputs)[0], expected)
    for key, (value, stride) in before.items():
        assert torch.equal(model.state_dict()[key], value) and model.state_dict()[key].stride() == stride
    assert not installed_layers(model)


def test_memory_counts_shared_storage_once_and_routers() -> None:
    model = tiny_model("opt")
    sites = find_sites(model)
    x_TD = [torch.randn(20, D) for _ in sites]
    setups = [random_setup(s, BenchConfig(), 8, x, 0) for s, x in zip(sites, x_TD, strict=True)]
    moe = to_moe(model, sites, setups, "torch")
    routers = sum(4 * tensor.numel() for recipe in setups for tensor in recipe.router.tensors().values())
    assert held_bytes(moe, installed_layers(moe).values()) == held_bytes(model) + routers
    assert held_bytes(share(model)) == held_bytes(model)
    unique = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    assert held_bytes(model) == sum(unique.values())


def test_rotation_has_as_many_layers_as_exceed_the_cache() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    x_TD = [torch.randn(20, D) for _ in sites]
    setups = [random_setup(s, BenchConfig(), 8, x, 0) for s, x in zip(sites, x_TD, strict=True)]
    one = 3 * D * F * 4
    layers = rotation(model, sites, setups, x_TD, "torch", 5 * one)
    assert len(layers.dense) == len(layers.moe) == 5
    assert len({ffn.up.weight.data_ptr() for ffn in layers.dense}) == 5
    for layer in layers.experts:
        layer.rule = TopK(6)
    with torch.no_grad():
        block = model.get_submodule(sites[0].up.rpartition(".")[0])
        torch.testing.assert_close(layers.dense[0](x_TD[0]), block(x_TD[0]))
        for dense, moe in zip(layers.dense, layers.moe, strict=True):
            torch.testing.assert_close(moe(x_TD[0]), dense(x_TD[0]), rtol=1e-4, atol=1e-4)


def test_random_routers_have_no_favourite() -> None:
    site = find_sites(tiny_model("opt"))[0]
    x_TD = torch.randn(256, D) + 3  # inputs with much in common
    for width in (None, 0):
        recipe = random_setup(site, BenchConfig(router_width=width), 8, x_TD, 0)
        ids_TK = TopK(1).select(recipe.router.scores(x_TD))
        assert int(torch.bincount(ids_TK.reshape(-1), minlength=6).max()) < 128


def test_share_of_firing_neurons() -> None:
    up, x_TD = nn.Linear(D, F, bias=False), torch.randn(400, D)
    set_firing(up, x_TD, 0.15)
    assert float((up(x_TD) > 0).float().mean()) == pytest.approx(0.15, abs=0.01)
    model = tiny_model("t5")
    sites, inputs = find_sites(model), tiny_inputs("t5", padded=False)
    x = sample_inputs(model, sites, lambda: model(**inputs), 0.25)
    again = sample_inputs(model, sites, lambda: model(**inputs), None)
    torch.testing.assert_close(x, again)  # biases were set in the order of the pass
    assert firing_share(model, find_sites(model), x) == pytest.approx(0.25, abs=0.05)


def test_recorder_sees_the_union_and_leaves_no_trace() -> None:
    model = tiny_model("opt")
    sites, inputs = find_sites(model), tiny_inputs("opt", padded=False)
    x_TD = [torch.randn(20, D) for _ in sites]
    setups = [random_setup(s, BenchConfig(), 8, x, 0) for s, x in zip(sites, x_TD, strict=True)]
    moe = to_moe(model, sites, setups, "dense")
    recorder, layers = Recorder(), installed_layers(moe)
    with torch.no_grad(), recorder.watch(layers):
        moe(**inputs)
    assert set(recorder.costs) == {site.name for site in sites}
    assert all(
        c.tokens == 21 and 1 <= c.experts_touched <= 6 and c.experts_per_token == 1 for c in recorder.costs.values()
    )
    assert all(layer.select is None and layer.backend == "dense" for layer in layers.values())


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_decoder_generates_what_generate_does(name: str) -> None:
    model = tiny_model(name)
    ids_BS = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    with torch.no_grad():
        new = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=5, do_sample=False)[:, -5:]
        decoder = Decoder(model, ids_BS, new_tokens=4)
        for _ in range(2):  # the second time from the prompt again
            found = []
            for _ in range(4):
                decoder.prepare()
                found.append(decoder.next_B1)
                decoder.step()
            found.append(decoder.next_B1)
            assert torch.equal(torch.cat(found, 1), new)


def test_a_stack_without_a_router_has_its_row() -> None:
    model = tiny_model("opt")
    site = find_sites(model)[0]
    always = PrunedFFN(ExpertWeights(live_weights(model, site), num_experts=5, num_shared=8))
    costs = [fixed_cost(site, always, 3, 4), fixed_cost(site, None, 3, 4)]
    found = measured([], costs, {"numba", "dense"})
    assert (found["top_k"], found["backend"], found["num_neurons"]) == (None, "dense+numba", F)
    assert found["active_fraction"] == pytest.approx((8 / F + 1) / 2)


def test_the_fastest_way_of_a_row() -> None:
    row: dict[str, Any] = {"moe_seconds": 2.0, "dense_seconds": 3.0, "peers": []}
    assert fastest_way(row) == "moe"
    assert fastest_way(row | {"dense_seconds": 1.0}) == "dense"
    peers = [{"peer": "compile", "seconds": None}, {"peer": "bfloat16", "seconds": 0.5}]  # the first was not timed
    assert fastest_way(row | {"peers": peers}) == "bfloat16"


def test_rows_in_which_dense_is_faster_are_said() -> None:
    fast: dict[str, Any] = {"mode": "ffn", "tokens": 1, "moe_seconds": 2.0, "dense_seconds": 3.0, "speedup": 1.5}
    slow = fast | {"tokens": 512, "dense_seconds": 1.8, "speedup": 0.9}
    assert slower_rows([fast]) == []
    assert slower_rows([fast, slow]) == ["dense is faster than the MoE in 1 of 2 rows: ffn of 512 tokens (0.90x)"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "modes"), [("opt", "ffn prefill decode"), ("t5", "ffn prefill decode"),
                                             ("bert-bare", "ffn prefill")])  # fmt: skip
def test_all_modes_of_a_model(name: str, modes: str, run_cli: Runner, tmp_path: Path) -> None:
    model = saved(name, tmp_path / name)
    found = run_cli.ok("bench", model, *QUICK, "--expert-size", 8, "--fractions", "0.2,1", "--threads", 1)
    rows = found["rows"]
    assert [row["mode"] for row in rows] == ["ffn"] * 4 + modes.split()[1:] * 2
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["dense_seconds"] > 0 and row["moe_seconds"] > 0 and row["min"] <= row["speedup"] <= row["max"]
        assert (row["expert_size"], row["d_model"], row["num_neurons"]) == (8, D, F)
        assert row["fastest"] == ("moe" if row["moe_seconds"] <= row["dense_seconds"] else "dense")
        if row["fraction"] == 1:
            assert row["bound"] == 1.0 and row["backend"] == "numba"  # the compiled kernel, every neuron on
        assert row["threads"] == 1 and row["repeats"] == 3
    assert [line["fastest"] for line in found["table"]] == [row["fastest"] for row in rows]
    assert [row["tokens"] for row in rows if row["fraction"] == 1][:3] == [1, 8, 8]
    assert found["hardware"]["processor"] and found["threads"] == 1
    assert {entry["of"] for entry in found["memory"]} == {"ffn", "model"}
    assert found["rates"]["flops_per_second"] > 0
    assert (rows[0]["firing"] is None) == (name == "bert-bare")  # GELU


def test_a_converted_run(run_cli: Runner, tmp_path: Path) -> None:
    model = tmp_path / "opt"
    save_tiny("opt", model)
    data = tmp_path / "data.txt"
    data.write_text("\n".join(" ".join(f"w{(7 * i + j * j) % 55}" for j in range(20)) for i in range(80)) + "\n")
    run = tmp_path / "run"
    run_cli.ok("collect-activations", run, "--model", model, "--data", data, "--documents", "line")
    run_cli.ok("split", run, "--method", "random", "--num-experts", 6)
    assert run_cli("bench", run, "--json").code == 3  # not converted yet
    run_cli.ok("train-router", run, "--router", "similarity")
    run_cli.ok("apply", run, "--top-k", 2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    rows = run_cli.ok("bench", run, *QUICK)["rows"]
    assert [row["mode"] for row in rows] == ["ffn", "ffn", "prefill", "decode"]
    (kind,) = {*load(run / "model").moefication.kinds(torch.float32).values()}
    kept = KernelTimes(str)
    measured_at = [kept.known(kind, 8, tokens) for tokens in TOKENS]
    assert all(measured_at) and kept.known(kind, 4, 1) is None
    assert all(row["top_k"] == 2 and row["num_experts"] == 6 for row in rows)
    rows = run_cli.ok("bench", run, *QUICK, "--mode", "ffn", "--backend", "torch")["rows"]  # says nothing of `auto`
    assert [KernelTimes(str).known(kind, 8, tokens) for tokens in TOKENS] == measured_at
    rows = run_cli.ok("bench", run / "model", *QUICK, "--mode", "ffn", "--fractions", "0.5")["rows"]
    assert [KernelTimes(str).known(kind, 8, tokens) for tokens in TOKENS] != measured_at  # measured anew
    assert all(row["top_k"] == 3 and row["fraction"] == 0.5 for row in rows)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    settings = {"vocab_size": 64, "d_model": D, "d_kv": 8, "d_ff": F, "num_heads": 2, "decoder_start_token_id": 0}
    like = shapes.SHAPES["t5-base"]
    shape = replace(like, settings=settings, layers=2, d_model=D, num_neurons=F, expert_size=8)
    monkeypatch.setitem(shapes.SHAPES, "t5-base", shape)
    return "t5-base"


def test_a_shape(run_cli: Runner, tiny_shape: str) -> None:
    found = run_cli.ok("bench", "--shape", tiny_shape, *QUICK, "--dtype", "bfloat16")
    assert [row["mode"] for row in found["rows"]] == ["ffn", "ffn", "prefill", "decode"]
    for row in found["rows"]:
        assert row["dtype"] == "bfloat16" and row["firing"] == pytest.approx(0.15, abs=0.06)
    gelu = run_cli.ok("bench", "--shape", tiny_shape, *QUICK, "--activation", "gelu", "--mode", "ffn")
    assert gelu["rows"][0]["activation"] == "gelu_tanh" or gelu["rows"][0]["activation"] == "gelu"
    assert gelu["rows"][0]["firing"] is None


def test_the_sizes_of_shapes_are_those_of_their_configurations() -> None:
    for name, shape in shapes.SHAPES.items():
        with torch.device("meta"):
            model = shape_model(name, dtype=torch.float32, device=torch.device("meta"), seed=0, ffn_layers=1)
            sites = find_sites(model)
        assert {(s.d_model, s.num_neurons, s.gated) for s in sites} == {(shape.d_model, shape.num_neurons, shape.gated)}
        assert shape.num_neurons % shape.expert_size == 0, name
    with pytest.raises(ConfigError, match="t5-huge") as caught:
        find_shape("t5-huge")
    assert "t5-base" in caught.value.hint
    with pytest.raises(ConfigError, match="nonesuch"):
        shape_model("t5-base", dtype=torch.float32, device=CPU, seed=0, activation="nonesuch", ffn_layers=1)


def test_mistakes(run_cli: Runner, tmp_path: Path) -> None:
    bert = saved("bert-bare", tmp_path / "bert")

    def fails(*words: object) -> str:
        outcome = run_cli("bench", *words, "--json")
        assert outcome.code == 2, (outcome.code, outcome.err)
        assert "Traceback" not in outcome.err
        return str(outcome.json["error"]["message"])

    assert "nowhere" in fails(tmp_path / "nowhere")
    assert "t5-huge" in fails("--shape", "t5-huge")
    assert "MODEL_OR_RUN or --shape" in fails()
    fails(bert, "--shape", "t5-base")
    assert "training" in fails(bert, "--mode", "training")
    assert "decode" in fails(bert, "--mode", "decode")
    assert "decode" in fails("--shape", "bert-large", "--mode", "decode")
    assert "--tokens" in fails(bert, "--tokens", "1,x")
    fails(bert, "--fractions", "2")
    assert "divide" in fails(bert, "--expert-size", 7)
    assert "divide" in fails(bert, "--num-experts", 7)
    assert "fast" in fails(bert, "--backend", "fast")
    assert "one thread" in fails(bert, "--clock", "cpu")
    assert "positions" in fails(bert, "--mode", "prefill", "--seq", "100", "--expert-size", 8)


def test_dry_run_and_table(run_cli: Runner, tmp_path: Path) -> None:
    assert run_cli.ok("bench", "--shape", "opt-1.3b", "--dry-run")["dry_run"]
    outcome = run_cli("bench", saved("opt", tmp_path / "opt"), *QUICK, "--mode", "ffn", "--expert-size", 8)
    assert outcome.code == 0
    assert "bound" in outcome.out and "GB/s" in outcome.out and "memory" in outcome.out
    with pytest.raises(json.JSONDecodeError):
        json.loads(outcome.out)


def test_ffn_alone_is_the_models_own() -> None:
    model = tiny_model("bert-bare")
    site = find_sites(model)[0]
    layer = model.encoder.layer[0]
    x = torch.randn(3, D)
    with torch.no_grad():
        expected = layer.output.dense(layer.intermediate(x))
        torch.testing.assert_close(FFN(model, site)(x), expected)
