"""One line about a finished stage, for the people who watch `run` and `demo`."""

import time
from collections.abc import Callable
from typing import Any

from moefication_cli.runs.control import Control, Result


def told(control: Control, stage: Callable[[], Result]) -> Result:
    """The result of one stage; says when it is done what came out, and how long it took."""
    begun = time.monotonic()
    result = stage()
    seconds = time.monotonic() - begun
    if result.up_to_date:
        control.say(f"{result.command}: up to date")
    else:
        control.say(", ".join((f"{result.command}: {outcome(result)}", f"{seconds:.1f} s")))
    return result


def outcome(result: Result) -> str:
    """What a stage made, from what it says under `--json`.

    "4 layers, 64 experts of 4"
    """
    layers = result.payload.get("metrics", {}).get("layers", [])
    if result.command == "eval":
        return f"{len(result.payload['rows'])} rows"
    if result.command == "finetune":
        return "kept" if result.payload["kept"] else "no better on held-out data, nothing kept"
    if not layers:  # of a stage whose layers are not all there
        return "done"
    parts = [f"{len(layers)} layers"]
    if result.command == "collect-activations":
        parts.append(f"{layers[0]['tokens']:,} tokens")
    elif result.command == "split":
        parts.append(f"{_span(layers, 'num_experts')} experts of {_span(layers, 'expert_size')}")
    elif result.command == "apply":
        share = sum(layer["ffn_flops_fraction"] for layer in layers) / len(layers)
        parts.append(f"{share:.3f} of the dense FFNs' compute")
    return ", ".join(parts)


def _span(layers: list[dict[str, Any]], name: str) -> str:
    """12, or 8 to 12 where layers differ."""
    values = [layer[name] for layer in layers]
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
