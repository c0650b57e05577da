"""Layers with nothing to cluster or to route: zeros, equal rows, one expert, experts of one neuron."""

from pathlib import Path

import torch
from cli_runner import Runner
from test_stages import write_data
from tiny_models import tiny_model, tiny_tokenizer

from moefication_cli.store.layerfile import read_layer


def test_a_layer_of_zeros_and_one_of_equal_rows_go_through_every_method(run_cli: Runner, tmp_path: Path) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        zero, equal = (layer.intermediate.dense for layer in model.bert.encoder.layer)
        zero.weight.zero_()
        zero.bias.zero_()
        equal.weight.copy_(equal.weight[:1].expand_as(equal.weight))
        equal.bias.fill_(0.1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    run, data = tmp_path / "run", write_data(tmp_path / "train", "classification", 120, 0)
    run_cli.ok("collect-activations", run, "--model", tmp_path / "model", "--data", data)
    assert run_cli.ok("build-graph", run)["rows"][0]["isolated"] == 48
    for method, experts in [("kmeans", 6), ("graph", 6), ("graph", 1), ("random", 48), ("activation", 12)]:
        run_cli.ok("split", run, "--method", method, "--num-experts", experts)
        for index in range(2):
            tensors, _ = read_layer(run / "split" / f"layer_{index:03d}.safetensors")
            assert torch.bincount(tensors["expert_F"]).tolist() == [48 // experts] * experts, method
    for router in ("regression", "mlp", "similarity"):
        trained = run_cli.ok("train-router", run, "--router", router)
        assert all(0 <= row["router"] <= 1 for layer in trained["metrics"]["layers"] for row in layer["captured"])
