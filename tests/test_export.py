"""Native MoE checkpoints: the mappings by hand, what formats refuse, and the self-check, on tiny models of four families."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from converted import convert
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_tables import choices
from tiny_models import VOCAB, D, save_tiny
from torch.nn import functional

from moefication_cli import load
from moefication_cli.config import ApplyConfig, ExportConfig
from moefication_cli.errors import ConfigError
from moefication_cli.export import write
from moefication_cli.export.check import Comparison, compare
from moefication_cli.export.formats import FORMATS, Layer, Shape
from moefication_cli.export.write import logit_spreads, random_inputs, write_native
from moefication_cli.ffn import FFNWeights
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import TopK
from moefication_cli.stages.exported import export_lock
from moefication_cli.store.rundir import RunDir

# (source, format, always-on neurons)
PAIRS = [
    ("llama", "mixtral", 0),
    ("mistral", "mixtral", 0),
    ("llama", "qwen2_moe", 0),
    ("llama", "qwen2_moe", 24),
    ("qwen2", "qwen2_moe", 24),
    ("qwen3", "qwen3_moe", 0),
    ("llama", "granitemoeshared", 0),
    ("llama", "granitemoeshared", 24),
    ("llama", "glm4_moe", 24),
    ("qwen2", "glm4_moe", 0),
    ("qwen3", "glm4_moe", 24),
]


def tokens(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (2, 24), generator=generator) for _ in range(2)]


def exported(source: str, name: str, shared: int, folder: Path, **options: Any) -> tuple[Path, Path, Any]:
    """(converted folder, exported folder, MoEFolder) with 6 experts, 2 of them per token."""
    torch.manual_seed(1)
    convert(source, folder / "model", top_k=2, shared=shared, **options)
    moe, checkpoint = read_moe_folder(folder / "model"), Checkpoint(folder / "model")
    spreads = logit_spreads(moe, random_inputs(checkpoint))
    write_native(checkpoint, moe, name, spreads, folder / "out")
    return folder / "model", folder / "out", moe


def test_formats_are_those_of_the_options() -> None:
    assert {*FORMATS, "gguf"} == choices(ExportConfig, "to") == choices(ApplyConfig, "host")


@pytest.mark.parametrize(("source", "name", "shared"), PAIRS)
def test_stock_transformers_computes_what_ours_does(source: str, name: str, shared: int, tmp_path: Path) -> None:
    converted, out, moe = exported(source, name, shared, tmp_path)
    found = compare(converted, out, moe, tokens())
    assert found.faults(half=False) == []
    assert found.relative_error < 2e-3, found  # one flipped near-tie would be a hundredth
    # Negative controls: two experts exchanged, routers that are not scaled, and other experts selected
    exchange_experts(out)
    faults = compare(converted, out, moe, tokens()).faults(half=False)
    assert any("logits" in fault for fault in faults) and not any("other experts" in fault for fault in faults)
    exchange_experts(out)
    for layer in ("0", "1"):
        scale(out, f"layers.{layer}.", 2.0**12)
    assert compare(converted, out, moe, tokens()).faults(half=False)
    for layer in ("0", "1"):
        scale(out, f"layers.{layer}.", -(2.0**-12))
    assert any("other experts" in fault for fault in compare(converted, out, moe, tokens()).faults(half=False))


def exchange_experts(out: Path) -> None:
    """The first two experts of every layer in each other's place, as a wrong export would have written them."""
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        changed = dict(tensors)
        for key, tensor in tensors.items():
            if ".experts.0." in key:
                other = key.replace(".experts.0.", ".experts.1.")
                changed[key], changed[other] = tensors[other], tensor
            elif tensor.dim() == 3:  # [E, ...]
                changed[key] = tensor[[1, 0, *range(2, len(tensor))]].contiguous()
        save_file(changed, path, metadata={"format": "pt"})


def scale(out: Path, layer: str, factor: float) -> None:
    """Multiply a layer's router weights in place, as a wrong export would have written them."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    suffixes = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.layer.weight")
    (key,) = (key for key in index if layer in key and key.endswith(suffixes))
    tensors = load_file(out / index[key])
    tensors[key] = tensors[key] * factor
    save_file(tensors, out / index[key], metadata={"format": "pt"})


@pytest.mark.parametrize("name", list(FORMATS))
def test_blocks_by_hand(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = 4 if FORMATS[name].shared else 0
    shape = Shape(num_experts=3, expert_size=4, num_shared=shared, top_k=2)
    ffn = FFNWeights(*(torch.randn(shared + 12, D, generator=generator) for _ in range(3)), activation="silu")
    router_ED = torch.randn(3, D, generator=generator)
    made = FORMATS[name].layer(Layer(ffn, router_ED, shape))
    x_D = torch.randn(D, generator=generator)
    weight = {"mixtral": 1 / 2, "qwen2_moe": 1 / 3, "qwen3_moe": 1 / 2, "granitemoeshared": 1 / 2, "glm4_moe": 1.0}[
        name
    ]
    for expert in range(3):
        rows = slice(shared + 4 * expert, shared + 4 * expert + 4)
        assert ffn.w_gate_FD is not None
        expected_D = (functional.silu(ffn.w_gate_FD[rows] @ x_D) * (ffn.w_up_FD[rows] @ x_D)) @ ffn.w_down_FD[rows]
        if name == "granitemoeshared":
            gate, up = made["block_sparse_moe.input_linear.weight"][expert].chunk(2)
            down = made["block_sparse_moe.output_linear.weight"][expert]
        elif name == "mixtral":
            gate, up, down = (made[f"block_sparse_moe.experts.{expert}.{part}.weight"] for part in ("w1", "w3", "w2"))
        else:
            parts = ("gate_proj", "up_proj", "down_proj")
            gate, up, down = (made[f"mlp.experts.{expert}.{part}.weight"] for part in parts)
        found_D = weight * (down @ (functional.silu(gate @ x_D) * (up @ x_D)))  # what the format adds of this expert
        torch.testing.assert_close(found_D, expected_D)


def test_what_formats_refuse(tmp_path: Path) -> None:
    llama = save_tiny("llama", tmp_path / "llama").config.to_dict()
    plain, shared = Shape(6, 8, 0, 2), Shape(6, 4, 24, 2)
    assert FORMATS["mixtral"].refusal(llama, plain) is None
    for name, config, shape, word in [
        ("mixtral", llama, shared, "shared expert"),
        ("qwen3_moe", llama, plain, "attention"),
        (
            "mixtral",
            llama | {"model_type": "qwen3"},
            plain,
            "attention is not that of qwen3",
        ),  # which norms queries and keys
        ("glm4_moe", llama | {"attention_bias": True}, plain, "biases"),
        ("mixtral", llama | {"hidden_act": "gelu"}, plain, "gelu"),
        ("mixtral", llama | {"mlp_bias": True}, plain, "biases"),
        ("qwen2_moe", llama | {"head_dim": 4}, plain, "dimensions"),
        ("granitemoeshared", llama | {"sliding_window": 8}, plain, "sliding"),
        ("mixtral", llama | {"model_type": "opt"}, plain, "opt"),
    ]:
        assert word in str(FORMATS[name].refusal(config, shape)), (name, word)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"extra": True}, "correction"),
        ({"dense": (1,)}, "same neurons for every token"),
        ({"pruned": (0,)}, "same neurons for every token"),
    ],
)
def test_plans_that_no_format_holds(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        exported("llama", "mixtral", 0, tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_router_with_a_bias_and_layers_that_differ_are_refused(tmp_path: Path) -> None:
    convert("llama", tmp_path / "model", top_k=2)
    moe, checkpoint = read_moe_folder(tmp_path / "model"), Checkpoint(tmp_path / "model")
    first, second = moe.layers
    biased = replace(second, router=TwoLayerRouter(torch.randn(6, D), torch.ones(6)))
    other = replace(second, num_experts=3, router=TwoLayerRouter(torch.randn(3, D)))
    for layer, word in ((biased, "without a bias"), (other, "one number and size of experts")):
        with pytest.raises(ConfigError, match=word):
            write_native(checkpoint, replace(moe, layers=(first, layer)), "mixtral", [1.0, 1.0], tmp_path / "out")


def test_faults_are_named() -> None:
    good = Comparison(100, 1e-4, 0.0, 5.0, 5.0)
    assert good.faults(half=False) == []
    for bad, word in (
        (replace(good, relative_error=0.8), "logits"),
        (replace(good, selections_differing=0.5), "experts"),
        (replace(good, perplexity=7.0), "perplexity"),
        (replace(good, relative_error=float("nan")), "logits"),
    ):
        assert word in bad.faults(half=False)[0]


@pytest.fixture
def llama_run(tmp_path: Path, run_cli: Runner) -> Path:
    """A run of a tiny Llama, converted for Mixtral."""
    save_tiny("llama", tmp_path / "llama")
    run, data = tmp_path / "run", tmp_path / "train.txt"
    data.write_text("".join(" ".join(f"w{(i * k) % 40}" for k in range(1, 13)) + "\n" for i in range(300)))
    options = ("--documents", "line", "--max-length", 16, "--expert-size", 8, "--fraction", 0.6, "--for", "mixtral")
    run_cli.ok("run", run, "--model", tmp_path / "llama", "--data", data, *options)
    return run


def test_from_the_command_line(llama_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run_cli.ok("export", llama_run, "--to", "mixtral", "--out", out)["rows"][0]
    assert found["relative_error"] < 0.1 and found["tokens"] > 900
    assert "mixture of experts (mixtral)" in (out / "README.md").read_text()
    # Loads, and generates what the converted model does, where this package cannot be imported
    code = """
import sys
sys.modules["moefication_cli"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
words = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
assert type(model).__name__ == "MixtralForCausalLM", type(model)
ids = words("w1 w2 w3", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    ours = load(llama_run / "model", backend="reference")
    theirs = json.loads(done.stdout)
    expected = ours.generate(torch.tensor([theirs[:3]]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert sum(a == b for a, b in zip(theirs, expected, strict=True)) >= 0.95 * len(theirs)
    # The same again is up to date; another format, another model and an edited file are not this export
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run_cli.ok("export", llama_run, "--to", "mixtral", "--out", out)["up_to_date"]
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "README.md").write_text("words of my own")
    assert run_cli("verify", out).code == 0
    other = run_cli("export", llama_run, "--to", "granitemoeshared", "--out", out, "--json")
    assert other.code == 2 and "holds another export" in other.json["error"]["message"]
    config = out / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"Vocab_size"'))
    edited = run_cli("export", llama_run, "--to", "mixtral", "--out", out, "--json")
    assert edited.code == 2 and "edited since: config.json" in edited.json["error"]["message"]
    damaged = run_cli("verify", out, "--json")
    assert damaged.code == 4 and [row["damage"] for row in damaged.json["rows"]] == [
        f"{config} is not as it was written"
    ]
    (out / "moefication_export.json").unlink()
    full = run_cli("export", llama_run, "--to", "mixtral", "--out", out, "--json")
    assert full.code == 2 and "not an empty folder" in full.json["error"]["message"]


def test_what_was_finetuned_is_exported(llama_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    words = ("--fraction", 0.6, "--for", "mixtral", "--expert-size", 8)
    before = load_file(llama_run / "model" / "model.safetensors")
    made = run_cli.ok("run", llama_run, *words, "--finetune", 20)
    tuned = made["stages"]["finetune"]["metrics"]
    assert tuned["kept"] and tuned["ffn_flops_fraction"] == tuned["ffn_flops_fraction_before"]
    moe = read_moe_folder(llama_run / "model")
    assert all(layer.compensation is None and isinstance(layer.rule, TopK) for layer in moe.layers)
    after = load_file(llama_run / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before if ".mlp." in name)
    found = run_cli.ok("export", llama_run, "--to", "mixtral", "--out", tmp_path / "out")["rows"][0]
    assert found["relative_error"] < 0.1 and found["selections_differing"] < 0.05
    # What the format cannot hold is refused before it is trained
    refused = run_cli("run", llama_run, "--fraction", 0.6, "--for", "qwen3_moe", "--finetune", 5, "--json")
    assert refused.code == 2 and "attention" in refused.json["error"]["message"]
    assert read_moe_folder(llama_run / "model").settings["finetuned"]["steps"] == 20


def test_what_cannot_be_exported_leaves_nothing(llama_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, code, said in (
        (("--to", "qwen3_moe", "--out", out), 2, "attention"),
        (("--to", "mixtral"), 2, "a format and a folder"),
        (("--to", "gguff", "--out", out), 2, "gguff"),
    ):
        outcome = run_cli("export", llama_run, *words, "--json")
        assert outcome.code == code and said in outcome.json["error"]["message"]
    weights = next((llama_run / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 64
    weights.write_bytes(data)
    assert run_cli("export", llama_run, "--to", "mixtral", "--out", out).code == 4
    (llama_run / "model" / "manifest.json").unlink()
    assert run_cli("export", llama_run, "--to", "mixtral", "--out", out).code == 3
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_wrong_export_is_refused_and_force_writes_it(
    llama_run: Path, run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_LOGIT_SPREAD", 4.0)  # routers that are not scaled down
    words = ("export", llama_run, "--to", "mixtral", "--out", tmp_path / "out")
    refused = run_cli(*words, "--json")
    assert (
        refused.code == 1
        and "the exported model is not the converted one: its logits" in refused.json["error"]["message"]
    )
    assert "--force" in refused.json["error"]["hint"] and not (tmp_path / "out").exists()
    forced = run_cli(*words, "--force", "--json")
    assert forced.code == 0 and "written because of --force" in forced.err
    assert forced.json["rows"][0]["relative_error"] > 0.1 and (tmp_path / "out" / "config.json").is_file()


FULL_DISK = """
import resource, signal, sys
from moefication_cli.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
sys.argv[0] = "moefication"
main()
"""


def test_two_exports_to_one_folder(llama_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    """While another process writes the folder, exit code 5 and not a broken export."""
    run_cli.ok("apply", llama_run, "--router", "native", "--for", "mixtral", "--fraction", 0.6)
    out = tmp_path / "out"
    words = ["export", llama_run, "--to", "mixtral", "--out", out]
    with FileLock(export_lock(RunDir(llama_run), out)):
        found = run_cli(*words)
        assert found.code == 5 and str(out) in found.err and not out.exists(), found.err
    assert not run_cli.ok(*words)["up_to_date"]
    with FileLock(export_lock(RunDir(llama_run), out)):  # what is there needs no lock
        assert run_cli.ok(*words)["up_to_date"]


def test_a_full_disk_leaves_nothing(llama_run: Path, tmp_path: Path) -> None:
    words = ["export", str(llama_run), "--to", "mixtral", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    error = json.loads(done.stdout)["error"]
    assert "cannot write" in error["message"] and "too large" in error["message"] and "free some space" in error["hint"]
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


def test_a_run_that_is_not_planned_for_a_format(llama_run: Path, run_cli: Runner, tmp_path: Path) -> None:
    run_cli.ok("train-router", llama_run, "--router", "regression", "--epochs", 1)
    run_cli.ok("apply", llama_run, "--router", "regression", "--fraction", 0.8, "--rule", "threshold")
    for to in ("mixtral", "gguf"):
        refused = run_cli("export", llama_run, "--to", to, "--out", tmp_path / "out", "--json")
        assert refused.code == 2 and to in refused.json["error"]["message"]
        assert (
            "varying number" in refused.json["error"]["message"] or "same neurons" in refused.json["error"]["message"]
        )
        assert "apply RUN --for FORMAT" in refused.json["error"]["hint"] and not (tmp_path / "out").exists()


def test_planning_for_a_format_needs_its_router(llama_run: Path, run_cli: Runner) -> None:
    run_cli.ok("train-router", llama_run, "--router", "linear", "--epochs", 1)
    outcome = run_cli("apply", llama_run, "--router", "linear", "--fraction", 0.6, "--for", "mixtral", "--json")
    assert outcome.code == 2 and "without a bias" in outcome.json["error"]["message"]
    assert "--router native" in outcome.json["error"]["hint"]


GENERATES = """
import json, sys
sys.modules["moefication_cli"] = None
import torch, transformers
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/out")
    ids = load_file(folder + "/ids.safetensors")["ids"]
    prompt = ids[:, :5]
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None)
    found = [model.generate(prompt, **options)[:, 5:].tolist(), model(ids).logits.argmax(-1)[:, 4:-1].tolist()]
    print(json.dumps([type(model).__name__, str(model.dtype), *found]))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_generates_the_same_where_this_package_is_not_installed(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """At least 95 % of the tokens; in bfloat16 of the next tokens after the same words, since one near-tie changes all after it."""
    half, folders, expected = dtype == torch.bfloat16, [], []
    for source, name, shared in PAIRS:
        folder = tmp_path / f"{source}-{name}-{shared}"
        experts = 3 if half and shared else 6
        folder.mkdir()
        torch.manual_seed(1)
        convert(source, folder / "model", top_k=2, num_experts=experts, shared=shared, dtype=dtype)
        moe, checkpoint = read_moe_folder(folder / "model"), Checkpoint(folder / "model")
        write_native(checkpoint, moe, name, logit_spreads(moe, random_inputs(checkpoint)), folder / "out")
        folders.append(str(folder))
        ours, ids = load(folder / "model", dtype="auto", backend="reference"), torch.arange(3, 43).view(8, 5)
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
        whole = ours.generate(ids, attention_mask=torch.ones_like(ids), **options)
        save_file({"ids": whole}, folder / "ids.safetensors")
        expected.append(whole[:, 5:])
    done = subprocess.run([sys.executable, "-I", "-c", GENERATES, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (source, name, _), line, tokens_BL in zip(PAIRS, done.stdout.splitlines(), expected, strict=True):
        kind, precision, generated, after_ours = json.loads(line)
        assert (kind, precision) == (FORMATS[name].architecture, str(dtype))
        same = float((torch.tensor(after_ours if half else generated) == tokens_BL).float().mean())
        assert same >= 0.95, (source, name, same)
        assert len(set(tokens_BL.flatten().tolist())) > 8  # it is not one word again and again


def test_half_precision_source(tmp_path: Path) -> None:
    converted, out, moe = exported("llama", "mixtral", 0, tmp_path, dtype=torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    found = compare(converted, out, moe, tokens())
    assert found.faults(half=True) == [] and found.relative_error > 1e-4  # bfloat16 rounds
    with pytest.raises(ConfigError, match="multiple of 8"):
        exported("llama", "mixtral", 0, tmp_path / "small", num_experts=12, dtype=torch.bfloat16)


@pytest.mark.parametrize("to", ["mixtral", "gguf"])
@pytest.mark.parametrize("source", ["opt", "bert"])
def test_a_model_that_no_format_holds_is_refused_before_anything_is_made(
    source: str, to: str, run_cli: Runner, tmp_path: Path
) -> None:
    save_tiny(source, tmp_path / source)
    data, run = tmp_path / "train.txt", tmp_path / "run"
    data.write_text("".join(f"w{i % 30} w{i % 7} w5\n" for i in range(300)))
    asked = ("--model", tmp_path / source, "--data", data, "--documents", "line", "--expert-size", 8, "--for", to)
    for more in ((), ("--dry-run",)):
        found = run_cli("run", run, *asked, *more, "--json")
        error = found.json["error"]
        assert found.code == 2 and f"its attention is not that of {source}" in error["message"]
        assert "apply --embed-code makes a folder" in error["hint"] and "plans what it can" not in error["hint"]
    assert not (run / "activations").exists()


def test_apply_refuses_before_it_plans(calibrated_run: tuple[Path, Path], run_cli: Runner) -> None:
    run, _ = calibrated_run
    for more in ((), ("--dry-run",)):
        found = run_cli("apply", run, "--for", "mixtral", *more, "--json")
        assert found.code == 2 and "its attention is not that of opt" in found.json["error"]["message"]
    assert not (run / "model").exists()


def test_experts_that_a_precision_cannot_have_are_refused_before_anything_is_made(
    run_cli: Runner, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "llama", dtype=torch.bfloat16)
    data = tmp_path / "train.txt"
    data.write_text("w1 w2 w3\n" * 300)
    asked = ("run", tmp_path / "run", "--model", tmp_path / "llama", "--data", data, "--for", "mixtral")
    found = run_cli(*asked, "--expert-size", 4, "--json")
    assert found.code == 2 and "multiple of 8" in found.json["error"]["message"]
    assert not (tmp_path / "run" / "activations").exists()
