"""Layer files that grow: pieces in any order, cut short, or moved into place when the process dies."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefication_cli.errors import CorruptArtifactError, MoEficationError
from moefication_cli.store.growing import GrowingLayer
from moefication_cli.store.layerfile import open_layer, read_layer
from moefication_cli.store.manifest import Manifest
from moefication_cli.store.options import StageOptions
from moefication_cli.store.partial import Partial
from moefication_cli.store.rundir import RunDir

OTHERS = {
    "sequence_T": torch.arange(7, dtype=torch.int32),
    "rate_F": torch.rand(5),
    "wave_F": torch.ones(5, dtype=torch.complex64),
}


def rows_of(width: int, seed: int = 0) -> Tensor:
    return torch.randn(7, width, generator=torch.Generator().manual_seed(seed)).half()


def grow(path: Path, rows_TD: Tensor, *pieces: slice) -> None:
    with GrowingLayer(path, rows_TD.shape[1], rows_TD.dtype) as file:
        for piece in pieces:
            file.write(piece.start, rows_TD[piece])


@pytest.mark.parametrize("width", [4, 3])  # seven rows of three halves end where no float may begin
def test_pieces_in_any_order_make_a_layer_file(tmp_path: Path, width: int) -> None:
    path, rows_TD = tmp_path / "grown", rows_of(width)
    grow(path, rows_of(width, seed=1), slice(3, 7))  # a piece of a run that was killed, and rows beyond the last
    grow(path, torch.cat([rows_TD, rows_TD]), slice(3, 9), slice(0, 3))
    others = {name: tensor for name, tensor in OTHERS.items() if name != "wave_F"}
    with GrowingLayer(path, width, torch.float16) as file:
        assert torch.equal(file.rows(2, 4), rows_TD[2:6])
        file.complete("inputs_TD", 7, others, {"layer": "l.0", "note": "é"})
    tensors, metadata = read_layer(path)
    assert metadata == {"layer": "l.0", "note": "é"}
    assert tensors.keys() == {"inputs_TD", *others}
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in others.items()
    )
    assert torch.equal(tensors["inputs_TD"], rows_TD)
    with open_layer(path) as layer:
        assert torch.equal(layer.rows("inputs_TD", 1, 3), rows_TD[1:3])
        assert not torch.equal(layer.rows("inputs_TD", 1, 3), rows_TD[2:4])  # negative control
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_lacks_rows_or_room_is_an_error(tmp_path: Path) -> None:
    path, rows_TD = tmp_path / "grown", rows_of(4)
    grow(path, rows_TD, slice(0, 5))
    with GrowingLayer(path, 4, torch.float16) as file:
        assert len(file.rows(0, 5)) == 5
        with pytest.raises(CorruptArtifactError, match="is truncated"):
            file.rows(0, 6)
        with pytest.raises(ValueError, match="complex64"):  # not a dtype of the format: said before anything is written
            file.complete("inputs_TD", 5, OTHERS, {"layer": "l.0"})
        with pytest.raises(ValueError, match="takes 20"):
            file.complete("inputs_TD", 5, {}, {"layer": "l" * 20_000})
        assert torch.equal(file.rows(0, 5), rows_TD[:5])


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, torch
from pathlib import Path
from moefication_cli.errors import MoEficationError
from moefication_cli.store.growing import GrowingLayer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
try:
    with GrowingLayer(Path(sys.argv[1]), 1000, torch.float32) as file:
        file.write(0, torch.ones(3, 1000))
        file.sync()
        print("written", flush=True)
        file.write(3, torch.ones(1, 1000))
except MoEficationError as error:
    print(error.message, "|", error.hint)
"""
    path = tmp_path / "grown"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("written\n"), done.stderr
    assert str(path) in done.stdout and "4000 bytes" in done.stdout and "free some space" in done.stdout


def make(run: RunDir, seed: int = 0) -> Manifest | None:
    """A stage of two layers that grow, each in two pieces."""
    with run.begin("activations", StageOptions(config={"seed": seed}, inputs={}, layers=["l.0", "l.1"])) as work:
        for index in work.pending():
            path, rows_TD = work.scratch / f"rows_{index}", rows_of(4, seed + index)
            work.move_back(index, path)
            if not path.exists():
                grow(path, rows_TD, slice(0, 3), slice(3, 7))
            with GrowingLayer(path, 4, torch.float16) as file:
                file.complete("inputs_TD", 7, {"rate_F": torch.ones(5)}, {"layer": work.layers[index]})
            work.move_in(index, path, {"tokens": 7})
        return work.finish()


def test_a_layer_in_place_that_was_not_recorded_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, record = RunDir(tmp_path / "run"), Partial.record

    def dies(partial: Partial, index: int, *rest: object) -> None:
        if index == 1:
            raise MoEficationError("killed", "")
        record(partial, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Partial, "record", dies)
    with pytest.raises(MoEficationError, match="killed"):
        make(run)
    partial = run.root / ".activations.partial"
    assert {path.name for path in partial.glob("layer_*")} == {"layer_000.safetensors", "layer_001.safetensors"}
    kept = {index: (partial / f"layer_00{index}.safetensors").stat().st_ino for index in (0, 1)}
    monkeypatch.setattr(Partial, "record", record)
    resumed, whole = make(run), make(RunDir(tmp_path / "whole"))
    assert resumed is not None and whole is not None and resumed.files == whole.files
    assert kept == {i: (run.path("activations") / f"layer_00{i}.safetensors").stat().st_ino for i in (0, 1)}


def test_redoing_a_layer_leaves_the_finished_stage_alone(tmp_path: Path) -> None:
    """A forced run has hard links to the finished layers: growing into one of them would change what is there."""
    run = RunDir(tmp_path / "run")
    assert make(run) is not None
    before = (run.path("activations") / "layer_000.safetensors").read_bytes()
    with run.begin(
        "activations", StageOptions(config={"seed": 0}, inputs={}, layers=["l.0", "l.1"], force=True)
    ) as work:
        for index in work.pending():
            path = work.scratch / f"rows_{index}"
            work.move_back(index, path)
            assert not path.exists()
            grow(path, rows_of(4, seed=9), slice(0, 7))
    assert (run.path("activations") / "layer_000.safetensors").read_bytes() == before
