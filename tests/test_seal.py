"""Experts belong to the weights they were made for: other weights are refused, and saving writes both."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_runner import Runner
from converted import convert
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs

from moefication_cli.errors import ConfigError, CorruptArtifactError
from moefication_cli.models.folder import seal
from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.embedded import embed_code
from moefication_cli.models.folder.moe_folder import read_moe_folder, write_moe_settings
from moefication_cli.models.loading import load
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import permute_in_place
from moefication_cli.store import jsonio


def logits(folder: Path, name: str, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, device="cpu", **options)(**tiny_inputs(name)).logits


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of model.safetensors; the file's size stays."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def permuted(folder: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder)
    for site in find_sites(model):
        permute_in_place(model, site, torch.randperm(48, generator=torch.Generator().manual_seed(9)))
    rewrite(
        folder, lambda tensors: tensors.update({n: t.clone() for n, t in model.state_dict().items() if n in tensors})
    )


def with_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["bert.encoder.layer.1.output.dense.weight"].fill_(float("nan")))


def other_experts(folder: Path) -> None:
    other = folder.with_name("other")
    convert("bert", other, top_k=2)
    permuted(other)
    moe = read_moe_folder(other)
    tensors = load_file(other / "moefication" / "routers.safetensors")
    write_moe_settings(other, moe.settings | {"weights": seal.sealed(Checkpoint(other))}, tensors)
    load(other)
    for experts in (other / "moefication").iterdir():
        shutil.copy(experts, folder / "moefication" / experts.name)


def flipped(folder: Path) -> None:
    """One bit of the first FFN's first row, which is among those that are compared."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.encoder.layer.0.intermediate.dense.weight"].view(torch.int32)[0, 0] ^= 1

    rewrite(folder, flip)


@pytest.mark.parametrize("change", [permuted, with_nan, other_experts, flipped])
def test_weights_that_the_experts_were_not_made_for(change: Any, tmp_path: Path, run_cli: Runner) -> None:
    torch.manual_seed(0)
    convert("bert", tmp_path / "moe", top_k=2)
    assert logits(tmp_path / "moe", "bert").isfinite().all()
    change(tmp_path / "moe")
    with pytest.raises(CorruptArtifactError, match="are not those its experts were made for"):
        load(tmp_path / "moe")
    found = run_cli("bench", tmp_path / "moe", "--mode", "ffn", "--tokens", 1)
    assert found.code == 4 and "were made for" in found.err


def test_verify_reads_every_byte_and_a_load_the_rows_of_ffns(tmp_path: Path) -> None:
    convert("bert", tmp_path / "moe", top_k=2)
    load(tmp_path / "moe", verify=True)
    rewrite(
        tmp_path / "moe", lambda t: t["bert.encoder.layer.0.attention.self.query.bias"].view(torch.int32)[0:1].add_(1)
    )
    load(tmp_path / "moe")  # outside of what is compared
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors was altered"):
        load(tmp_path / "moe", verify=True)
    (tmp_path / "moe" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptArtifactError, match="bytes"):
        load(tmp_path / "moe")


@pytest.mark.parametrize("bit", range(8))
def test_one_bit_in_the_settings(bit: int, tmp_path: Path) -> None:
    convert("bert", tmp_path / "moe", top_k=2)
    path = tmp_path / "moe" / "moefication" / "moefication.json"
    data = path.read_bytes()
    for at in range(bit, len(data), 37):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifactError):
            read_moe_folder(tmp_path / "moe")


def test_rows_that_are_compared_are_spread_over_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "_ROWS", 4)
    convert("bert", tmp_path / "moe", top_k=2)
    name = "bert.encoder.layer.0.intermediate.dense.weight"  # 48 rows: 0, 12, 24, 36 are compared
    for row, found in ((24, True), (36, True), (25, False)):
        rewrite(tmp_path / "moe", lambda tensors, row=row: tensors[name][row].neg_())
        if found:
            with pytest.raises(CorruptArtifactError):
                load(tmp_path / "moe")
        else:
            load(tmp_path / "moe")
        rewrite(tmp_path / "moe", lambda tensors, row=row: tensors[name][row].neg_())
    assert seal.sealed(Checkpoint(tmp_path / "moe"))["ffns"]


def test_folders_of_earlier_versions_load_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert("bert", tmp_path / "moe", top_k=2)
    expected = logits(tmp_path / "moe", "bert")
    path = tmp_path / "moe" / "moefication" / "moefication.json"
    settings = jsonio.read_object(path)
    old = {n: v for n, v in settings.items() if n not in {"weights", "digest"}} | {"schema": "moefication/model@1"}
    jsonio.write(path, old)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(tmp_path / "moe", "bert"), expected)
    assert "cannot be checked" in caplog.text


@pytest.mark.parametrize(("name", "options"), [("bert", {}), ("llama", {}), ("t5", {}), ("bert", {"fraction": 0.5})])
def test_load_save_load(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True, pruned=(1,))
    expected = logits(tmp_path / "moe", name, **options)
    load(tmp_path / "moe", device="cpu", **options).save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(tmp_path / "again", name, verify=True), expected, atol=1e-6)
    dense = getattr(transformers, json.loads((tmp_path / "again" / "config.json").read_text())["architectures"][0])
    with torch.no_grad():
        plain = dense.from_pretrained(tmp_path / "again")(**tiny_inputs(name)).logits
        source = dense.from_pretrained(tmp_path / "source")(**tiny_inputs(name)).logits
    assert torch.allclose(plain, source, atol=1e-5) and not torch.allclose(plain, expected, atol=1e-3)


def test_a_folder_with_code_is_saved_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(0)
    convert("llama", tmp_path / "moe", top_k=2)
    embed_code(tmp_path / "moe")
    expected, kind = logits(tmp_path / "moe", "llama"), transformers.AutoModelForCausalLM
    for source, target in (("moe", "again"), ("again", "third")):
        kind.from_pretrained(tmp_path / source, trust_remote_code=True).save_pretrained(tmp_path / target)
        with torch.no_grad():
            found = kind.from_pretrained(tmp_path / target, trust_remote_code=True)(**tiny_inputs("llama")).logits
        assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="dense model alone"):
        load(tmp_path / "third").save_pretrained(tmp_path / "fourth", push_to_hub=True)


CODE = """
from pathlib import Path
import transformers
Path({marker!r}).touch()
class OwnConfig(transformers.OPTConfig):
    model_type = "own_opt"
class OwnForCausalLM(transformers.OPTForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_where_the_command_allows_it(
    calibrated_run: tuple[Path, Path], tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run, model = calibrated_run
    marker = tmp_path / "ran"
    (model / "code.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "own_opt",
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"},
    }
    (model / "config.json").write_text(json.dumps(settings | {"architectures": ["OwnForCausalLM"]}))
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"trust_remote_code": True}))
    for command in (["inspect", model], ["split", run], ["run", run], ["apply", run], ["bench", model]):
        found = run_cli(*command)
        assert found.code == 2 and "--trust-remote-code" in found.err, command
        assert not marker.exists()
    run_cli.ok("inspect", model, "--trust-remote-code")
    assert marker.exists()
