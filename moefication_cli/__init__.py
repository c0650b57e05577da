"""moefication: turn the FFNs of trained transformers into mixtures of experts (arXiv 2110.01786).

Importing the package costs nothing: torch is imported when one of its functions is first asked for. A stage is a
function `(RunDir, Config, Control) -> Result`; its options are the dataclasses of `moefication_cli.config`.

    from moefication_cli import convert, load

    made = convert("MODEL", data="calibration.txt", fraction=0.2, out="RUN")
    model = load(made.path)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "RunDir", "apply_experts", "build_graph", "collect_activations", "convert", "evaluate", "load", "register_experts",
    "split_neurons", "train_router",
]  # fmt: skip

_HOMES = {
    "RunDir": "store.rundir",
    "apply_experts": "stages.apply_experts",
    "build_graph": "stages.build_graph",
    "collect_activations": "stages.collect_activations",
    "convert": "stages.convert",
    "evaluate": "stages.evaluate",
    "load": "models.loading",
    "register_experts": "models.stock_experts",
    "split_neurons": "stages.split_neurons",
    "train_router": "stages.train_router",
}

if TYPE_CHECKING:
    from moefication_cli.models.loading import load
    from moefication_cli.models.stock_experts import register_experts
    from moefication_cli.stages.apply_experts import apply_experts
    from moefication_cli.stages.build_graph import build_graph
    from moefication_cli.stages.collect_activations import collect_activations
    from moefication_cli.stages.convert import convert
    from moefication_cli.stages.evaluate import evaluate
    from moefication_cli.stages.split_neurons import split_neurons
    from moefication_cli.stages.train_router import train_router
    from moefication_cli.store.rundir import RunDir


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
