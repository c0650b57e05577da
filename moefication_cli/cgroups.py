"""What the control groups of this process allow: a container's or a batch job's share of the machine. Imports no torch.

https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1: cgroup-v1/memory.html, scheduler/sched-bwc.html
"""

from collections.abc import Iterator
from pathlib import Path


def memory_limits(root: Path = Path("/")) -> list[int]:
    """The limits in bytes of all groups this process is in; empty without a limit. `root`: the file system looked at."""
    texts = [text for (text,) in _values(root, "memory", ["memory.max"], ["memory.limit_in_bytes"])]
    return [int(text) for text in texts if text.isdigit()]


def cpu_limits(root: Path = Path("/")) -> list[float]:
    """How many CPUs' time each of these groups may use; empty without a limit."""
    found = []
    for texts in _values(root, "cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        numbers = " ".join(texts).split()  # quota and period in microseconds; "max" or -1: no limit
        if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[1]):
            found.append(int(numbers[0]) / int(numbers[1]))
    return found


def _values(root: Path, controller: str, v2: list[str], v1: list[str]) -> Iterator[list[str]]:
    """The contents of these files in the process's groups, and in those above them: a container sees its own as the top."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        place = top / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            try:
                yield [(group / name).read_text().strip() for name in (v1 if controllers else v2)]
            except OSError:
                continue
