"""Partitions of other programs: gpmetis' text, and the lists of labels that MoEfication's published code saves."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import Runner

from moefication_cli.errors import ConfigError
from moefication_cli.split.partition_files import find_partition_file, parse_metis_partition, read_partition_file
from moefication_cli.store.layerfile import read_layer

LABELS = [np.int32(n % 4) for n in range(12)]


def test_metis_partition_files() -> None:
    assert parse_metis_partition("1\n0\n1\r\n0\n\n", 4).tolist() == [1, 0, 1, 0]
    for text, words in [
        ("0\n1\n0\n", "3 lines"),
        ("", "0 lines"),
        ("0\n-1\n0\n1\n", "line 2"),
        ("0\nx\n0\n1\n", "line 2"),
        ("0\n\n0\n1\n", "line 2"),
        ("0\n1.5\n0\n1\n", "line 2"),
        ("0\n9\n0\n1\n", "part 9"),
    ]:
        with pytest.raises(ConfigError, match=words):
            parse_metis_partition(text, 4)
    with pytest.raises(ConfigError, match="2 experts"):
        parse_metis_partition("0\n1\n2\n3\n", 4, num_experts=2)


def as_of_numpy_1(path: Path) -> None:
    """The same file as an older numpy, which kept its scalars elsewhere, would have written it."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("kind", ["numpy 2", "numpy 1", "before torch 1.6", "integers", "tensor", "array"])
def test_labels_of_the_published_code(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bert.encoder.layer.0.intermediate.dense.weight"
    kinds: dict[str, Any] = {"integers": [int(x) for x in LABELS], "tensor": torch.arange(12) % 4}
    torch.save(kinds.get(kind, LABELS), path, _use_new_zipfile_serialization=kind != "before torch 1.6")
    if kind == "numpy 1":
        as_of_numpy_1(path)
    expert_F, num_experts = read_partition_file(path, 12)
    assert num_experts == 4 and expert_F.tolist() == [n % 4 for n in range(12)]


class Harmful:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def test_labels_that_are_none(tmp_path: Path) -> None:
    path, ran = tmp_path / "labels", tmp_path / "ran"
    for value, words in [
        (Harmful(ran), "more than a list of numbers"),
        ([0, 1] * 5, r"\[10\], not one expert number for each of 12"),
        ([0.5] * 12, "float"),
        ([-1] * 6 + [0] * 6, "expert -1"),
        ([0] * 6 + [4] * 6, "5 experts do not divide 12"),
        ({"a": 1}, "more than a list of numbers"),
    ]:
        torch.save(value, path)
        with pytest.raises(ConfigError, match=words):
            read_partition_file(path, 12)
    assert not ran.exists()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="is damaged"):
        read_partition_file(path, 12)
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match="neither text"):
        read_partition_file(path, 12)


def test_a_file_is_found_by_the_name_of_its_parameter(tmp_path: Path) -> None:
    for layer in (1, 11):
        (tmp_path / f"encoder.layer.{layer}.intermediate.dense.weight").touch()
    found = find_partition_file(str(tmp_path), 1, "bert.encoder.layer.1.intermediate.dense.weight")
    assert found.name == "encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(ConfigError, match="0 partition files for layer 2"):
        find_partition_file(str(tmp_path), 2, "bert.encoder.layer.2.intermediate.dense.weight")


def test_split_takes_them_and_sees_when_they_change(bert: Path, tmp_path: Path, run_cli: Runner) -> None:
    folder, run = tmp_path / "param_split", tmp_path / "run"
    folder.mkdir()
    for layer in (0, 1):
        labels = [np.int32((n + layer) % 12) for n in range(48)]
        torch.save(labels, folder / f"bert.encoder.layer.{layer}.intermediate.dense.weight")
    words = ["split", run, "--model", bert, "--from-partition", folder]
    assert [row["num_experts"] for row in run_cli.ok(*words)["rows"]] == [12, 12]
    assert read_layer(run / "split" / "layer_001.safetensors")[0]["expert_F"].tolist() == [
        (n + 1) % 12 for n in range(48)
    ]
    assert run_cli.ok(*words)["up_to_date"]
    torch.save([n // 4 for n in range(48)], folder / "bert.encoder.layer.0.intermediate.dense.weight")
    assert not run_cli.ok(*words)["up_to_date"]
    assert read_layer(run / "split" / "layer_000.safetensors")[0]["expert_F"].tolist() == [n // 4 for n in range(48)]
