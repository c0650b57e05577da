"""SIGUSR1, which batch queues send before the time is up: an end after the present layer, shard or batch.

The request is kept where the process keeps its handlers, so that a command finds it wherever it was sent.
"""

import signal
from typing import Any


class _EarlyEnd:
    """The handler; `asked` once the signal came."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: Any) -> None:
        self.asked = True


def take_early_ends() -> None:
    """From now on SIGUSR1 asks for an early end and does not kill the process."""
    signal.signal(signal.SIGUSR1, _EarlyEnd())


def early_end_asked() -> bool:
    """Whether the signal has come since `take_early_ends`."""
    handler = signal.getsignal(signal.SIGUSR1)
    return isinstance(handler, _EarlyEnd) and handler.asked
