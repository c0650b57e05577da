"""moefication: turn the FFNs of trained transformers into mixtures of experts (arXiv 2110.01786).

Importing the package costs nothing; `load` imports torch when it is called.
"""

from typing import Any

__version__ = "0.1.0"


def load(path: str, **kwargs: Any) -> Any:
    """Load a folder written by `moefication apply` as the MoE. See `moefication_cli.models.loading.load_moe`."""
    from moefication_cli.models.loading import load_moe

    return load_moe(path, **kwargs)
