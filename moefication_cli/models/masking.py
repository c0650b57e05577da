"""Which tokens are real? Known at the top of the model, needed inside its FFNs.

`TokenMask(model)` hooks the model (and the encoder of an encoder-decoder, which `generate` calls on its own) and
remembers the 2-D attention masks of the forward pass in progress; FFN layers ask `mask_for`. Axes: B sequences, T
tokens of this pass. Not understood, and taken as "all real": 4-D masks, masks of another length than the tokens (image
patches, audio frames, chunked feed-forward), and a decoder's own inputs without `decoder_attention_mask`.

A decoder that is given no inputs of its own reads the encoder's, shifted right by one (`BartForSequenceClassification`,
`T5ForSequenceClassification`): the encoder's mask then says which of its positions are read, and is taken for both.
"""

import inspect
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Stack = Literal["encoder", "decoder"]
_ARGUMENTS: dict[str, Stack] = {"attention_mask": "encoder", "decoder_attention_mask": "decoder"}
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")  # labels become the decoder's inputs


class TokenMask:
    """The masks of the forward pass in progress; nothing outside one. `remove()` takes the hooks off.

    A deep copy of a model keeps hooks that write to the copy of this object, which its copied layers then read.
    """

    def __init__(self, model: nn.Module) -> None:
        pretrained: Any = model if isinstance(model, transformers.PreTrainedModel) else None
        config = getattr(model, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        # With a KV cache the mask covers past and present tokens; only models that generate have one
        self._cached = pretrained is not None and bool(pretrained.can_generate())
        self._masks: dict[Stack, Tensor] = {}
        self._saved: list[dict[Stack, Tensor]] = []
        self._found: dict[tuple[Stack, tuple[int, ...]], Tensor | None] = {}  # answers of this pass: layers ask alike
        self._handles: list[RemovableHandle] = []
        encoder = pretrained.get_encoder() if pretrained is not None and self._encoder_decoder else None
        for module in [model] + ([encoder] if isinstance(encoder, nn.Module) and encoder is not model else []):
            names = tuple(inspect.signature(module.forward).parameters)
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, names), with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def mask_for(self, stack: Stack, shape: tuple[int, ...] | torch.Size) -> Tensor | None:
        """Real tokens as bool [B*T] for activations of leading shape (B, T) or (B*T,); None if all are real.

        A mask longer than the tokens (KV cache) counts with its last T columns.
        """
        if not self._masks:
            return None
        asked = (stack, tuple(shape))
        if asked not in self._found:
            self._found[asked] = self._find(*asked)
        return self._found[asked]

    def _find(self, stack: Stack, shape: tuple[int, ...]) -> Tensor | None:
        mask = self._masks.get(stack)
        if mask is None:
            return None
        rows, columns = mask.shape
        if len(shape) == 1:
            if shape[0] % rows:
                return None
            shape = (rows, shape[0] // rows)
        num_tokens = shape[-1]
        cached = self._cached and (stack == "decoder" or not self._encoder_decoder)
        if len(shape) != 2 or shape[0] != rows or num_tokens > columns or (num_tokens < columns and not cached):
            return None
        real = mask[:, columns - num_tokens :].reshape(-1)
        return None if real.is_cpu and bool(real.all()) else real

    def _enter(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._saved.append(self._masks)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        masks: dict[Stack, Tensor] = {} if len(self._saved) == 1 else dict(self._masks)
        for name, stack in _ARGUMENTS.items():
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                masks[stack] = mask.bool()
                if mask.is_cpu and bool(masks[stack].all()):  # a GPU would have to be waited for
                    del masks[stack]
        if len(self._saved) == 1:
            if self._encoder_decoder and "encoder" in masks and all(given.get(name) is None for name in _OF_DECODER):
                masks.setdefault("decoder", masks["encoder"])
        self._masks, self._found = masks, {}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._saved:  # always_call also fires where an earlier pre-hook failed
            self._masks, self._found = self._saved.pop(), {}
