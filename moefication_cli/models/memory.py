"""How much memory there is where a model would run: of the GPU, or of the machine and of the container around us."""

import os

import torch

from moefication_cli.cgroups import memory_limits


def total_memory(device: torch.device) -> int:
    """Bytes of memory, free or not: the same every time. A container's limit counts where it is below the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *memory_limits()])
