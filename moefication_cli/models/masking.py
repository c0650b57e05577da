"""Which tokens are real? Known at the top of the model, needed inside its FFNs.

`TokenMask(model)` hooks the model (and the encoder of an encoder-decoder, which `generate` calls on its own) and
remembers the 2-D attention masks of the forward pass in progress; FFN layers ask `mask_for`. Axes: B sequences, T
tokens of this pass. Not understood, and taken as "all real": 4-D masks, masks of another length than the tokens (image
patches, audio frames, chunked feed-forward), and a decoder's own inputs without `decoder_attention_mask`.

A decoder that is given no inputs of its own reads the encoder's, shifted right by one (`BartForSequenceClassification`,
`T5ForSequenceClassification`): the encoder's mask then says which of its positions are read, and is taken for both.

Gradient checkpointing computes layers a second time in the backward pass, when the forward pass and its masks are gone.
So in training every module's `_gradient_checkpointing_func` (set by `gradient_checkpointing_enable`) is replaced for the
length of a pass by one that remembers the masks of that pass and sets them while a layer is computed again.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Stack = Literal["encoder", "decoder"]
_ARGUMENTS: dict[str, Stack] = {"attention_mask": "encoder", "decoder_attention_mask": "decoder"}
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
_CHECKPOINT = "_gradient_checkpointing_func"


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
        self._checkpointed: list[nn.Module] = []  # modules whose checkpoint function remembers masks, in this pass
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

    @property
    def hides(self) -> bool:
        """Whether any token of the pass in progress may be padding."""
        return bool(self._masks)

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it changes state that layers outside of graphs read
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
            # Models that generate make the decoder's inputs of the labels, where there are any
            own = (*_OF_DECODER, "labels") if self._cached else _OF_DECODER
            if self._encoder_decoder and "encoder" in masks and all(given.get(name) is None for name in own):
                masks.setdefault("decoder", masks["encoder"])
            if masks and module.training and torch.is_grad_enabled():
                self._follow_checkpoints(module)
        self._masks, self._found = masks, {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._saved:  # always_call also fires where an earlier pre-hook failed
            self._masks, self._found = self._saved.pop(), {}
        if not self._saved:
            for checkpointed in self._checkpointed:
                remembering = getattr(checkpointed, _CHECKPOINT)
                remembering.token_masks.remove(self)
                if not remembering.token_masks:
                    setattr(checkpointed, _CHECKPOINT, remembering.own)
            self._checkpointed.clear()

    def _follow_checkpoints(self, model: nn.Module) -> None:
        for module in model.modules():
            own = module.__dict__.get(_CHECKPOINT)
            if own is None or not getattr(module, "gradient_checkpointing", False):
                continue
            if not isinstance(own, _Remembering):  # it is one where two masks follow the same pass
                setattr(module, _CHECKPOINT, own := _Remembering(own))
            own.token_masks.append(self)
            self._checkpointed.append(module)

    def under_present_masks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, to be called at any later time as if in the pass that is in progress now."""
        return partial(self._under, self._masks, function)

    def _under(self, masks: dict[Stack, Tensor], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._masks, self._found
        if self._masks is not masks:
            self._masks, self._found = masks, {}
        try:
            return function(*args, **kwargs)
        finally:
            self._masks, self._found = before


class _Remembering:
    """A module's checkpoint function, which calls `function` in the forward pass and again in the backward pass."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.token_masks: list[TokenMask] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for token_mask in self.token_masks:
            function = token_mask.under_present_masks(function)
        return self.own(function, *args, **kwargs)
