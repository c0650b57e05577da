"""The kernels as transformers' `experts_implementation="moefication"`, against transformers' own eager experts."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_runner import Runner

from moefication_cli import register_experts
from moefication_cli.errors import ConfigError
from moefication_cli.models import stock_experts
from moefication_cli.models.stock_experts import experts_modules
from moefication_cli.runtime.cpu.numba_native import native_experts

_BASE = {
    "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip


def _mixtral(neurons: int = 24, width: int = 16) -> Any:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(**_BASE, hidden_size=width, intermediate_size=neurons, num_local_experts=5, num_experts_per_tok=2)
    )  # fmt: skip


def _qwen2_moe(neurons: int = 24, width: int = 16) -> Any:
    config = tf.Qwen2MoeConfig(
        **_BASE, hidden_size=width, intermediate_size=16, moe_intermediate_size=neurons, shared_expert_intermediate_size=8,
        num_experts=6, num_experts_per_tok=3,
    )  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


def _olmoe(neurons: int = 24, width: int = 16) -> Any:
    config = tf.OlmoeConfig(
        **_BASE, hidden_size=width, intermediate_size=neurons, num_experts=8, num_experts_per_tok=4, hidden_act="gelu"
    )
    return tf.OlmoeForCausalLM(config)


MODELS = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "olmoe": _olmoe}
# experts are so large that leaving them out or mixing them up moves every logit
SIZES = {"even": (24, 16), "odd": (17, 20)}


def _ready(name: str, size: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = MODELS[name](*SIZES[size]).eval().requires_grad_(False)
    for module in experts_modules(model):
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return model.to(dtype)


def _logits(model: Any, implementation: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_eager(name: str, size: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes too, on which grouped_mm fails; the kernels compute, also where eager would be faster."""
    register_experts()
    monkeypatch.setattr(stock_experts, "MANY_PAIRS", 10**9)
    model = _ready(name, size, torch.float32)
    ids = torch.randint(1, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    expected, got = _logits(model, "eager", ids), _logits(model, "moefication", ids)
    assert _error(got, expected) < 2e-6
    for module in experts_modules(model):  # the control: two experts exchanged
        module.down_proj.copy_(module.down_proj.roll(1, 0))
    assert _error(_logits(model, "moefication", ids), expected) > 1e-2


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_nearer_to_the_exact_sum_than_eager(name: str, tokens: int) -> None:
    """One experts module: the same inputs and selection, judged by float64."""
    register_experts()
    module: Any = experts_modules(_ready(name, "odd", torch.bfloat16))[0]
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(tokens, module.down_proj.shape[1], generator=generator).bfloat16()
    ids_TK = torch.rand(tokens, module.num_experts, generator=generator).topk(3).indices
    weights_TK = torch.rand(tokens, 3, generator=generator).bfloat16()
    found = {}
    with torch.inference_mode():
        for name_ in ("eager", "moefication"):
            module.config._experts_implementation = name_
            found[name_] = module(x_TD, ids_TK, weights_TK)
            assert found[name_].dtype == torch.bfloat16
        module.config._experts_implementation = "eager"
        exact = module.double()(x_TD.double(), ids_TK, weights_TK.double())
    errors = {name_: _error(y.double(), exact) for name_, y in found.items()}
    assert errors["moefication"] < min(3e-3, errors["eager"])


def test_a_loaded_checkpoint_generates_what_eager_generates(tmp_path: Path) -> None:
    _ready("mixtral", "even", torch.float32).save_pretrained(tmp_path)
    register_experts()
    ids, found = torch.tensor([[5, 9, 3]]), []
    for implementation in ("eager", "moefication"):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert model.config._experts_implementation == implementation
        found.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)


def test_it_is_unknown_until_it_is_registered() -> None:
    code = (
        "import transformers as tf, moefication_cli as m\n"
        "model = tf.MixtralForCausalLM(tf.MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,"
        " num_attention_heads=1, num_key_value_heads=1, num_local_experts=2))\n"
        "try:\n    model.set_experts_implementation('moefication')\nexcept ValueError: print('unknown')\n"
        "m.register_experts(); model.set_experts_implementation('moefication'); print(model.config._experts_implementation)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unknown", "moefication"]


def test_gradients_are_eagers_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    register_experts()
    stock_experts._warn_once.cache_clear()
    model = _ready("mixtral", "even", torch.float32).requires_grad_(True)
    ids, gradients = torch.tensor([[5, 9, 3]]), []
    for implementation in ("eager", "moefication"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        with caplog.at_level(logging.WARNING):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(experts_modules(model)[0].gate_up_proj.grad.clone())
    assert torch.equal(*gradients) and bool(gradients[0].abs().sum() > 0)
    assert len([record for record in caplog.records if "gradients" in record.getMessage()]) == 1


def test_other_forms_of_experts_are_left_to_eager(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-OSS keeps its weights transposed, with biases and a gate of its own."""
    register_experts()
    stock_experts._warn_once.cache_clear()
    config = tf.GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = tf.GptOssForCausalLM(config).eval()
    ids = torch.tensor([[5, 9, 3]])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(_logits(model, "moefication", ids), _logits(model, "eager", ids))
    assert "GptOssExperts keeps its weights in another form" in caplog.text


def test_the_kernels_give_the_same_bytes_for_any_number_of_threads_and_refuse_bad_ids() -> None:
    generator = torch.Generator().manual_seed(3)
    x_TD, up = torch.randn(300, 40, generator=generator), torch.randn(4, 66, 40, generator=generator)
    down = torch.randn(4, 40, 33, generator=generator)
    ids_TK = torch.rand(300, 4, generator=generator).topk(2).indices
    weights_TK = torch.rand(300, 2, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native_experts(x_TD, ids_TK, weights_TK, up, down, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert native_experts(x_TD[:0], ids_TK[:0], weights_TK[:0], up, down, "silu").shape == (0, 40)
    with pytest.raises(ConfigError, match="out of range"):
        native_experts(x_TD, ids_TK + 2, weights_TK, up, down, "silu")


def test_bench_times_a_stock_model_in_every_way(tmp_path: Path, run_cli: Runner) -> None:
    _ready("mixtral", "even", torch.float32).save_pretrained(tmp_path / "even")
    _ready("mixtral", "odd", torch.float32).save_pretrained(tmp_path / "odd")
    asked = ("--tokens", "1,40", "--seq", 16, "--prompt-tokens", 4, "--new-tokens", 4, "--repeats", 2, "--seconds", 0.1)
    found = run_cli.ok("bench", "--experts", tmp_path / "even", *asked)
    assert [(row["mode"], row["tokens"]) for row in found["rows"]] == [
        ("ffn", 1), ("ffn", 40), ("prefill", 16), ("decode", 1)
    ]  # fmt: skip
    assert all(set(row["speedup"]) == {"eager", "grouped_mm"} for row in found["rows"])
    odd = run_cli.ok("bench", "--experts", tmp_path / "odd", *asked, "--mode", "ffn")["rows"][0]
    assert (
        odd["seconds"]["grouped_mm"] is None
        and odd["seconds"]["moefication"] > 0
        and "stride" in odd["failed"]["grouped_mm"]
    )


def test_bench_says_what_has_no_experts(bert: Path, run_cli: Runner) -> None:
    none, both = run_cli("bench", "--experts", bert), run_cli("bench", bert, "--experts", bert)
    assert none.code == 2 and "no experts" in none.err
    assert both.code == 2 and "either" in both.err
