"""How much memory there is where a model would run: of the GPU, or of the machine and of the container around us."""

import os
from pathlib import Path

import torch

_V2, _V1 = ("sys/fs/cgroup", "memory.max"), ("sys/fs/cgroup/memory", "memory.limit_in_bytes")


def total_memory(device: torch.device) -> int:
    """Bytes of memory, free or not: the same every time. A container's limit counts where it is below the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *cgroup_limits(Path("/"))])


def cgroup_limits(root: Path) -> list[int]:
    """The limits in bytes of every control group that this process is in, under the file system at `root`.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), cgroup-v1/memory.html (memory.limit_in_bytes). A
    container sees its own group as the top one, so the groups above its path are looked at as well.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, name = _V1 if controllers else _V2
        top = root / folder
        place = top / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            try:
                found.append(int((group / name).read_text()))
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
    return found
