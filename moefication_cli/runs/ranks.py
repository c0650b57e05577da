"""Several processes over one stage: the ranks that torchrun started (or whatever else sets RANK, WORLD_SIZE, MASTER_*).

Layers and data shards are shared through the store's locks: a rank that is free takes the next one, so that unequal
machines end at about the same time, and a layer that a dead rank had taken is free again. torch.distributed makes ranks
begin and end a stage together and notice when one is gone; only a few hundred bytes of JSON are exchanged, so gloo serves
CUDA runs as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moefication_cli.errors import ConfigError, MoEficationError, first_line
from moefication_cli.store import jsonio

if TYPE_CHECKING:  # `--help` imports this module and needs none of them
    from torch.distributed import Store  # type: ignore[attr-defined]

    from moefication_cli.store.manifest import Manifest
    from moefication_cli.store.options import StageOptions
    from moefication_cli.store.rundir import RunDir
    from moefication_cli.store.writer import StageWriter

TIMEOUT = timedelta(minutes=10)  # to join, and to begin or end a stage together; a dead rank is noticed at once
_PATIENCE = 7 * 86400.0  # seconds to wait for a layer of another rank: a dead one's lock is free
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HINT = "run the same command again: finished layers are kept"
_FAILED = "failed"


class Ranks:
    """One process among those that share a stage; alone by default."""

    def __init__(self, rank: int = 0, size: int = 1, store: "Store | None" = None) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._steps = 0

    @contextmanager
    def begin(self, run: "RunDir", stage: str, options: "StageOptions") -> "Iterator[StageWriter]":
        """`RunDir.begin` for all ranks: the first prepares the work, the others join it.

        Raises ConfigError when the ranks were given different work, MoEficationError when one of them is gone.
        """
        if self.size == 1:
            with run.begin(stage, options) as work:
                yield work
            return
        self._agree(stage, options)
        if self.rank == 0:
            with run.begin(stage, options) as work:
                self.exchange(work.up_to_date)
                work.timeout = _PATIENCE
                yield work
            return
        up_to_date = self.exchange(None)[0]
        with run.begin(stage, replace(options, force=False, join=not up_to_date)) as work:
            work.timeout = _PATIENCE
            yield work

    def finish(self, work: "StageWriter", seconds: float | None = None) -> "Manifest | None":
        """`StageWriter.finish` once every rank is done; no rank goes on before the stage is committed. `seconds`: of the first."""
        self.wait()
        if self.size == 1:
            return work.finish(seconds=seconds)
        manifest = work.finish(seconds=seconds) if self.rank == 0 else None
        self.wait()
        return manifest if self.rank == 0 else work.finish()

    def wait(self) -> None:
        """Until every rank is here. Raises MoEficationError when one is gone, with its own error if it left one."""
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError as error:
            raise self.failure() or MoEficationError(
                f"rank {self.rank} of {self.size} lost another rank: it died or cannot be reached ({first_line(error)})",
                _HINT,
            ) from None

    def report(self, error: MoEficationError) -> None:
        """Leave this rank's error for the others."""
        details = {"rank": self.rank, "message": error.message, "hint": error.hint}
        details |= {"code": error.code, "exit_code": error.exit_code}
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.compare_set(_FAILED, "", jsonio.canonical(details).decode())

    def failure(self) -> MoEficationError | None:
        """The error that another rank left, if one did."""
        try:
            if self._store is None or not self._store.check([_FAILED]):
                return None
            found = jsonio.parse(self._store.get(_FAILED), "the error of a rank")
        except RuntimeError:  # the process that kept the store is gone
            return None
        if found["rank"] == self.rank:
            return None
        error = MoEficationError(f"rank {found['rank']}: {found['message']}", found["hint"])
        error.code, error.exit_code = found["code"], found["exit_code"]
        return error

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank."""
        assert self._store is not None
        self._steps += 1
        self._store.set(f"{self._steps}/{self.rank}", jsonio.canonical({"value": value}).decode())
        self.wait()
        told = [self._store.get(f"{self._steps}/{rank}") for rank in range(self.size)]
        return [jsonio.parse(data, f"the message of rank {rank}")["value"] for rank, data in enumerate(told)]

    def _agree(self, stage: str, options: "StageOptions") -> None:
        work: dict[str, Any] = {"stage": stage, "size": self.size, **options.inputs, **options.config}
        work |= {"layers": options.layers, "only": options.only, "force": options.force}
        for rank, other in enumerate(self.exchange(work)):
            mine = jsonio.plain(work)
            if different := sorted(name for name in mine | other if mine.get(name) != other.get(name)):
                name = different[0]
                raise ConfigError(
                    f"ranks disagree about `{stage}`: `{name}` is {mine.get(name)!r} on rank {self.rank} and "
                    f"{other.get(name)!r} on rank {rank}",
                    "start all ranks with the same command, run directory and model",
                )


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) from the environment; (0, 1) for a process on its own. Imports no torch."""
    rank, size, *place = (os.environ.get(name, "") for name in _VARIABLES)
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() and all(place) else (0, 1)


@contextmanager
def open_ranks(timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the other ranks of the environment. An error of one of them is raised in the others, too.

    Raises MoEficationError when they do not come within `timeout`.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise MoEficationError(
            f"rank {rank} of {size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {first_line(error)}",
            "check that every rank was started with the same number of ranks (GLOO_SOCKET_IFNAME names the network)",
        ) from None
    ranks = Ranks(rank, size, dist.PrefixStore("moefication", store))  # type: ignore[attr-defined]
    try:
        yield ranks
    except BaseException as error:
        if isinstance(error, MoEficationError):
            ranks.report(error)
        # A rank that fails alone makes the launcher stop the others: theirs is its error, not the signal.
        raise ranks.failure() or error from None
    finally:
        dist.destroy_process_group()


def local_device(device: str, size: int) -> str:
    """The device of this rank: `auto` and `cuda` become one CUDA device per rank of a machine."""
    if size == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
