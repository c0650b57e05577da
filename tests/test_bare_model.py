"""A model that is one file with weights: `--model FILE --model-config DIR`, and what people's files look like."""

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from safetensors.torch import load_file, save_file

from moefication_cli import load
from moefication_cli.errors import MoEficationError
from moefication_cli.models.folder import bare
from moefication_cli.store import files


@pytest.fixture
def weights(bert: Path) -> dict[str, Any]:
    return load_file(bert / "model.safetensors")


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """The configuration and the tokenizer alone."""
    shutil.copytree(bert, made := tmp_path / "configuration")
    (made / "model.safetensors").unlink()
    return made


def written(run: Path) -> dict[str, Any]:
    return load_file(run / "source" / "model.safetensors")


def test_run_converts_a_bare_checkpoint(
    weights: dict[str, Any], folder: Path, data: Path, tmp_path: Path, run_cli: Runner
) -> None:
    run, file = tmp_path / "run", tmp_path / "pytorch_model.bin"
    torch.save(weights, file)
    source = ["--model", file, "--model-config", folder]
    made = run_cli.ok("run", run, *source, "--data", data, "--expert-size", 4, "--router", "mlp", "--fraction", 0.5)
    assert torch.equal(load(made["path"]).state_dict()["classifier.weight"], weights["classifier.weight"])
    assert run_cli.ok("split", run, "--expert-size", 4)["up_to_date"]  # later stages find it without being told
    file.rename(tmp_path / "elsewhere.bin")
    assert run_cli.ok("split", run, "--expert-size", 4)["up_to_date"]
    weights["classifier.bias"] += 1
    torch.save(weights, file)
    changed = run_cli("split", run, *source, "--expert-size", 4)
    assert changed.code == 3 and "`base_model` changed" in changed.err
    assert torch.equal(written(run)["classifier.bias"], weights["classifier.bias"])


def wrapped(weights: dict[str, Any]) -> dict[str, Any]:
    return {"step": 3, "optimizer": {"lr": 0.1}, "state_dict": {f"module.{name}": t for name, t in weights.items()}}


@pytest.mark.parametrize("kind", ["plain", "wrapped", "nested", "safetensors"])
def test_files_as_people_have_them(
    kind: str, weights: dict[str, Any], folder: Path, tmp_path: Path, run_cli: Runner
) -> None:
    file = tmp_path / f"checkpoint.{'safetensors' if kind == 'safetensors' else 'bin'}"
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"plain": weights, "wrapped": wrapped(weights), "nested": {"model": wrapped(weights)}}[kind], file)
    run_cli.ok("split", tmp_path / "run", "--model", file, "--model-config", folder, "--method", "kmeans")
    found = written(tmp_path / "run")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_what_is_no_such_pair(
    weights: dict[str, Any], bert: Path, folder: Path, tmp_path: Path, run_cli: Runner
) -> None:
    run, file = tmp_path / "run", tmp_path / "checkpoint.bin"

    def refused(value: Any, *words: Any) -> str:
        torch.save(value, file)
        found = run_cli("split", run, "--model", *(words or (file, "--model-config", folder)), "--method", "random")
        assert found.code == 2 and "Traceback" not in found.err and not (run / "source").exists(), found.err
        return str(found.err)

    assert "--model-config DIR" in refused(weights, file)
    assert "not a folder" in refused(weights, file, "--model-config", tmp_path / "absent")
    assert "no config.json" in refused(weights, file, "--model-config", tmp_path)
    assert "is for a file" in refused(weights, bert, "--model-config", folder)
    assert "holds no state dict; its entries: step" in refused({"step": 1})
    assert "holds no state dict" in refused([1, 2])
    assert "do not belong together" in refused({f"other.{name}": tensor for name, tensor in weights.items()})
    assert "refused by torch.load" in refused({"a": Path("x")})
    run_cli.ok("split", run, "--model", bert, "--method", "random", "--dry-run")
    torch.save(weights, file)
    found = run_cli("split", run, "--model", file, "--model-config", folder, "--method", "random", "--dry-run")
    assert found.code == 2 and "writes nothing" in found.err and not (run / "source").exists()


def test_the_written_file_is_like_any_other(weights: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    torch.save(weights, file := tmp_path / "checkpoint.bin")
    (out := tmp_path / "out").mkdir()
    old = os.umask(0o027)
    try:
        bare.write_folder(file, folder, out)
    finally:
        os.umask(old)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert load_file(out / "model.safetensors").keys() == weights.keys()


def test_a_disk_without_room_is_named(weights: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    torch.save(weights, file := tmp_path / "checkpoint.bin")
    (out := tmp_path / "out").mkdir()
    shutil.copy(folder / "config.json", out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MoEficationError, match=r"cannot write .*model\.safetensors") as caught:
            bare.write_folder(file, folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "free some space" in str(caught.value.hint)
    assert not list(out.glob("*model.safetensors*"))


def test_later_stages_do_not_read_the_weights_again(
    weights: dict[str, Any], folder: Path, tmp_path: Path, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, file := tmp_path / "checkpoint.bin")
    split = ["split", tmp_path / "run", "--model", file, "--model-config", folder, "--method", "random"]
    run_cli.ok(*split)
    run_cli.ok(*split)  # learns what `source.json` said of the files
    read: list[str] = []
    own = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path.name) or own(path))
    run_cli.ok(*split)
    assert "model.safetensors" not in read and "checkpoint.bin" not in read
