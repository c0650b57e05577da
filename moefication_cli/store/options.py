"""What a stage is asked to make: the argument of `RunDir.begin`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moefication_cli.errors import ConfigError
from moefication_cli.store import jsonio


@dataclass(frozen=True)
class StageOptions:
    """What `RunDir.begin` is asked for.

    config    every option's value; `sources` says where each came from (default "default")
    compared  the options that decide freshness and resumption; None: all of them
    inputs    {upstream stage, `base_model` or other name: digest}
    layers    FFN module paths in execution order; empty for a stage made in one go in `work.folder`
    only      indices this process may do (array task, rank); others are left alone
    force     redo `only`, or everything
    join      take part in what another process has prepared, even if the stage was up to date before

    Raises ValueError where `compared` names an option that `config` lacks.
    """

    config: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    compared: Collection[str] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[str] = ()
    only: Collection[int] | None = None
    force: bool = False
    join: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.compared is not None and (odd := set(self.compared) - set(self.config)):
            raise ValueError(f"compared names {sorted(odd)[0]!r}, which config lacks")

    def described(self) -> dict[str, dict[str, Any]]:
        """`config` as the manifest records it."""
        return {
            name: {
                "value": jsonio.plain(value),
                "source": self.sources.get(name, "default"),
                "compared": self.compared is None or name in self.compared,
            }
            for name, value in self.config.items()
        }

    def targets(self, stage: str) -> Sequence[int]:
        """The layers this process may do, ascending. Raises `ConfigError` for an index that is none of them."""
        count = len(self.layers)
        chosen = range(count) if self.only is None else sorted(set(self.only))
        if wrong := [i for i in chosen if not 0 <= i < count]:
            raise ConfigError(
                f"there is no layer {wrong[0]}: `{stage}` has {count} layers", f"choose from 0-{count - 1}"
            )
        return chosen
