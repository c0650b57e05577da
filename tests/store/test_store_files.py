"""JSON and layer files: strict, atomic, durable, the same bytes in every process."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_directories import FORK, begin, fork, one_file, tensors_of

from moefication_cli.errors import (
    CorruptArtifactError,
    MoEficationError,
    NonFiniteError,
)
from moefication_cli.store import jsonio
from moefication_cli.store.layerfile import expect, open_layer, read_layer, read_metadata, write_layer
from moefication_cli.store.rundir import RunDir


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        "[1]",
        '{"a": "\udcff"}',
        "[" * 99999,
    ],
)
def test_json_that_is_not_strict_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptArtifactError, match=r"x\.json"):
        jsonio.read_object(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(), json_values))
@settings(max_examples=50, deadline=None)
def test_canonical_json_round_trips_and_ignores_insertion_order(value: dict[str, Any]) -> None:
    data = jsonio.canonical(value)
    assert jsonio.parse(data, "here") == value
    assert jsonio.canonical(dict(reversed(value.items()))) == data


def test_nan_cannot_be_written(run: RunDir) -> None:
    with pytest.raises(NonFiniteError):
        jsonio.canonical({"loss": float("nan")})
    with begin(run) as work, pytest.raises(NonFiniteError):
        for i in work.pending():
            work.save(i, tensors_of(i, 4), metrics={"inertia": float("inf")})
    assert run.manifest("split") is None


def test_layer_file_round_trip_rows_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    base = torch.arange(12.0).view(3, 4)
    stored = {
        "inputs_TD": base.T,
        "shared_TD": base,
        "same_TD": base,
        "slice_TD": base[1:],
        "half_T": torch.ones(3, dtype=torch.float16),
        "none_T": torch.ones(0),
    }
    write_layer(path, stored, {"layer": "l.0", "note": "é"})
    tensors, metadata = read_layer(path)
    assert metadata == {"layer": "l.0", "note": "é"} == read_metadata(path)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[n], stored[n]) and tensors[n].dtype == stored[n].dtype for n in stored)
    with open_layer(path) as layer:
        assert torch.equal(layer.rows("inputs_TD", 1, 3), base.T[1:3])
        assert layer.shapes["inputs_TD"] == (4, 3)
        with pytest.raises(CorruptArtifactError, match="no tensor 'x'"):
            layer.tensor("x")
    assert list(read_layer(path, ["half_T"])[0]) == ["half_T"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_layer_bytes_do_not_depend_on_process_or_order(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from moefication_cli.store.layerfile import write_layer
tensors = {"c_F": torch.zeros(2, dtype=torch.int8), "a_F": torch.ones(3), "b_F": torch.arange(4)}
write_layer(Path(sys.argv[1]), tensors, {"z": 1, "layer": "l", "a": 2})
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    tensors = {"b_F": torch.arange(4), "a_F": torch.ones(3), "c_F": torch.zeros(2, dtype=torch.int8)}
    write_layer(tmp_path / "here", tensors, {"layer": "l", "a": 2, "z": 1})
    assert (tmp_path / "here").read_bytes() == (tmp_path / "other").read_bytes()


def test_umask_decides_the_mode(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_layer(tmp_path / "l", {"a_F": torch.ones(2)}, {"layer": "l"})
        jsonio.write(tmp_path / "j", {})
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_files_and_their_folder_are_flushed(run: RunDir, tmp_path: Path, synced: list[int]) -> None:
    def inodes(*paths: Path) -> list[int]:
        return [path.stat().st_ino for path in paths]

    write_layer(tmp_path / "l", {"a_F": torch.ones(2)}, {"layer": "l"})
    assert synced == inodes(tmp_path / "l", tmp_path)
    synced.clear()
    jsonio.write(tmp_path / "j", {})
    assert synced == inodes(tmp_path / "j", tmp_path)
    synced.clear()
    one_file(run)
    model = run.path("model")
    assert {*inodes(model, model / "sub", model / "sub" / "file.txt", run.root)} <= set(synced)


def test_damaged_layer_files_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    write_layer(path, {"a_F": torch.arange(8), "b_F": torch.arange(8)}, {"layer": "l"})
    good = path.read_bytes()
    for bad in [good[:cut] for cut in range(0, len(good), 7)] + [
        good + b"x",
        good.replace(b'"b_F"', b'"a_F"'),
        b"\x80\x04.",
    ]:
        path.write_bytes(bad)
        with pytest.raises(CorruptArtifactError, match="layer_000"):
            read_layer(path)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="layer_000"):
        read_layer(path)
    path.write_bytes(good)
    assert torch.equal(read_layer(path)[0]["b_F"], torch.arange(8))


def test_foreign_safetensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptArtifactError, match="no layer file"):
        read_layer(tmp_path / "x.safetensors")


def test_expect_checks_names_dtypes_and_shapes() -> None:
    tensors = {"expert_F": torch.zeros(4, dtype=torch.int32), "w_ED": torch.zeros(2, 3)}
    good: dict[str, Any] = {"expert_F": (torch.int32, 1), "w_ED": ((torch.float32, torch.float16), (2, None))}
    expect(tensors, good, "f")
    expect({"w_ED": tensors["w_ED"]}, {}, "f", optional=good)
    bad: list[dict[str, Any]] = [
        {**good, "expert_F": (torch.int64, 1)},
        {**good, "expert_F": (torch.int32, 2)},
        {**good, "w_ED": (None, (3, None))},
        {**good, "more_F": (None, 1)},
        {"expert_F": (None, 1)},
    ]
    for spec in bad:
        with pytest.raises(CorruptArtifactError, match=r"^f"):
            expect(tensors, spec, "f")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "layer_000.safetensors"
    write_layer(path, {"a_F": torch.ones(2)}, {"layer": "l"})
    reader, writer = FORK.Pipe(duplex=False)

    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        with pytest.raises(MoEficationError) as caught:
            write_layer(path, {"a_F": torch.ones(20000)}, {"layer": "l"})
        writer.send(f"{caught.value.message} | {caught.value.hint}")

    fork(full_disk).join(20)
    assert reader.poll()
    message = reader.recv()
    assert str(path) in message and "80000 bytes" in message and "free some space" in message
    assert read_layer(path)[0]["a_F"].numel() == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
