"""What containers and batch jobs may use, from files as the kernel writes them; threads and waiting follow it."""

import os
from pathlib import Path

import pytest
import torch

from moefication_cli.cgroups import cpu_limits, memory_limits
from moefication_cli.cli.threads import share_the_machine
from moefication_cli.models.memory import total_memory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_limits_of_a_group_and_of_those_above_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/batch/job7\n")
    write(tmp_path / "sys/fs/cgroup/batch/job7/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/batch/memory.max", "8589934592\n")
    write(tmp_path / "sys/fs/cgroup/batch/job7/cpu.max", "250000 100000\n")
    write(tmp_path / "sys/fs/cgroup/batch/cpu.max", "max 100000\n")
    assert memory_limits(tmp_path) == [8 * 2**30]
    assert cpu_limits(tmp_path) == [2.5]


def test_version_1_and_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    write(
        tmp_path / "proc/self/cgroup", "5:cpuset:/docker/abc\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    )
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n")
    write(tmp_path / "sys/fs/cgroup/cpuset/memory.limit_in_bytes", "1\n")  # no group of the memory controller
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    assert memory_limits(tmp_path) == [2 * 2**30]
    assert cpu_limits(tmp_path) == [3.0]
    assert memory_limits(tmp_path / "absent") == []


def test_the_least_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = total_memory(torch.device("cpu"))
    monkeypatch.setattr("moefication_cli.models.memory.memory_limits", lambda: [2**20, 2**60])
    assert total_memory(torch.device("cpu")) == 2**20 < machine


def test_threads_wait_and_count_as_the_machine_is_shared() -> None:
    many = float(os.cpu_count() or 1)
    for before, limits, after in [
        ({}, [], {"GOMP_SPINCOUNT": "1000"}),
        ({}, [0.4, many], {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "7"}, [0.4], {"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, [], {"OMP_WAIT_POLICY": "active"}),
    ]:
        environment: dict[str, str] = dict(before)
        share_the_machine(environment, limits)
        assert environment == after
