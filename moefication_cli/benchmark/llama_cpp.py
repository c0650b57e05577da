"""A dense Llama in llama.cpp at Q8_0, as a peer of `bench`: written as a GGUF file, run through llama-cpp-python in this process.

llama.cpp gets as many threads as torch. Sequences of a batch run one after another, and a prompt gives the logits of every token,
as it does in transformers. Axes: B sequences, S tokens of each, V vocabulary.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefication_cli.errors import UnavailableError
from moefication_cli.export.engine import call_engine
from moefication_cli.export.gguf_file import write_gguf
from moefication_cli.store import jsonio
from moefication_cli.store.tensorfile import write_tensors

_MOST_TOKENS = 2048  # of a sequence


class Output(NamedTuple):
    """What the calls of `calls` read of a transformers model's output; the cache itself stays in llama.cpp."""

    logits: Tensor
    past_key_values: bool = True


class LlamaCpp:
    """llama.cpp behind the call of the transformers model that it was made of."""

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine, self.config = engine, config

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Output:
        """float32 logits [B, S, V]. With `past_key_values` it goes on where the last call ended, of one sequence."""
        if past_key_values is not None:
            if len(input_ids) > 1:
                raise UnavailableError("llama.cpp generates for one sequence here", "use --batch 1")
            return Output(self._logits(input_ids[0].tolist())[None])
        found = []
        for ids_S in input_ids.tolist():
            self._engine.reset()
            found.append(self._logits(ids_S))
        return Output(torch.stack(found))

    def _logits(self, ids_S: list[int]) -> Tensor:
        self._engine.eval(ids_S)
        end = self._engine.n_tokens
        return torch.tensor(self._engine.scores[end - len(ids_S) : end])  # a copy: the next sequence goes there too


def llama_cpp_twin(model: Any, inputs: Any) -> LlamaCpp:
    """The model in llama.cpp. Raises UnavailableError for another architecture, MoEficationError where llama.cpp cannot run it."""
    config = model.config
    if config.model_type != "llama":
        raise UnavailableError(f"llama.cpp is timed for Llama models, this is {config.model_type}", "leave it out")
    with tempfile.TemporaryDirectory(prefix="moefication-gguf-") as scratch:
        folder, file = Path(scratch), Path(scratch) / "model.gguf"
        _write_checkpoint(model, folder)
        write_gguf(folder, "q8_0", file, "peer", vocabulary=False)
        (folder / "model.safetensors").unlink()
        # What it cannot run ends the process: in one of its own first
        call_engine("log_probabilities", file=str(file), sequences=inputs["input_ids"].tolist(), texts=[])
        from llama_cpp import Llama

        threads, length = torch.get_num_threads(), min(_MOST_TOKENS, config.max_position_embeddings)
        engine = Llama(
            str(file),
            n_ctx=length,
            n_batch=length,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )
        return LlamaCpp(engine, config)


def _write_checkpoint(model: Any, folder: Path) -> None:
    """The files that `write_gguf` reads of a checkpoint."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    jsonio.write(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    jsonio.write(folder / "config.json", model.config.to_dict())
