"""Memory limits of containers, from files as the kernel writes them."""

from pathlib import Path

import pytest
import torch

from moefication_cli.models.memory import cgroup_limits, total_memory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_limits_of_a_group_and_of_those_above_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/batch/job7\n")
    write(tmp_path / "sys/fs/cgroup/batch/job7/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/batch/memory.max", "8589934592\n")
    assert cgroup_limits(tmp_path) == [8 * 2**30]


def test_version_1_and_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpuset:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n")
    write(tmp_path / "sys/fs/cgroup/cpuset/memory.limit_in_bytes", "1\n")  # no group of the memory controller
    assert cgroup_limits(tmp_path) == [2 * 2**30]
    assert cgroup_limits(tmp_path / "absent") == []


def test_the_least_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = total_memory(torch.device("cpu"))
    monkeypatch.setattr("moefication_cli.models.memory.cgroup_limits", lambda root: [2**20, 2**60])
    assert total_memory(torch.device("cpu")) == 2**20 < machine
