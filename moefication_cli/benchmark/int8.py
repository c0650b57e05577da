"""`bench --weights int8`: both sides with int8 weights, and torch's own dynamic quantisation as a second dense side.

Dense rows are the faster of two ways that a user has: `torch._int_mm` with tokens rounded one by one (`models.int8.Int8Linear`), and
`torch.ao.quantization.quantize_dynamic`, deprecated but there, with one scale for all tokens.
"""

import statistics
import warnings
from typing import Any

import torch
from torch import nn

from moefication_cli.benchmark.shapes import share


def dynamic_twin(model: nn.Module) -> Any:
    """The model under torch's dynamic quantisation, or None where this torch has it no longer. Embeddings stay float32."""
    try:
        quantise = torch.ao.quantization.quantize_dynamic
    except AttributeError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantise(share(model), {nn.Linear}, dtype=torch.qint8, inplace=True).eval()


def fastest(taken: list[list[float]]) -> list[float]:
    """The seconds of the call with the least median."""
    return min(taken, key=statistics.median)
