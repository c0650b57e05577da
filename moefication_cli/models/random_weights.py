"""A model of any architecture of transformers with random weights: real sizes without a download."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers


def random_model(
    auto: str, config: str, settings: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
    """An `auto` class's model of a `config` class with these settings, frozen and in evaluation mode.

    The global random state is as before afterwards. Raises KeyError for an activation that transformers has not.
    """
    made = getattr(transformers, config)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(made, dtype=dtype)
    return model.eval().requires_grad_(False).to(device)
