"""Run as a script in a process of its own, since llama.cpp ends the process on what it cannot run.

Reads one JSON object from stdin, writes one to stdout; needs nothing but the bindings, llama-cpp-python.
"""

import ctypes
import json
import os
import sys
from typing import Any


def log_probabilities(file: str, sequences: list[list[int]], texts: list[str]) -> dict[str, Any]:
    """Per sequence the log-probability of each next token and whether it was the likeliest; the tokens of each text."""
    import numpy as np
    from llama_cpp import Llama

    model = Llama(file, n_ctx=max(map(len, sequences)), n_batch=512, logits_all=True, type_k=0, type_v=0, verbose=False)
    found, likeliest = [], []
    for ids in sequences:
        model.reset()
        model.eval(ids)
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        found.append((chosen - np.log(np.exp(logits).sum(1))).tolist())
        likeliest.append(logits.argmax(1).tolist())
    tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    return {"log_probs": found, "likeliest": likeliest, "tokens": tokens}


def quantise(source: str, target: str) -> dict[str, Any]:
    """Q4_K_M, llama.cpp's usual mixture of four and six bits."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize gave {code}")
    return {}


def main() -> None:
    """What the object's `do` says, with its other fields; the engine's own output goes to stderr."""
    asked = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if asked.pop("do") == "quantise":
        done = quantise(**asked)
    else:
        done = log_probabilities(**asked)
    json.dump(done, answer)
    answer.close()


if __name__ == "__main__":
    main()
