"""Folders that `apply --weights int8` writes: what loads from them, what is found damaged, who can read them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from cli_runner import Runner
from converted import convert
from test_int8_models import logits

from moefication_cli import load
from moefication_cli.errors import ConfigError, CorruptArtifactError, UnsupportedModelError
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.contents import INT8_WEIGHTS
from moefication_cli.models.folder.moe_folder import FOLDER, SETTINGS, read_moe_folder
from moefication_cli.models.loading import load_int8, load_widened
from moefication_cli.models.stored_int8 import same_state
from moefication_cli.stages.apply_experts import make_int8
from moefication_cli.store.header import read_header


def both(name: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A converted folder with float weights, and the same with int8 ones."""
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True, dense=(1,), dtype=dtype)
    shutil.copytree(tmp_path / "moe", tmp_path / "int8")
    make_int8(tmp_path / "int8")
    return tmp_path / "moe", tmp_path / "int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "t5", "gpt2", "opt"])
@torch.no_grad()
def test_what_is_stored_is_what_loading_as_int8_makes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact, path = both(name, tmp_path, dtype)
    model, expected = load(path, device="cpu"), load(exact, device="cpu", weights="int8")
    assert same_state(model, expected) and model.dtype == torch.float32
    y = logits(model, name)
    assert torch.equal(y, logits(expected, name)) and not torch.equal(y, logits(load(exact, device="cpu"), name))
    ties = [{id(p): n for n, p in one.named_parameters(remove_duplicate=False)} for one in (model, expected)]
    assert len(ties[0]) == len(ties[1])  # what shares a tensor still does
    model.moefication.set(fraction=1)
    assert not torch.equal(logits(model, name), y)
    wide = load_widened(path, read_moe_folder(path))
    other = load(exact, device="cpu", fraction=1.0, dtype=torch.float32)
    difference = float((logits(wide, name) - logits(other, name)).norm() / logits(other, name).norm())
    assert 1e-4 < difference < 0.05
    size = sum(
        end - begin for begin, end in (e["data_offsets"] for e in read_header(path / INT8_WEIGHTS).entries.values())
    )
    assert size < sum(p.numel() * 4 for p in wide.parameters())


def test_a_difference_in_one_weight_is_another_state(tmp_path: Path) -> None:
    _, path = both("bert", tmp_path)
    one, other = (load_int8(path, read_moe_folder(path))[0].model for _ in range(2))
    assert same_state(one, other)
    next(p for p in other.parameters() if p.dtype == torch.int8).data[0, 0] += 1
    assert not same_state(one, other)


def test_only_this_package_reads_it(tmp_path: Path) -> None:
    _, path = both("bert", tmp_path)
    assert sorted(p.name for p in path.glob("*.safetensors")) == [INT8_WEIGHTS]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with pytest.raises(UnsupportedModelError, match="int8 weights"):
        Checkpoint(path)
    with pytest.raises(ConfigError, match="float32 activations"):
        load(path, device="cpu", dtype="bfloat16")
    with pytest.raises(ConfigError, match="int4"):
        load(path, device="cpu", weights="int4")
    with pytest.raises(ConfigError, match="offload_state_dict"):
        load(path, device="cpu", offload_state_dict=True)
    with pytest.raises(ConfigError, match="has no tensor cls"):
        load(path, device="cpu", task="mlm")
    assert load(path, device="cpu", attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="cannot be saved"):
        load(path, device="cpu").save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("damage", ["row", "scale", "end", "elsewhere", "gone"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    _, path = both("llama", tmp_path)
    file = path / INT8_WEIGHTS
    header, data = read_header(file), bytearray(file.read_bytes())
    entries = header.entries
    seal = json.loads((path / FOLDER / SETTINGS).read_text())["weights"]["ffns"]
    sealed = [key for _, key in next(iter(seal.values()))["tensors"]]
    places = {
        "row": next(key for key in sealed if key.endswith("weight")),
        "scale": next(key for key in sealed if key.endswith("weight_scale")),
        "elsewhere": next(key for key in entries if "norm" in key),
    }
    if damage == "gone":
        file.unlink()
    elif damage == "end":
        file.write_bytes(data[:-1])
    else:
        data[header.start + entries[places[damage]]["data_offsets"][0]] ^= 1
        file.write_bytes(data)
    with pytest.raises((CorruptArtifactError, ConfigError)) as found:
        load(path, device="cpu", verify=damage == "elsewhere")
    assert "moefication apply" in str(found.value.hint) or damage == "gone"


def test_apply_eval_and_bench_of_int8_weights(
    calibrated_run: tuple[Path, Path], run_cli: Runner, tmp_path: Path
) -> None:
    run, data = calibrated_run[0], tmp_path / "train.txt"
    plan = ("--top-k", 2, "--device", "cpu")
    for words in (["--embed-code"], ["--for", "mixtral"]):
        refused = run_cli("apply", run, "--weights", "int8", *words, "--device", "cpu", "--json")
        assert refused.code == 2 and words[0] in refused.json["error"]["message"]
    run_cli.ok("apply", run, *plan)
    exact = load(run / "model", device="cpu", weights="int8")
    done = run_cli("apply", run, *plan, "--weights", "int8")
    assert done.code == 0 and "transformers cannot load it" in " ".join(done.out.split())
    assert same_state(load(run / "model", device="cpu", verify=True), exact)
    assert "cannot load them" in (run / "model" / "README.md").read_text()
    assert run_cli.ok("apply", run, *plan, "--weights", "int8")["up_to_date"]
    assert run_cli.ok("verify", run / "model")["damaged"] == 0
    copied = Path(shutil.copytree(run / "model", tmp_path / "damaged"))
    (copied / INT8_WEIGHTS).write_bytes((copied / INT8_WEIGHTS).read_bytes()[:-1])
    (row,) = run_cli("verify", copied, "--json").json["rows"]
    assert row["command"] == "moefication apply RUN --weights int8 --force"
    found = run_cli.ok("eval", run, "--data", data, "--documents", "line", "--limit", 40, "--device", "cpu")
    rows = {row["selection"]: row for row in found["rows"]}
    assert [name for name, row in rows.items() if row["applied"]] == ["regression-int8"]
    assert rows["regression"]["weights"] is None and rows["dense-int8"]["weights"] == "int8"
    assert rows["regression-int8"]["kl_over_float"] == rows["regression-int8"]["kl"] / rows["regression"]["kl"]
    quick = ("--seconds", 0.01, "--repeats", 2, "--mode", "ffn", "--tokens", 4, "--device", "cpu")
    (row,) = run_cli.ok("bench", run, *quick)["rows"]
    assert row["weights"] == "int8"
    refused = run_cli("export", run, "--to", "mixtral", "--out", tmp_path / "out", "--device", "cpu", "--json")
    assert refused.code != 0 and "int8 weights" in refused.json["error"]["message"]
    run_cli.ok("apply", run, *plan)
    assert not (run / "model" / INT8_WEIGHTS).exists() and (run / "model" / "model.safetensors").exists()
