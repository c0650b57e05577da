"""Files for llama.cpp: their tensors read back, what the engine refuses, tokenizers, and the engine itself where it is here."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.bench_gguf import write_random
from cli_runner import Runner
from converted import convert
from safetensors.torch import load_file
from tiny_models import VOCAB, save_tiny

from moefication_cli.errors import ConfigError, MoEficationError
from moefication_cli.export.engine import EngineComparison, call_engine, compare_engine, has_engine
from moefication_cli.export.formats import Shape
from moefication_cli.export.gguf_file import llama3_factors, paired_rows, write_gguf
from moefication_cli.export.gguf_shape import HOSTS, choose_host, filled, most_selected, suitable_size
from moefication_cli.export.gguf_vocab import add_vocabulary
from moefication_cli.export.write import logit_spreads, random_inputs, with_zero_neurons, write_native
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import read_moe_folder

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra gguf)")

needs_engine = pytest.mark.skipif(not has_engine(), reason="llama.cpp's bindings (llama-cpp-python) are not installed")


def words_in_pieces(folder: Path) -> None:
    """A tokenizer of SentencePiece's kind in `folder`: letters, digits, and numbers that merges make."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    singles = ["▁", "w", *"0123456789"]
    merges = [("▁", "w"), *(("▁w", digit) for digit in "0123456789"), *(("▁w1", digit) for digit in "0123456789")]
    tokens = ["<unk>", "<s>", "</s>", *singles, *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)


def native(
    source: str, name: str, shared: int, folder: Path, change: Callable[[dict[str, Any]], object] | None = None
) -> Path:
    """A native checkpoint with 2 experts of (48 - shared) / 2 neurons, filled to 32; `change` changes config.json first."""
    convert(source, folder / "model", top_k=1, num_experts=2, shared=shared)
    words_in_pieces(folder / "model")
    if change is not None:
        rewritten(folder / "model", change, "config.json")
    moe, checkpoint = read_moe_folder(folder / "model"), Checkpoint(folder / "model")
    write_native(checkpoint, moe, name, logit_spreads(moe, random_inputs(checkpoint)), folder / "native", 32)
    return folder / "native"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def read_back(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], Any]:
    """(values, types, reader) of a file by name."""
    reader = gguf.GGUFReader(file)
    values = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return values, {t.name: t.tensor_type.name for t in reader.tensors}, reader


@pytest.mark.parametrize("quantise", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    ("source", "name", "shared"), [("llama", "mixtral", 0), ("qwen2", "qwen2_moe", 4), ("qwen3", "qwen3_moe", 0)]
)
def test_a_file_holds_the_checkpoint(source: str, name: str, shared: int, quantise: str, tmp_path: Path) -> None:
    folder = native(source, name, shared, tmp_path)
    write_gguf(folder, quantise, tmp_path / "model.gguf", "tiny")
    expected, (values, kinds, reader) = weights_of(folder), read_back(tmp_path / "model.gguf")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    down, up, gate = ("w2", "w3", "w1") if name == "mixtral" else ("down_proj", "up_proj", "gate_proj")
    tolerance = {"f32": 0.0, "f16": 1e-3, "q8_0": 0.02}[quantise]
    for layer in range(2):
        start = f"model.layers.{layer}."
        for ours, theirs in (("down", down), ("up", up), ("gate", gate)):
            found_EAB = values[f"blk.{layer}.ffn_{ours}_exps.weight"]
            assert found_EAB.shape == ((2, 16, 32) if ours == "down" else (2, 32, 16))
            for expert in range(2):
                matrix = expected[f"{start}{block}.experts.{expert}.{theirs}.weight"]
                size = float(matrix.abs().max())
                torch.testing.assert_close(found_EAB[expert], matrix, rtol=0, atol=tolerance * size)
                assert (
                    float((found_EAB[1 - expert] - matrix).abs().max()) > 10 * max(tolerance, 0.01) * size
                )  # the other
        router = f"blk.{layer}.ffn_gate_inp.weight"
        assert kinds[router] == "F32" and torch.equal(values[router], expected[f"{start}{block}.gate.weight"])
        norm = values[f"blk.{layer}.attn_norm.weight"]
        assert torch.equal(norm, expected[f"{start}input_layernorm.weight"])
        query = expected[f"{start}self_attn.q_proj.weight"]
        found = values[f"blk.{layer}.attn_q.weight"]
        torch.testing.assert_close(
            found, paired_rows(query, 2) if name == "mixtral" else query, rtol=0, atol=2e-3 * tolerance + 1e-3
        )
        assert (name == "mixtral") == (not torch.allclose(found, query, atol=0.01))
        if name == "qwen2_moe":
            assert values[f"blk.{layer}.ffn_down_shexp.weight"].shape == (16, 32)
            assert values[f"blk.{layer}.ffn_gate_inp_shexp.weight"].shape == (16,)
    # Rows of 16 cannot be Q8_0, which scales 32 together
    wanted = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[quantise]
    assert kinds["blk.0.ffn_down_exps.weight"] == wanted
    assert kinds["blk.0.ffn_up_exps.weight"] == ("F16" if quantise == "q8_0" else wanted)
    arch = HOSTS[name][0]
    settings = {f.removeprefix(f"{arch}."): reader.fields[f].contents() for f in reader.fields if f.startswith(arch)}
    assert settings["expert_count"] == 2 and settings["expert_used_count"] == 1 and settings["block_count"] == 2
    size = "feed_forward_length" if name == "mixtral" else "expert_feed_forward_length"
    assert settings[size] == 32 and settings["rope.freq_base"] == 10000


def test_zero_neurons_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ffn = FFNWeights(*(torch.randn(50, 16, generator=generator) for _ in range(3)), activation="silu")
    shape = Shape(num_experts=4, expert_size=12, num_shared=2, top_k=1)
    whole = filled(shape, "qwen2_moe", 32)
    assert (whole.expert_size, whole.num_shared) == (32, 32) and filled(shape, "qwen2_moe", 1) == shape
    grown = with_zero_neurons(ffn, shape, whole)
    x_TD = torch.randn(5, 16, generator=generator)
    assert grown.num_neurons == 5 * 32
    torch.testing.assert_close(grown.forward(x_TD), ffn.forward(x_TD))
    # Expert 1 is still expert 1
    assert torch.equal(grown.w_up_FD[64 : 64 + 12], ffn.w_up_FD[14:26])
    without = replace(grown, w_down_FD=grown.w_down_FD.clone().index_fill_(0, torch.arange(64, 76), 0.0))
    assert not torch.allclose(without.forward(x_TD), ffn.forward(x_TD))


def test_rotating_neighbours_is_rotating_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, size, positions = 2, 8, 5
    wq, wk = (torch.randn(heads * size, 16, generator=generator) for _ in range(2))
    x = torch.randn(positions, 16, generator=generator)
    angle = torch.arange(positions)[:, None] * 0.1 ** torch.arange(size // 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def halves(y: torch.Tensor) -> torch.Tensor:  # transformers
        a, b = y.unflatten(1, (heads, size)).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def neighbours(y: torch.Tensor) -> torch.Tensor:  # llama.cpp
        a, b = y.unflatten(1, (heads, size // 2, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)

    expected = torch.einsum("qhs,khs->hqk", halves(x @ wq.T), halves(x @ wk.T))
    turned = [neighbours(x @ paired_rows(w, heads).T) for w in (wq, wk)]
    torch.testing.assert_close(torch.einsum("qhs,khs->hqk", *turned), expected)
    plain = [neighbours(x @ w.T) for w in (wq, wk)]
    assert not torch.allclose(torch.einsum("qhs,khs->hqk", *plain), expected, atol=0.1)


def test_rotary_factors_of_llama_3_are_those_of_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = llama3_factors(config.to_dict())
    torch.testing.assert_close(plain / factors, found)
    assert float(factors.min()) == 1.0 and float(factors.max()) == pytest.approx(8.0)


def test_what_llama_cpp_refuses(tmp_path: Path) -> None:
    llama = save_tiny("llama", tmp_path / "llama").config.to_dict()
    shape = Shape(8, 128, 0, 2)
    assert choose_host(llama, shape) == "mixtral"
    assert choose_host(llama, replace(shape, num_shared=128)) == "qwen2_moe"
    assert choose_host(llama | {"model_type": "qwen3"}, shape) == "qwen3_moe"
    assert choose_host(llama, replace(shape, expert_size=43)) == "mixtral"  # filled to 64
    for config, other, quantise, word in [
        (llama, replace(shape, expert_size=20), "q8_0", "multiple of 32"),
        (llama, shape, "q4_k", "multiple of 256"),
        (llama, replace(shape, num_experts=2048), "f16", "at most 1024 experts"),
        (
            llama | {"num_hidden_layers": 12},
            replace(shape, num_experts=64, top_k=41),
            "f16",
            "room for 12 .*room for 40",
        ),
        (llama | {"model_type": "mistral", "sliding_window": 8}, shape, "f16", "sliding window"),
        (llama | {"rope_parameters": {"rope_type": "yarn"}}, shape, "f16", "yarn"),
        (llama | {"hidden_act": "gelu"}, shape, "f16", "gelu"),
        (llama | {"model_type": "opt"}, shape, "f16", "attention"),
    ]:
        with pytest.raises(ConfigError, match=word):
            choose_host(config, other, quantise)
    assert choose_host(llama, replace(shape, expert_size=256), "q4_k") == "mixtral"
    deep = llama | {"num_hidden_layers": 12}
    assert choose_host(deep, replace(shape, num_experts=64, top_k=16)) == "qwen2_moe"  # which has more room
    # As measured with random models
    assert [most_selected("mixtral", layers) for layers in (12, 16, 24, 25, 32)] == [12, 16, 12, 10, 16]
    assert [most_selected("qwen2_moe", layers) for layers in (12, 24)] == [40, 40]


@pytest.mark.parametrize(
    ("neurons", "fraction", "size"),
    [(8192, 0.25, 256), (14336, 0.5, 896), (5632, 0.25, 128), (4864, 0.5, 256), (172, 0.5, 43)],
)
def test_expert_sizes_that_suit_llama_cpp(neurons: int, fraction: float, size: int) -> None:
    assert suitable_size([neurons] * 16, fraction) == size
    assert round(neurons * fraction / size) <= min(12, most_selected("mixtral", 16))


def test_vocabulary_of_sentencepiece(tmp_path: Path) -> None:
    words_in_pieces(tmp_path)
    _, _, reader = read_back(vocabulary_only(tmp_path))
    field = {name.removeprefix("tokenizer.ggml."): part.contents() for name, part in reader.fields.items()}
    assert field["model"] == "llama" and field["add_space_prefix"] is True
    assert field["tokens"][:5] == ["<unk>", "<s>", "</s>", "▁", "w"] and len(field["tokens"]) == VOCAB
    assert field["tokens"][-1] == f"[PAD{VOCAB - 1}]" and field["bos_token_id"] == 1
    rank = dict(zip(field["tokens"], field["scores"], strict=True))
    assert rank["▁w"] > rank["▁w3"] > rank["▁w4"] > rank["▁w11"]  # the earlier a merge, the more it is worth
    assert field["token_type"][:4] == [2, 3, 3, 1] and field["token_type"][-1] == 5


def vocabulary_only(folder: Path, size: int = VOCAB) -> Path:
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    add_vocabulary(writer, folder, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return folder / "vocabulary.gguf"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Path:
    """`folder` with one of its files changed."""
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_vocabularies_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "words")
    with pytest.raises(ConfigError, match="WordLevel"):
        vocabulary_only(tmp_path / "words")
    words_in_pieces(tmp_path)
    with pytest.raises(ConfigError, match="36 tokens and the model 30"):
        vocabulary_only(tmp_path, 30)
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    rewritten(
        tmp_path,
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}),
    )
    with pytest.raises(ConfigError, match="splits words"):
        vocabulary_only(tmp_path)
    split["pattern"] = {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}  # fmt: skip # noqa: E501
    rewritten(
        tmp_path,
        lambda c: c.update(
            normalizer=None, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
        ),
    )
    _, _, reader = read_back(vocabulary_only(tmp_path))
    assert reader.fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert reader.fields["tokenizer.ggml.merges"].contents()[0] == "▁ w"
    rewritten(tmp_path, lambda c: c["model"].update(byte_fallback=False) or c.update(pre_tokenizer=None))
    with pytest.raises(ConfigError, match="fallback to bytes"):
        vocabulary_only(tmp_path)


def test_faults_of_an_engine_are_named() -> None:
    good = EngineComparison(100, 1e-3, 0.01, 5.0, 5.0, 0.0)
    assert good.faults("f16") == []
    for bad, word in (
        (replace(good, log_prob_error=0.8), "log-probabilities"),
        (replace(good, log_prob_error=float("nan")), "log-probabilities"),
        (replace(good, perplexity=6.0), "perplexity"),
        (replace(good, texts_differing=0.5), "tokenizer"),
    ):
        assert word in bad.faults("q8_0")[0]
    assert replace(good, perplexity=6.0).faults("q4_k") == []


@pytest.fixture
def small_run(tmp_path: Path, run_cli: Runner) -> Path:
    """A run of a tiny Llama, planned for llama.cpp with experts that need filling."""
    save_tiny("llama", tmp_path / "llama", tokenizer=False)
    words_in_pieces(tmp_path / "llama")
    run, data = tmp_path / "run", tmp_path / "train.txt"
    data.write_text("".join(" ".join(f"w{(i * k) % 20}" for k in range(1, 13)) + "\n" for i in range(200)))
    options = ("--documents", "line", "--max-length", 16, "--expert-size", 24, "--top-k", 1, "--refine", 0)
    run_cli.ok("run", run, "--model", tmp_path / "llama", "--data", data, *options, "--for", "gguf")
    return run


def test_from_the_command_line(small_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if not has_engine():  # with it the export fails: llama.cpp loads no vocabulary of this kind without bytes
        made = run_cli("export", small_run, "--to", "gguf", "--quantise", "q8_0", "--out", out, "--json")
        assert made.code == 0, made.err
        assert "filled with zeros to 32" in made.err and "pip install llama-cpp-python" in made.err
        assert made.json["rows"][0]["architecture"] == "mixtral" and not made.json["checked"]
        file, record = sorted(out.iterdir())
        assert (file.name, record.name) == ("llama-moe-q8_0.gguf", "llama-moe-q8_0.gguf.moefication_export.json")
        same = ("export", small_run, "--to", "gguf", "--quantise", "q8_0", "--out", out)
        assert run_cli.ok(*same)["up_to_date"]
        named = run_cli("export", small_run, "--to", "gguf", "--quantise", "f16", "--out", file, "--json")
        assert named.code == 2 and "another export" in named.json["error"]["message"]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        edited = run_cli(*same, "--json")
        assert edited.code == 2 and f"{file} was edited since" in edited.json["error"]["message"]
        file.unlink()  # what is gone is made again
        assert run_cli.ok(*same)["up_to_date"] is False and file.is_file()
        refused = run_cli("export", small_run, "--to", "gguf", "--quantise", "q4_k", "--out", out, "--json")
        assert refused.code == 2 and "pip install llama-cpp-python" in refused.json["error"]["hint"]
    file = tmp_path / "there.gguf"
    file.touch()
    for words, said in (
        (("--to", "gguf", "--out", file), "is there already"),
        (("--to", "mixtral", "--quantise", "f16", "--out", tmp_path / "m"), "no --quantise"),
    ):
        refused = run_cli("export", small_run, *words, "--json")
        assert refused.code == 2 and said in refused.json["error"]["message"]
    shutil.rmtree(out, ignore_errors=True)
    run_cli.ok("split", small_run, "--expert-size", 4)
    run_cli.ok("train-router", small_run, "--router", "native", "--epochs", 1)
    refused = run_cli("apply", small_run, "--router", "native", "--top-k", 2, "--for", "gguf", "--json")
    assert refused.code == 2 and "multiple of 32" in refused.json["error"]["message"]
    assert not list(tmp_path.glob(".*partial"))


def test_without_the_package_gguf_it_says_how_to_get_it(
    small_run: Path, run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused = run_cli("export", small_run, "--to", "gguf", "--out", tmp_path / "out", "--json")
    assert refused.code == 2 and "pip install 'moefication[gguf]'" in refused.json["error"]["hint"]
    assert not (tmp_path / "out").exists()


_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = "It's 12345 o'clock;  WE'LL go\n\n to the caf\u00e9 (\u4f60\u597d) at 7.\tx_1 == y[22]!\n"


@needs_engine
@pytest.mark.parametrize(("kind", "regex"), [("qwen2", _REGEX % ""), ("llama-bpe", _REGEX % "{1,3}"), ("gpt-2", None)])
def test_llama_cpp_reads_byte_level_tokenizers_alike(kind: str, regex: str | None, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    raw.train_from_iterator([_TEXT * 3, "to go at twelve 123 12 we'll 345"], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    shape = Shape(4, 32, 0, 2)
    write_random(tmp_path / "native", 64, 128, 1, shape)
    words.save_pretrained(tmp_path / "native")
    write_gguf(tmp_path / "native", "f16", tmp_path / "model.gguf", "tiny")
    assert read_back(tmp_path / "model.gguf")[2].fields["tokenizer.ggml.pre"].contents() == kind
    texts = [_TEXT, "we'll go 12345", " x  y"]
    found = call_engine("log_probabilities", file=str(tmp_path / "model.gguf"), sequences=[[1, 2]], texts=texts)[
        "tokens"
    ]
    assert found == [words(text)["input_ids"] for text in texts]


@needs_engine
@pytest.mark.parametrize(
    ("source", "name", "shared", "rope"),
    [
        ("llama", "mixtral", 0, {}),
        ("llama", "mixtral", 0, {"rope_type": "linear", "factor": 4.0}),
        (
            "mistral",
            "mixtral",
            0,
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 32},
        ),
        ("llama", "qwen2_moe", 4, {}),
        ("qwen2", "qwen2_moe", 4, {}),
        ("qwen3", "qwen3_moe", 0, {}),
    ],
)
def test_architectures_in_llama_cpp(source: str, name: str, shared: int, rope: dict[str, Any], tmp_path: Path) -> None:
    def turn(config: dict[str, Any]) -> None:
        config["rope_parameters"] |= rope

    folder = native(source, name, shared, tmp_path, turn)
    rewritten(folder, lambda c: c.update(normalizer=None, pre_tokenizer={"type": "ByteLevel"}))  # needs no byte tokens
    write_gguf(folder, "f32", tmp_path / "model.gguf", "tiny")
    ids = torch.randint(3, VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    found = compare_engine(tmp_path / "model", tmp_path / "model.gguf", [ids], [])
    assert found.faults("f32") == [] and found.log_prob_error < 5e-3, found
    # Negative control: positions turned otherwise
    rewritten(folder, lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 300.0}), "config.json")
    write_gguf(folder, "f32", tmp_path / "other.gguf", "tiny")
    assert compare_engine(tmp_path / "model", tmp_path / "other.gguf", [ids], []).log_prob_error > 0.02


@needs_engine
def test_llama_cpp_quantises(tmp_path: Path) -> None:
    write_random(tmp_path / "native", 256, 1024, 1, Shape(4, 256, 0, 2))
    write_gguf(tmp_path / "native", "f32", tmp_path / "whole.gguf", "tiny")
    call_engine("quantise", source=str(tmp_path / "whole.gguf"), target=str(tmp_path / "small.gguf"))
    with pytest.raises(MoEficationError, match="llama_model_quantize gave"):
        call_engine("quantise", source=str(tmp_path / "none.gguf"), target=str(tmp_path / "other.gguf"))
    values, kinds, _ = read_back(tmp_path / "small.gguf")
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q4_K" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    expected = weights_of(tmp_path / "native")["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    assert float((values["blk.0.ffn_up_exps.weight"][3] - expected).norm() / expected.norm()) < 0.1


@needs_engine
def test_llama_cpp_computes_what_ours_does(tmp_path: Path, run_cli: Runner, shared_dir: Path) -> None:
    run = tmp_path / "run"
    model, data = shared_dir / "models/llama-stories260k", shared_dir / "data/stories/train.txt"
    options = ("--max-tokens", 4096, "--fraction", 0.6, "--refine", 0, "--epochs", 1, "--for", "gguf")
    run_cli.ok("run", run, "--model", model, "--data", data, *options)
    for quantise, most, ratio in (("f32", 5e-3, 0.002), ("f16", 0.05, 0.01), ("q8_0", 0.5, 0.05)):
        row = run_cli.ok("export", run, "--to", "gguf", "--quantise", quantise, "--out", tmp_path)["rows"][0]
        assert row["llama_cpp_log_prob_error"] < most and row["llama_cpp_texts_differing"] == 0, row
        assert row["llama_cpp_perplexity"] == pytest.approx(row["llama_cpp_perplexity_converted"], rel=ratio)
    # Negative control: other experts are selected
    wrong = tmp_path / "wrong.gguf"
    shutil.copy(tmp_path / "llama-stories260k-moe-f32.gguf", wrong)
    for tensor in gguf.GGUFReader(wrong, "r+").tensors:
        if tensor.name.endswith("ffn_gate_inp.weight"):
            tensor.data[:] = -tensor.data
    ids = torch.randint(300, 500, (1, 128), generator=torch.Generator().manual_seed(0))
    assert compare_engine(run / "model", wrong, [ids], []).faults("q8_0")
    assert not compare_engine(run / "model", tmp_path / "llama-stories260k-moe-q8_0.gguf", [ids], []).faults("q8_0")
    with pytest.raises(MoEficationError, match="ended with"):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes((tmp_path / "llama-stories260k-moe-f16.gguf").read_bytes()[:20000])
        call_engine("log_probabilities", file=str(broken), sequences=[[1, 2]], texts=[])
