"""What was exported against what was converted: both run on the same text, in transformers' own code and in ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.models.folder.moe_folder import MoEFolder
from moefication_cli.models.loading import load, load_model
from moefication_cli.routing.rules import as_mask


@dataclass(frozen=True)
class Comparison:
    """relative_error of the logits (Frobenius norms); share of token-layers whose experts differ; both perplexities."""

    tokens: int
    relative_error: float
    selections_differing: float
    perplexity: float  # of what was exported
    perplexity_converted: float

    def faults(self, half: bool) -> list[str]:
        """What is not as it should be, as sentences. Half precision ties more experts, and rounds more."""
        most_error, most_differing, most_ratio = (0.3, 0.15, 0.1) if half else (0.1, 0.02, 0.05)
        ratio = self.perplexity / self.perplexity_converted
        found = []
        if not self.relative_error <= most_error:
            found.append(f"its logits differ by {self.relative_error:.1%} from the converted model's")
        if not self.selections_differing <= most_differing:
            found.append(f"{self.selections_differing:.1%} of the tokens run other experts")
        if not abs(ratio - 1) <= most_ratio:
            found.append(f"its perplexity is {ratio:.3f} times the converted model's")
        return found

    def row(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def compare(converted: Path, exported: Path, moe: MoEFolder, batches: Sequence[Tensor]) -> Comparison:
    """Run both on token ids [B, L] without padding. Selections are compared layer by layer on the same inputs."""
    ours = load(converted, backend="reference", dtype="auto", device="cpu")
    theirs = load_model(exported, task="lm", dtype="auto", device="cpu", quiet=True).model
    difference = total = mine = other = 0.0
    tokens = differing = routed = 0
    with _routing(theirs) as calls:
        for ids_BL in batches:
            expected, found = ours(input_ids=ids_BL).logits.float(), theirs(input_ids=ids_BL).logits.float()
            difference += float((found - expected).square().sum())
            total += float(expected.square().sum())
            labels = ids_BL[:, 1:].flatten()
            tokens += len(labels)
            other += float(torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels, reduction="sum"))
            mine += float(torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels, reduction="sum"))
            for layer, (x_TD, ids_TK) in zip(moe.layers, calls, strict=True):
                assert layer.router is not None and layer.rule is not None
                selected_TE = as_mask(layer.rule.select(layer.router.scores(x_TD.float())), layer.num_experts)
                differing += int((as_mask(ids_TK, layer.num_experts) != selected_TE).any(1).sum())
                routed += len(x_TD)
            calls.clear()
    means = [float(torch.tensor(loss / tokens).exp()) for loss in (other, mine)]
    return Comparison(tokens, (difference / total) ** 0.5, differing / max(1, routed), *means)


@contextmanager
def _routing(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(inputs [T, D], selected experts [T, K]) of every router of a stock MoE, in the order of their calls."""
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        calls.append((inputs[0].reshape(-1, inputs[0].shape[-1]), outputs[2]))

    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
