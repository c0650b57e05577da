"""bench --peers: other ways to run the stock model, in the same turns; what they compute, and what is said where there is none."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cli_runner import Runner
from test_bench import QUICK
from tiny_models import save_tiny, tiny_model

from moefication_cli.benchmark.calls import Decoder
from moefication_cli.benchmark.layers import FFN
from moefication_cli.benchmark.peers import PEERS, Peer, peer_ffn_call, peer_ffns, peer_models
from moefication_cli.benchmark.rows import prefill_call
from moefication_cli.config.tools import PeerName
from moefication_cli.errors import UnavailableError
from moefication_cli.export.engine import has_engine
from moefication_cli.models.sites import find_sites

IDS_BS = torch.arange(3, 11)[None]
needs_llama_cpp = pytest.mark.skipif(not has_engine(), reason="llama-cpp-python is not installed")


def test_every_peer_can_be_asked_for() -> None:
    assert get_args(PeerName) == ("all", *PEERS)


@pytest.mark.parametrize("name", ["opt", "t5"])
@torch.inference_mode()
def test_peers_compute_the_same_within_their_rounding(name: str) -> None:
    model = tiny_model(name)
    site = find_sites(model)[0]
    ffns, inputs_TD = [FFN(model, site), FFN(model, site)], [torch.randn(8, site.d_model) for _ in range(2)]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # Compiling a whole model takes most of a minute: once is enough
    asked = [peer for peer in PEERS if peer != "llama.cpp" and (peer != "compile" or name == "opt")]
    of_ffns = [peer for peer in PEERS if "ffn" in PEERS[peer].modes]
    for one in [*peer_models(asked, model, IDS_BS), *peer_ffns(of_ffns, ffns, inputs_TD)]:
        peer = PEERS[one.name]
        if any(find_spec(package) is None for package in peer.needs):
            assert one.runs is None and one.why == f"not installed: {peer.install}"
            continue
        assert one.why is None and one.error is not None and one.error <= peer.rounding
        assert (one.error > 1e-4) == (one.name not in ("float32", "compile"))  # its own arithmetic ran
        call = peer_ffn_call(one, inputs_TD, 4) if isinstance(one.runs, list) else prefill_call(one.runs, IDS_BS)
        call.prepare()
        call.run()
    # Their dtypes and their compilation are theirs alone
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module._compiled_call_impl is None for module in model.modules())


@needs_llama_cpp
@torch.inference_mode()
def test_llama_cpp_runs_a_llama_and_nothing_else() -> None:
    model = tiny_model("llama")
    (one,) = peer_models(["llama.cpp"], model, IDS_BS)
    assert one.why is None and one.error is not None and 1e-4 < one.error < PEERS["llama.cpp"].rounding
    ids_BS = torch.cat([IDS_BS, IDS_BS.flip(1)])
    logits_BSV = one.runs(input_ids=ids_BS)[0]  # a sequence knows nothing of the one before it
    expected_BSV = model(input_ids=ids_BS).logits
    assert float((logits_BSV - expected_BSV).norm() / expected_BSV.norm()) < PEERS["llama.cpp"].rounding
    assert float((logits_BSV - expected_BSV.flip(0)).norm() / expected_BSV.norm()) > PEERS["llama.cpp"].rounding
    mine, other = Decoder(model, IDS_BS, 4), Decoder(one.runs, IDS_BS, 4)
    for decoder in (mine, other):
        decoder.prepare()
        decoder.step()
    assert torch.equal(mine.next_B1, other.next_B1)
    with pytest.raises(UnavailableError, match="one sequence"):
        one.runs(input_ids=ids_BS[:, :1], past_key_values=True)
    (refused,) = peer_models(["llama.cpp"], tiny_model("opt"), IDS_BS)
    assert refused.why == "cannot run this model: llama.cpp is timed for Llama models, this is opt"
    site = find_sites(model)[0]
    (ffn,) = peer_ffns(["llama.cpp"], [FFN(model, site)], [torch.randn(8, site.d_model)])
    assert ffn.runs is None and not ffn.can("ffn")


def test_rows_of_peers(run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, inputs: Any) -> Any:
        for parameter in module.parameters():
            parameter.data = parameter.data * 1.5
        return module

    def refuse(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no such operator")

    monkeypatch.setitem(PEERS, "bfloat16", replace(PEERS["bfloat16"], make=wrong))
    monkeypatch.setitem(PEERS, "compile", Peer(refuse))
    monkeypatch.setitem(PEERS, "openvino-int8", replace(PEERS["openvino-int8"], needs=("no_such_package",)))
    save_tiny("opt", tmp_path / "opt")
    words = ("bench", tmp_path / "opt", *QUICK, "--expert-size", 8, "--device", "cpu", "--peers")
    found = run_cli.ok(*words, "all")
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        peers = {peer["peer"]: peer for peer in row["peers"]}
        assert list(peers) == list(PEERS)
        assert peers["openvino-int8"]["said"] == "not installed: pip install 'moefication[openvino]'"
        assert peers["compile"]["said"] == "cannot run this model: no such operator"
        for name in ("float32", "bfloat16", "dynamic-int8"):
            peer = peers[name]
            assert peer["seconds"] > 0 and 0 < peer["min"] <= peer["speedup"] <= peer["max"]
            assert peer["within_rounding"] is (name != "bfloat16")
    lines = [row["over"] for row in found["table"]]
    assert lines[:2] == ["dense", "float32"] and len(lines) == 4 * 7
    assert "openvino-int8: not installed: pip install 'moefication[openvino]'" in lines
    said = run_cli(*words, "bfloat16", "--mode", "decode")
    assert "warning: the output of bfloat16 differs from dense" in " ".join(said.out.split())
    plain = run_cli.ok("bench", tmp_path / "opt", *QUICK, "--mode", "ffn", "--expert-size", 8, "--device", "cpu")
    assert plain["rows"][0]["peers"] == [] and "over" not in plain["table"][0]


def test_with_int8_weights_peers_are_made_of_the_float_model(run_cli: Runner, tmp_path: Path) -> None:
    save_tiny("opt", tmp_path / "opt")
    words = ("--expert-size", 8, "--device", "cpu", "--weights", "int8", "--mode", "ffn,prefill")
    found = run_cli.ok("bench", tmp_path / "opt", *QUICK, *words, "--peers", "float32")
    assert [peer["error"] for row in found["rows"] for peer in row["peers"]] == [0.0] * len(found["rows"])


def test_what_peers_do_not_go_with(run_cli: Runner) -> None:
    outcome = run_cli("bench", "--experts", "anything", "--peers", "all", "--device", "cpu", "--json")
    assert outcome.code == 2 and "--peers" in outcome.json["error"]["message"]
    outcome = run_cli("bench", "--shape", "t5-base", "--peers", "tensorrt", "--json")
    assert outcome.code == 2 and "tensorrt" in outcome.json["error"]["message"]
