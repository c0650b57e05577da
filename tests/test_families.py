"""Every FAMILIES row on a tiny random model: found, replaced, captured, permuted, streamed; with negative controls."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from tiny_models import ENCODER_DECODERS, READS_TARGETS, TINY, save_tiny, tiny_inputs, tiny_model

from moefication_cli.errors import ConfigError, UnsupportedModelError
from moefication_cli.ffn import ACTIVATIONS, ExpertWeights
from moefication_cli.models.capture import capture
from moefication_cli.models.families import FAMILIES
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.masking import TokenMask
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import (
    install,
    installed_layers,
    live_weights,
    permute_in_place,
    uninstall,
)

NAMES = sorted(TINY)


class Masked:
    """A stand-in for MoEFFN: the dense FFN with some neurons switched off, weights renewed by `install`."""

    def __init__(self, model, site, off=0):
        self.weights = ExpertWeights(live_weights(model, site), num_experts=1)
        self.keep = torch.ones(site.num_neurons)
        self.keep[:off] = 0
        self.calls, self.padding = 0, 0

    def __call__(self, x, token_mask=None):
        self.calls += 1
        if token_mask is not None:
            assert token_mask.shape == x.shape[:-1]
            self.padding += int((~token_mask).sum())
        ffn = self.weights.ffn
        y = (ffn.hidden(x) * self.keep.to(x.dtype)) @ ffn.w_down_FD
        return y if ffn.b_down_D is None else y + ffn.b_down_D


def logits(model, name, **options):
    with torch.no_grad():
        out = model(**tiny_inputs(name, **options))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def put(model, off=0, token_mask=None):
    sites = find_sites(model)
    layers = [Masked(model, site, off) for site in sites]
    for site, layer in zip(sites, layers, strict=True):
        install(model, site, layer, token_mask)
    return sites, layers


def close(a, b, tolerance=1e-4):
    return (a.float() - b.float()).abs().max().item() <= tolerance * (1 + b.float().abs().max().item())


def test_every_row_has_a_tiny_model():
    found = {site.family for name in NAMES for site in find_sites(tiny_model(name))}
    assert found == {spec.name for spec in FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_sites(name):
    model = tiny_model(name)
    sites = find_sites(model)
    encoder_decoder = name in ENCODER_DECODERS
    assert [site.index for site in sites] == list(range(4 if encoder_decoder else 2))
    assert [site.stack for site in sites] == ["encoder"] * 2 + ["decoder"] * (2 if encoder_decoder else 0)
    for site in sites:
        assert (site.d_model, site.num_neurons) == (16, 64 if name in ("bloom", "mpt") else 48)
        assert site.activation in ACTIVATIONS
        assert site.num_parameters == sum(
            model.get_parameter(name).numel() for name in {p.parameter for p in site.slices()}
        )
    assert len({site.name for site in sites}) == len(sites)


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_the_same_while_something_is_installed(name):
    model = tiny_model(name)
    sites, state = find_sites(model), list(model.state_dict())
    for site in sites:
        install(model, site, lambda x, token_mask=None: x)
    assert find_sites(model) == sites and list(model.state_dict()) == state


def test_names_do_not_depend_on_the_head():
    bare, headed = find_sites(tiny_model("bert-bare")), find_sites(tiny_model("bert"))
    assert [site.name for site in bare] == [site.name for site in headed] == ["encoder.layer.0", "encoder.layer.1"]
    assert headed[0].up == "bert.encoder.layer.0.intermediate.dense"
    assert find_sites(tiny_model("opt"))[0].name == "decoder.layers.0"
    assert find_sites(tiny_model("t5"))[2].name == "decoder.block.0.layer.2"


@pytest.mark.parametrize("name", NAMES)
def test_replacement_equals_dense_and_half_the_neurons_do_not(name):
    model = tiny_model(name)
    dense, names = logits(model, name), list(model.state_dict())
    sites, layers = put(model)
    assert list(model.state_dict()) == names
    assert close(logits(model, name), dense)
    assert [layer.calls for layer in layers] == [1] * len(sites)
    assert list(installed_layers(model)) == [site.name for site in sites]
    put(model, off=sites[0].num_neurons // 2)
    assert not close(logits(model, name), dense, 1e-2)
    for site in sites:
        uninstall(model, site)
    assert installed_layers(model) == {}
    assert close(logits(model, name), dense)


def test_layers_installed_in_turns_keep_what_they_prepared():
    model = tiny_model("opt")
    site = find_sites(model)[0]
    first, second = Masked(model, site), Masked(model, site, off=24)
    seen = []
    for layer in (first, second, first, second):
        install(model, site, layer)
        logits(model, "opt")
        seen.append(layer.weights)
    assert seen[2] is seen[0] and seen[3] is seen[1]
    model.to(torch.float64)  # other memory: now they must be renewed
    install(model, site, first)
    logits(model, "opt")
    assert first.weights is not seen[0]
    assert first.weights.ffn.w_up_FD.data_ptr() == model.get_parameter(site.up + ".weight").data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_dtype_and_save_of_an_installed_model(name, tmp_path):
    model = tiny_model(name)
    dense = logits(model, name)
    put(model, off=24)
    sparse = logits(model, name)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert close(logits(twin, name), sparse)  # shares nothing with the zeroed original
    for site in find_sites(twin):
        layer = installed_layers(twin)[site.name]
        assert layer.weights.ffn.w_down_FD.data_ptr() == twin.get_parameter(site.down + ".weight").data_ptr()
        assert layer.weights.ffn.w_down_FD.is_contiguous() and layer.weights.ffn.w_up_FD.is_contiguous()
    twin.to(torch.bfloat16)
    if name != "vit":
        half = logits(twin, name)
        assert half.dtype == torch.bfloat16 and close(half, sparse, 0.2)
    twin.to(torch.float32)
    fresh = tiny_model(name)
    put(fresh, off=24)
    fresh.save_pretrained(tmp_path)
    assert close(logits(type(fresh).from_pretrained(tmp_path).eval(), name), dense)


@pytest.mark.parametrize("name", NAMES)
def test_capture_delivers_real_tokens_only(name):
    model = tiny_model(name)
    sites, seen, hidden = find_sites(model), {}, {}
    with capture(model, sites, lambda s, x: seen.update({s.index: x}), lambda s, h: hidden.update({s.index: h})):
        logits(model, name)
    real = {"encoder": 3 * 5 if name == "vit" else 14, "decoder": 8 if name in READS_TARGETS else 14}
    for site in sites:
        assert seen[site.index].shape == (real[site.stack], site.d_model)
        assert close(live_weights(model, site).hidden(seen[site.index]), hidden[site.index])
    if name == "vit":
        return
    # What stands at padded positions must not matter to what is captured
    again, inputs = {}, tiny_inputs(name)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 9, inputs["input_ids"])
    with capture(model, sites, lambda s, x: again.update({s.index: x})), torch.no_grad():
        model(**inputs)
    assert all(close(again[i], seen[i]) for i in seen)
    count = Counter()
    with capture(model, sites, lambda s, x: count.update({s.index: len(x)})):
        logits(model, name, padded=False)
    assert count[0] == 21  # control: without padding, more tokens
    logits(model, name)
    assert count[0] == 21  # nothing is heard after the context closed


@pytest.mark.parametrize("name", NAMES)
def test_permuted_copy_and_streaming(name, tmp_path):
    model = save_tiny(name, tmp_path / "dense")
    dense = logits(model, name)
    checkpoint = Checkpoint(tmp_path / "dense")
    sites = find_sites(model)
    assert checkpoint.sites == sites
    for site in sites:
        streamed, live = checkpoint.read_ffn(site), live_weights(model, site)
        assert all(
            torch.equal(value, getattr(live, key)) for key, value in vars(streamed).items() if torch.is_tensor(value)
        )
        assert streamed.w_down_FD.is_contiguous() and streamed.w_up_FD.is_contiguous()
        assert streamed.activation == site.activation
    orders = {site.name: torch.randperm(site.num_neurons) for site in sites}
    checkpoint.write_permuted(tmp_path / "moe", orders)
    permuted, info = type(model).from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert close(logits(permuted.eval(), name), dense)
    for site in sites:
        order = orders[site.name]
        assert torch.equal(live_weights(permuted, site).w_down_FD, live_weights(model, site).w_down_FD[order])
        permute_in_place(model, site, order)
    assert close(logits(model, name), dense)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), permuted.state_dict().values(), strict=True)
    )
    # control: the up rows alone in another order are another function
    weight = permuted.get_parameter(sites[0].up + ".weight")
    weight.data = weight.data.flip(1 if sites[0].conv1d else 0)
    assert not close(logits(permuted, name), dense, 1e-3)


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "t5", "bart"])
def test_generation_with_cache_routes_no_padding(name):
    model = tiny_model(name)
    encoder_decoder = name in ("t5", "bart")
    ids, mask = (tiny_inputs(name)[key] for key in ("input_ids", "attention_mask"))
    inputs = (
        {"input_ids": ids, "attention_mask": mask}
        if encoder_decoder
        else {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    )
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    token_mask = TokenMask(model)
    sites, layers = put(model, token_mask=token_mask)
    assert torch.equal(model.generate(**inputs, **options), expected)
    # the padding of the prompt is seen once, by the stack that reads the prompt, and never again while decoding
    assert [layer.padding for layer in layers] == [7 if site.stack == "encoder" else 0 for site in sites]
    assert token_mask.mask_for("encoder", (3, 7)) is None  # cleared after the pass


def test_mask_is_cleared_when_a_pass_fails():
    model = tiny_model("bert")
    token_mask = TokenMask(model)
    with pytest.raises(Exception, match=r".*"):
        model(input_ids=torch.tensor([[10**6, 1]]), attention_mask=torch.ones(1, 2))
    assert token_mask.mask_for("encoder", (1, 2)) is None


def test_a_decoder_without_inputs_of_its_own_has_the_encoders_mask():
    model, real = tiny_model("bart-classifier"), tiny_inputs("bart-classifier")["attention_mask"].bool().flatten()
    heard, token_mask = [], TokenMask(model)
    model.model.decoder.register_forward_pre_hook(lambda *_: heard.append(token_mask.mask_for("decoder", (3, 7))))
    model(**tiny_inputs("bart-classifier"))
    model(**tiny_inputs("bart-classifier"), labels=torch.tensor([0, 1, 2]))  # classes, which no decoder reads
    assert all(torch.equal(mask, real) for mask in heard) and len(heard) == 2
    model, heard = tiny_model("bart"), []
    token_mask = TokenMask(model)
    model.model.decoder.register_forward_pre_hook(lambda *_: heard.append(token_mask.mask_for("decoder", (3, 7))))
    inputs = {key: tiny_inputs("bart")[key] for key in ("input_ids", "attention_mask")}
    model(**inputs)
    model(**inputs, labels=torch.full((3, 7), 5))  # the decoder reads the labels, and nothing says which are real
    assert torch.equal(heard[0], inputs["attention_mask"].bool().flatten()) and heard[1] is None


def test_t5_half_precision_keeps_the_wide_down_projection(tmp_path):
    save_tiny("t5", tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).eval()
    site = find_sites(model)[0]
    assert model.get_parameter(site.down + ".weight").dtype == torch.float32  # transformers' own exception
    dense = logits(model, "t5")
    put(model)
    assert live_weights(model, site).w_up_FD.dtype == torch.float32
    assert close(logits(model, "t5"), dense, 0.02)


def test_gradients_reach_the_packed_weights():
    model = tiny_model("llama")
    put(model)
    logits(model, "llama")  # views without a graph, which must not be kept either
    model.requires_grad_(True)
    for _ in range(2):  # twice: views must not be kept between two graphs
        model(**tiny_inputs("llama")).logits.square().sum().backward()
    for site in find_sites(model):
        assert all(model.get_parameter(piece.parameter).grad.abs().sum() > 0 for piece in site.slices())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))


def test_capture_refuses_a_module_that_computes_something_else():
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0"), capture(model, find_sites(model)):
        logits(model, "llama")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", "up=model.layers.*.mlp.up_proj,gate=model.layers.*.mlp.gate_proj,down=model.layers.*.mlp.down_proj"),
        ("llama", "up=mlp.up_proj, gate=mlp.gate_proj, down=mlp.down_proj, act=mlp.act_fn"),
        ("bert", "up=layer.*.intermediate.dense,down=layer.*.output.dense"),
        ("opt", "up=layers.*.fc1,down=layers.*.fc2,act=layers.*.activation_fn"),
        ("lfm2", "up=layers.*.feed_forward.w3,gate=layers.*.feed_forward.w1,down=layers.*.feed_forward.w2,act=silu"),
        ("esm", "up=layer.*.intermediate.dense,down=layer.*.output.dense,act=gelu"),
    ],
)
def test_ffn_described_by_hand(name, text):
    model = tiny_model(name)
    by_hand, by_table = find_sites(model, text), find_sites(model)
    assert [s.slices() for s in by_hand] == [s.slices() for s in by_table]
    assert [(s.activation, s.name) for s in by_hand] == [(s.activation, s.name) for s in by_table]


@pytest.mark.parametrize("text", ["up=a", "up=a,up=b,down=c", "what=a", "up=a.*.b,down=c.*.d", "up=a b,down=c", ""])
def test_bad_description_is_a_usage_error(text):
    with pytest.raises(ConfigError, match=r"--ffn|matches nothing"):
        find_sites(tiny_model("llama"), text or "=")


def _meta(config):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def test_unsupported_models_are_named():
    hf = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    xlnet = transformers.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=48, vocab_size=64)
    with pytest.raises(UnsupportedModelError, match=r"no known FFN family.*layer_1 16->48.*layer_2 48->16"):
        find_sites(_meta(xlnet))
    with pytest.raises(UnsupportedModelError, match="already is a mixture"):
        find_sites(_meta(transformers.MixtralConfig(**hf, num_key_value_heads=1, num_local_experts=2, vocab_size=64)))
    with pytest.raises(UnsupportedModelError, match="every depth"):
        find_sites(_meta(transformers.AlbertConfig(**hf, embedding_size=8, vocab_size=64)))
    with pytest.raises(UnsupportedModelError, match=r"matches nothing.*up_proj 16->48"):
        find_sites(tiny_model("llama"), "up=fc1,down=fc2")
    with pytest.raises(UnsupportedModelError, match="Mish"):
        find_sites(_meta(transformers.LlamaConfig(**hf, hidden_act="mish", vocab_size=64)))
    quantised = tiny_model("llama")
    quantised.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="gptq") as caught:
        find_sites(quantised)
    assert "quantise after" in caught.value.hint
    shared = tiny_model("llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="share one weight"):
        find_sites(shared)
