"""How the threads of a command wait for each other and how many there are; set before torch and numba are loaded."""

import math
import os
from collections.abc import MutableMapping, Sequence

from moefication_cli.cgroups import cpu_limits

# Turns of a waiting thread's loop before it sleeps, of libgomp, which torch and numba use on Linux. Its default is
# 300,000: beside one other process train-router then took six times as long, with 1,000 turns twice as long, and alone
# 26.4 instead of 24.8 seconds (two cores, BERT of 384 x 1536, one layer).
_SPINS = "1000"


def share_the_machine(environment: MutableMapping[str, str], limits: Sequence[float] | None = None) -> None:
    """Bound spinning and threads, where the user's environment does not say otherwise.

    Threads: no more than the CPUs whose time the container may use, which the kernel's count of CPUs does not show.
    `limits` are those of `cgroups.cpu_limits`.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
    allowed = min(cpu_limits() if limits is None else limits, default=math.inf)
    if allowed < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, math.ceil(allowed))))
