"""The work that `bench` times: an FFN alone, a prompt, one generated token. Inputs are random ids without padding.

Every function returns calls for `timing.alternate`. Axes: B sequences, S tokens of each, T tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.benchmark.timing import Call
from moefication_cli.errors import ConfigError
from moefication_cli.tasks.encoding import position_limit


def ffn_call(modules: Sequence[nn.Module], inputs_TD: Sequence[Tensor], tokens: int, start: int) -> Call:
    """Each call runs the next layer on `tokens` of its inputs, from layer `start` on, weights cold by rotation."""
    repeated = [_rows(x_TD, tokens) for x_TD in inputs_TD]
    turns = count(start)

    def run() -> None:
        turn = next(turns) % len(modules)
        modules[turn](repeated[turn])

    return Call(run)


def rotation_call(
    modules: Sequence[nn.Module], inputs_TD: Sequence[Tensor], tokens: int, start: int, graph: bool
) -> Call:
    """Each call runs every layer once on a GPU, from layer `start` on, one launch after another or replayed as one CUDA graph.

    A graph leaves out the time that Python and the driver take between launches, as engines and compiled models do.
    The layers must have run before, and must not wait for the GPU.
    """
    once = ffn_call(modules, inputs_TD, tokens, start)

    def run() -> None:
        for _ in modules:
            once.run()

    if not graph:
        return Call(run)
    # What is captured must have run on another stream than the default one
    beside = torch.cuda.Stream(inputs_TD[0].device)
    beside.wait_stream(torch.cuda.current_stream(beside.device))
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream(beside.device).wait_stream(beside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return Call(captured.replay)


def _rows(x_TD: Tensor, tokens: int) -> Tensor:
    times = -(-tokens // len(x_TD))
    return x_TD.repeat(times, 1)[:tokens].contiguous()


def random_ids(config: Any, batch: int, seq: int, seed: int, device: torch.device) -> Tensor:
    """ids_BS drawn evenly from the vocabulary. Raises ConfigError for models without one and for too long inputs."""
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(f"a {config.model_type} model has no vocabulary to draw a prompt from", "use --mode ffn")
    limit = position_limit(config)
    if limit is not None and seq > limit:
        raise ConfigError(
            f"{seq} tokens: this model has {limit} positions", "lower --seq, --prompt-tokens, --new-tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (batch, seq), generator=generator).to(device)


def whole_forward(model: nn.Module, ids_BS: Tensor) -> Call:
    """One pass of the whole model, decoder too where there is one: what reaches every FFN."""
    inputs: dict[str, Tensor] = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids_BS
    return Call(lambda: model(**inputs))


def prefill_call(model: Any, ids_BS: Tensor) -> Call:
    """The prompt through the model; of an encoder-decoder, through its encoder."""
    runs = model.get_encoder() if model.config.is_encoder_decoder else model
    mask_BS = torch.ones_like(ids_BS)
    return Call(lambda: runs(input_ids=ids_BS, attention_mask=mask_BS))


@dataclass
class Decoder:
    """Greedy generation with a KV cache: every `step` is one token per sequence, the prompt runs in `prepare`.

    After `new_tokens` steps it starts again from the prompt, so that the cache stays short.
    """

    model: Any
    ids_BS: Tensor
    new_tokens: int
    done: int = -1

    def call(self) -> Call:
        """The step as a call to be timed."""
        return Call(self.step, self.prepare)

    def prepare(self) -> None:
        """Runs prompt (or encoder and first token) where a step needs it."""
        if 0 <= self.done < self.new_tokens:
            return
        self._mask_BS = torch.ones_like(self.ids_BS)
        if self.model.config.is_encoder_decoder:
            encoded = self.model.get_encoder()(input_ids=self.ids_BS, attention_mask=self._mask_BS)
            self._given = {"encoder_outputs": encoded, "attention_mask": self._mask_BS}
            start = self.model.config.decoder_start_token_id or 0
            self.next_B1 = self.ids_BS.new_full((len(self.ids_BS), 1), start)
            self._past = None
            self._forward({"decoder_input_ids": self.next_B1})
        else:
            self._given = {}
            self._past = None
            self._forward({"input_ids": self.ids_BS, "attention_mask": self._mask_BS})
        self.done = 0

    def step(self) -> None:
        """One token more for every sequence."""
        if self.model.config.is_encoder_decoder:
            self._forward({"decoder_input_ids": self.next_B1})
        else:
            self._mask_BS = torch.cat([self._mask_BS, self._mask_BS[:, :1]], dim=1)
            self._forward({"input_ids": self.next_B1, "attention_mask": self._mask_BS})
        self.done += 1

    def _forward(self, inputs: dict[str, Any]) -> None:
        out = self.model(**inputs, **self._given, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        self.next_B1 = out.logits[:, -1:].argmax(-1)
