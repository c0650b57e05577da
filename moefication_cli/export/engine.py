"""llama.cpp beside the converted model: is it here, and does it compute the same?"""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefication_cli.errors import MoEficationError
from moefication_cli.export import engine_child
from moefication_cli.models.loading import load

GET_ENGINE = (
    "pip install llama-cpp-python (it builds llama.cpp: a C++ compiler and about ten minutes), then export again"
)
# Quantisation -> largest mean difference of a token's log-probability, in nats, and of the logarithm of the perplexity. Rounding
# changes which experts are selected where two are nearly equal: single tokens differ by more than in a dense model, both ways
# (a Llama of 260k parameters at q8_0: 0.29 nats in the mean, perplexity 0.3 % lower)
_MOST = {"f32": (0.03, 0.02), "f16": (0.05, 0.02), "q8_0": (0.5, 0.05), "q4_k": (1.0, 0.3)}


@dataclass(frozen=True)
class EngineComparison:
    """Mean difference of the tokens' log-probabilities in nats; tokens whose likeliest successor differs; perplexities."""

    tokens: int
    log_prob_error: float
    likeliest_differing: float
    perplexity: float  # llama.cpp's
    perplexity_converted: float
    texts_differing: float  # share of texts that its tokenizer splits otherwise

    def faults(self, quantise: str) -> list[str]:
        """What is not as it should be, as sentences."""
        most_error, most_ratio = _MOST[quantise]
        found = []
        if not self.log_prob_error <= most_error:
            found.append(f"log-probabilities differ by {self.log_prob_error:.3f} nats in the mean")
        if not abs(math.log(self.perplexity / self.perplexity_converted)) <= most_ratio:
            found.append(
                f"its perplexity is {self.perplexity:.4g}, the converted model's {self.perplexity_converted:.4g}"
            )
        if self.texts_differing > 0:
            found.append(f"its tokenizer splits {self.texts_differing:.0%} of the texts otherwise")
        return found

    def row(self) -> dict[str, Any]:
        return asdict(self)


def has_engine() -> bool:
    """Whether the bindings of llama.cpp can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


@torch.inference_mode()
def compare_engine(
    converted: Path, file: Path, batches: Sequence[Tensor], texts: Sequence[tuple[str, list[int]]]
) -> EngineComparison:
    """Run llama.cpp on `file` and ours on the converted folder, on token ids [B, L] without padding.

    `texts` are strings and their tokens by the model's own tokenizer. Raises MoEficationError where llama.cpp cannot run it.
    """
    sequences = [ids_L for ids_BL in batches for ids_L in ids_BL]
    asked = {
        "file": str(file),
        "sequences": [ids_L.tolist() for ids_L in sequences],
        "texts": [text for text, _ in texts],
    }
    theirs = call_engine("log_probabilities", **asked)
    ours = load(converted, backend="reference", dtype="auto", device="cpu")
    mine, other, differing = [], [], 0
    for ids_L, found, likeliest in zip(sequences, theirs["log_probs"], theirs["likeliest"], strict=True):
        logits_LV = ours(input_ids=ids_L[None]).logits[0, :-1].float()
        mine += logits_LV.log_softmax(1).gather(1, ids_L[1:, None])[:, 0].tolist()
        other += found
        differing += int((logits_LV.argmax(1) != torch.tensor(likeliest)).sum())
    expected_T, found_T = torch.tensor(mine, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    split = [tokens != expected for tokens, (_, expected) in zip(theirs["tokens"], texts, strict=True)]
    return EngineComparison(
        len(mine),
        float((expected_T - found_T).abs().mean()),
        differing / len(mine),
        math.exp(-float(found_T.mean())),
        math.exp(-float(expected_T.mean())),
        sum(split) / max(1, len(split)),
    )


def call_engine(do: str, **fields: Any) -> dict[str, Any]:
    """What a function of `engine_child` returns, in a process of its own. Raises MoEficationError where that process ends."""
    done = subprocess.run(
        [sys.executable, "-P", str(engine_child.__file__)],
        input=json.dumps({"do": do, **fields}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in said if "rror" in line or "ssert" in line), said[-1] if said else "no message")
        raise MoEficationError(
            f"llama.cpp ended with {done.returncode} ({why.strip()})",
            "an older llama.cpp may not know what was written: " + GET_ENGINE,
        )
    return dict(json.loads(done.stdout))
