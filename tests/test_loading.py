"""Checkpoints and loading: sources in every layout, what a user can get wrong, converted folders and their routers."""

import json
import os
import pickle
import stat

import pytest
import torch
import transformers
from converted import convert, orders_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_inputs

from moefication_cli.errors import (
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    UnavailableError,
    UnsupportedModelError,
)
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import layer_tensors, read_moe_folder, write_moe_settings
from moefication_cli.models.loading import load, load_model, resolve_device, resolve_dtype
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import installed_layers, live_weights
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.store import jsonio


def same_function(model, folder, name):
    inputs = tiny_inputs(name)
    other = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.allclose(model(**inputs).logits, other(**inputs).logits, atol=1e-4)


def test_sharded_source_keeps_its_files(tmp_path):
    model = save_tiny("llama", tmp_path / "a", max_shard_size="10KB")
    checkpoint = Checkpoint(tmp_path / "a")
    assert len(checkpoint.files) > 2
    orders = orders_of(checkpoint)
    written = checkpoint.write_permuted(tmp_path / "b", orders)
    assert {p.name for p in written} >= {p.name for p in checkpoint.files} | {
        "model.safetensors.index.json",
        "config.json",
    }
    assert same_function(model, tmp_path / "b", "llama")
    site = checkpoint.sites[1]
    again = Checkpoint(tmp_path / "b").read_ffn(site)
    assert torch.equal(again.w_gate_FD, live_weights(model, site).w_gate_FD[orders[site.name]])
    (tmp_path / "a" / checkpoint.files[1].name).unlink()
    with pytest.raises(ConfigError, match=f"lacks {checkpoint.files[1].name}"):
        Checkpoint(tmp_path / "a")


def test_copy_is_bytewise_apart_from_the_neurons(tmp_path):
    save_tiny("gpt2", tmp_path / "a")
    (tmp_path / "a" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "a" / "LICENSE").write_text("MIT")
    half = {k: v.to(torch.bfloat16) for k, v in load_file(tmp_path / "a" / "model.safetensors").items()}
    save_file({**half, "steps": torch.arange(3)}, tmp_path / "a" / "model.safetensors")  # without metadata
    checkpoint = Checkpoint(tmp_path / "a")
    orders = orders_of(checkpoint)
    mask = os.umask(0o022)
    checkpoint.write_permuted(tmp_path / "b", orders)
    checkpoint.write_permuted(tmp_path / "c", orders)
    os.umask(mask)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    touched = {checkpoint.locate(p.parameter)[1] for s in checkpoint.sites for p in s.slices() if p.axis is not None}
    assert before.keys() == after.keys() and len(touched) == 6
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.shape == after[key].shape
        assert torch.equal(value, after[key]) != (key in touched and value.any().item())
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert stat.S_IMODE((tmp_path / "b" / "model.safetensors").stat().st_mode) == 0o644
    assert (tmp_path / "b" / "LICENSE").exists() and not (tmp_path / "b" / "evil.py").exists()
    assert (tmp_path / "b" / "tokenizer.json").exists()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_order_must_be_a_permutation(tmp_path):
    save_tiny("llama", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"layers\.0.*not a permutation"):
        checkpoint.write_permuted(tmp_path / "b", {"layers.0": torch.zeros(48, dtype=torch.int64)})
    with pytest.raises(ConfigError, match=r"no FFN 'layers\.9'"):
        checkpoint.write_permuted(tmp_path / "b", {"layers.9": torch.arange(48)})


def test_pickled_source_is_read_and_written_as_safetensors(tmp_path):
    model = save_tiny("bert", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path / "a")
    site = checkpoint.sites[0]
    assert torch.equal(checkpoint.read_ffn(site).w_down_FD, live_weights(model, site).w_down_FD)
    written = checkpoint.write_permuted(tmp_path / "b", orders_of(checkpoint))
    assert "model.safetensors" in {p.name for p in written} and same_function(model, tmp_path / "b", "bert")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    save_tiny("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"bert.pooler.dense.bias": Evil()}, file, protocol=2)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"refused by torch\.load"):
        checkpoint.read_ffn(checkpoint.sites[0])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu", quiet=True)
    assert not (tmp_path / "ran").exists()


def test_names_in_the_file_need_not_be_names_in_the_model(tmp_path):
    # a bare model's weights under a headed configuration, and a headed file under a bare one
    model = save_tiny("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {key.removeprefix("bert."): value for key, value in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    site = find_sites(model)[1]
    assert torch.equal(Checkpoint(tmp_path).read_ffn(site).w_up_FD, live_weights(model, site).w_up_FD)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.sites[1].up == "encoder.layer.1.intermediate.dense"
    assert torch.equal(checkpoint.read_ffn(checkpoint.sites[1]).w_up_FD, live_weights(model, site).w_up_FD)


def test_renames_between_transformers_versions(tmp_path):
    # ViT: `vit.encoder.layer.N.intermediate.dense` on the hub, `vit.layers.N.mlp.fc1` in transformers 5
    model = save_tiny("vit", tmp_path, tokenizer=False)
    keys = load_file(tmp_path / "model.safetensors")
    old = {}
    for key, value in keys.items():
        key = key.replace("vit.layers.", "vit.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
        old[key.replace("mlp.fc2", "output.dense")] = value
    assert "vit.encoder.layer.1.intermediate.dense.weight" in old
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    site = checkpoint.sites[1]
    assert torch.equal(checkpoint.read_ffn(site).w_down_FD, live_weights(model, site).w_down_FD)


def test_fingerprint_follows_weights_and_config(tmp_path):
    save_tiny("bert", tmp_path)
    first = Checkpoint(tmp_path).fingerprint()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Checkpoint(tmp_path).fingerprint() == first
    seen = []
    Checkpoint(tmp_path).fingerprint(lambda path: seen.append(path.name) or "x")
    assert seen == ["config.json", "model.safetensors"]
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Checkpoint(tmp_path).fingerprint() != first


def test_describe(tmp_path):
    model = save_tiny("bert", tmp_path)
    found = Checkpoint(tmp_path).describe()
    assert found["parameters"] == model.num_parameters()
    assert found["ffn_parameters"] == 2 * (2 * 16 * 48 + 48 + 16)
    assert found["ffn_share"] == pytest.approx(found["ffn_parameters"] / found["parameters"])
    assert found["divisors"] == {"48": [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]}
    assert found["ffns"][1] | {"layer": "encoder.layer.1", "activation": "relu", "gated": False} == found["ffns"][1]
    json.dumps(found, allow_nan=False)


def test_missing_and_broken_models(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for ref in (tmp_path / "nothing", "no-such-org/no-such-model", "a/b/c"):
        with pytest.raises(ConfigError, match="model not found") as caught:
            Checkpoint(ref)
        assert caught.value.hint and caught.value.exit_code == 2
        with pytest.raises(ConfigError, match="model not found"):
            load_model(ref, device="cpu")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    save_tiny("bert", tmp_path, tokenizer=False)
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_model(tmp_path, device="cpu", quiet=True)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match=r"cannot read config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads(config) | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UnsupportedModelError, match="awq"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"intermediate_size": 64}))
    with pytest.raises(ConfigError, match="the configuration says"):
        checkpoint = Checkpoint(tmp_path)
        checkpoint.read_ffn(checkpoint.sites[0])
    (tmp_path / "config.json").write_text(config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint = Checkpoint(tmp_path)
        checkpoint.read_ffn(checkpoint.sites[0])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu", tokenizer=False, quiet=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_index_cannot_point_outside(tmp_path):
    save_tiny("bert", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside its folder"):
        Checkpoint(tmp_path / "a")


def test_load_model_heads_dtypes_devices(tmp_path):
    save_tiny("bert", tmp_path / "bert")
    loaded = load_model(tmp_path / "bert", device="cpu", quiet=True)
    assert type(loaded.model).__name__ == "BertForSequenceClassification" and not loaded.model.training
    assert loaded.tokenizer("w1 w2").input_ids == [4, 5] and loaded.dtype == torch.float32
    assert load_model(tmp_path / "bert", device="cpu", dtype="bfloat16", quiet=True).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors of BertLMHeadModel"):
        load_model(tmp_path / "bert", task="lm", device="cpu", quiet=True)
    with pytest.raises(ConfigError, match="unknown task"):
        load_model(tmp_path / "bert", task="poetry", device="cpu")
    with pytest.raises(ConfigError, match="unknown dtype"):
        resolve_dtype("float12", torch.device("cpu"))
    for bad in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ConfigError, match="unknown device"):
            resolve_device(bad)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="no CUDA"):
            resolve_device("cuda:1")
        assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["t5", "bert", "llama", "gpt2", "opt"])
def test_converted_folder_loads_as_moe_and_as_dense(name, tmp_path):
    model = convert(name, tmp_path / "moe", top_k=2, dense=(1,))
    assert same_function(model, tmp_path / "moe", name)  # plain from_pretrained
    inputs = tiny_inputs(name, padded=False)
    with torch.no_grad():
        dense = model(**inputs).logits
        moe = load(tmp_path / "moe", device="cpu", backend="torch")
        layers = installed_layers(moe)
        assert len(layers) == len(find_sites(model)) - 1
        assert {layer.rule.top_k for layer in layers.values()} == {2}
        assert not torch.allclose(moe(**inputs).logits, dense, atol=1e-2)
        whole = load(tmp_path / "moe", device="cpu", fraction=1.0)
        assert torch.allclose(whole(**inputs).logits, dense, atol=1e-4)
    if name in ("llama", "gpt2", "opt"):
        assert moe.generate(**inputs, max_new_tokens=4, pad_token_id=0).shape == (3, 11)


def test_converted_folder_keeps_compensation(tmp_path):
    convert("bert", tmp_path / "moe", top_k=3, extra=True)
    layer = read_moe_folder(tmp_path / "moe").layers[0]
    assert layer.compensation.w_in_RD.shape == (2, 16) and layer.compensation.constant_D.shape == (16,)
    assert load(tmp_path / "moe", device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def edit(path, change):
    """Changes the settings and their digest: each field is checked as well."""
    settings = json.loads(path.read_text())
    change(settings)
    settings["digest"] = jsonio.digest({name: value for name, value in settings.items() if name != "digest"})
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("schema", lambda s: s.update(schema="moefication/model@9")),
        ("lists no layers", lambda s: s.update(layers=[])),
        ("not the FFNs", lambda s: s["layers"][0].update(layer="encoder.layer.7")),
        ("twice", lambda s: s["layers"][0].update(layer="encoder.layer.1")),
        ("top_k", lambda s: s["layers"][0]["rule"].update(top_k=7)),
        ("top_k", lambda s: s["layers"][0]["rule"].update(top_k=True)),
        ("rule", lambda s: s["layers"][0].update(rule={})),
        ("count", lambda s: s["layers"][0].update(num_experts=0)),
        ("scores 6 experts|not of shape|does not fit", lambda s: s["layers"][0].update(num_experts=7)),
        ("does not fit", lambda s: s["layers"][0].update(num_shared=5)),
        ("not a share", lambda s: s["layers"][0].update(ffn_flops_fraction="0.2")),
        ("not a share", lambda s: s["layers"][0].update(ffn_flops_fraction=-1)),
        ("known activation", lambda s: s["layers"][0]["router"].update(activation="softmax")),
        ("no layer uses", lambda s: s["layers"][0].update(dense=True)),
        ("was altered", lambda s: s["tensors"].update(sha256="0" * 64)),
        ("does not say", lambda s: s.pop("tensors")),
    ],
)
def test_altered_settings_are_refused(what, change, tmp_path):
    convert("bert", tmp_path / "moe", top_k=2)
    edit(tmp_path / "moe" / "moefication" / "moefication.json", change)
    with pytest.raises(CorruptArtifactError, match=what):
        load(tmp_path / "moe", device="cpu")


def test_layers_know_what_share_of_the_work_a_token_costs(tmp_path):
    """By which `auto` chooses on a GPU, where a rule gives tokens different numbers of experts."""
    convert("bert", tmp_path / "moe", top_k=2)
    assert {layer.share for layer in installed_layers(load(tmp_path / "moe", device="cpu")).values()} == {0}
    edit(
        tmp_path / "moe" / "moefication" / "moefication.json", lambda s: s["layers"][1].update(ffn_flops_fraction=0.25)
    )
    layers = list(installed_layers(load(tmp_path / "moe", device="cpu")).values())
    assert [layer.share for layer in layers] == [0, 0.25] + [0] * (len(layers) - 2)


def test_missing_or_altered_routers_are_refused(tmp_path):
    convert("bert", tmp_path / "moe", top_k=2)
    folder = tmp_path / "moe" / "moefication"
    data = bytearray((folder / "routers.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "routers.safetensors").write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        load(tmp_path / "moe", device="cpu")
    (folder / "routers.safetensors").unlink()
    with pytest.raises(CorruptArtifactError, match="is missing"):
        load(tmp_path / "moe", device="cpu")
    with pytest.raises(MissingArtifactError, match="not a MoEfied model"):
        load(tmp_path / "source", device="cpu")
    with pytest.raises(CorruptArtifactError, match="no router tensors"):
        entry = {
            "layer": "x",
            "num_experts": 2,
            "rule": {"top_k": 1},
            "router": {"activation": "tanh", "normalise": True},
        }
        write_moe_settings(tmp_path / "new", {"layers": [entry]}, {})


def test_nan_router_is_refused(tmp_path):
    tensors = layer_tensors(0, TwoLayerRouter(torch.full((2, 4), float("nan"))))
    entry = {"layer": "x", "num_experts": 2, "rule": {"top_k": 1}, "router": {"activation": "tanh", "normalise": True}}
    with pytest.raises(CorruptArtifactError, match="not usable"):
        write_moe_settings(tmp_path, {"layers": [entry]}, tensors)


@pytest.mark.parametrize("name", ["bert-relu-minilm-sst2", "t5-relu-sst2", "opt-relu-wikitext2", "llama-stories260k"])
def test_real_models(name, shared_dir, tmp_path):
    folder = shared_dir / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no {name}")
    checkpoint = Checkpoint(folder)
    checkpoint.write_permuted(tmp_path, orders_of(checkpoint))
    a, b = (load_model(path, device="cpu", quiet=True) for path in (folder, tmp_path))
    inputs = a.tokenizer(["it 's a charming and often affecting journey", "bad"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    if checkpoint.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.allclose(a.model(**inputs).logits, b.model(**inputs).logits, atol=1e-3)
    assert isinstance(a.model, transformers.PreTrainedModel)
