"""The rows of `bench --experts`: one stock mixture of experts under several `experts_implementation`s, in turns.

`ffn` times the experts modules alone, layer after layer, with tokens routed evenly at random; `prefill` and `decode` the whole
model as in `rows`. All implementations share the model's weights. Axes: T tokens, K experts per token, D model width.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.benchmark.calls import Decoder, prefill_call, random_ids
from moefication_cli.benchmark.subjects import Setting
from moefication_cli.benchmark.timing import Call, Paired, alternate
from moefication_cli.errors import ConfigError
from moefication_cli.models.loading import load_model
from moefication_cli.models.stock_experts import EAGER, NAME, experts_modules, register_experts

OTHERS = (EAGER, "grouped_mm")
_MODES = ("ffn", "prefill", "decode")


def experts_rows(state: Setting, folder: str) -> Iterator[dict[str, Any]]:
    """`mode, tokens, batch, seq, seconds {implementation: median or None}, speedup {implementation: median, quartiles}, ...`.

    None stands for an implementation that fails on these shapes. Raises ConfigError where the model has no such experts.
    """
    register_experts()
    config = state.config
    options: dict[str, Any] = {"device": state.device, "dtype": config.dtype, "revision": config.revision}
    options["trust_remote_code"] = state.control.trust_remote_code
    model = load_model(folder, tokenizer=False, quiet=True, **options).model.requires_grad_(False)
    modules = experts_modules(model)
    if not modules:
        raise ConfigError(f"{folder} has no experts that transformers lets be exchanged", "moefication bench MODEL")
    seed = state.control.seed
    with torch.inference_mode():
        for mode in state.modes or _MODES:
            if mode == "ffn":
                for tokens in state.tokens:
                    yield _row(state, model, partial(_alone, modules, model, tokens, seed)) | _size(mode, tokens)
                continue
            for batch in state.batches:
                for seq in state.seqs if mode == "prefill" else [config.prompt_tokens]:
                    ids_BS = random_ids(model.config, batch, seq, seed, state.device)
                    make = partial(prefill_call, model, ids_BS)
                    if mode == "decode":
                        make = partial(_decode, model, ids_BS, config.new_tokens)
                    tokens = batch * seq if mode == "prefill" else batch
                    yield _row(state, model, make) | _size(mode, tokens, batch, seq)


def _size(mode: str, tokens: int, batch: int | None = None, seq: int | None = None) -> dict[str, Any]:
    return {"mode": mode, "tokens": tokens, "batch": batch, "seq": seq}


def _decode(model: Any, ids_BS: Tensor, new_tokens: int) -> Call:
    return Decoder(model, ids_BS, new_tokens).call()


def _alone(modules: list[nn.Module], model: Any, tokens: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    first: Any = modules[0]
    width, top_k = first.down_proj.shape[1], model.config.get_text_config().num_experts_per_tok
    x_TD = torch.randn(tokens, width, generator=generator).to(model.device, model.dtype)
    ids_TK = torch.rand(tokens, first.num_experts, generator=generator).topk(top_k).indices.to(model.device)
    weights_TK = torch.full_like(ids_TK, 1.0 / top_k, dtype=model.dtype)
    turns = count()
    return Call(lambda: modules[next(turns) % len(modules)](x_TD, ids_TK, weights_TK))


def _row(state: Setting, model: Any, make: Callable[[], Call]) -> dict[str, Any]:
    """Seconds of every implementation that can run, and how many times faster ours is, round by round."""
    calls, failed = {}, {}
    for name in (*OTHERS, NAME):
        call = _under(model, name, make())
        try:
            call.prepare()
            call.run()
        except RuntimeError as error:
            if name == NAME:
                raise
            failed[name] = str(error).splitlines()[0]
        else:
            calls[name] = call
    config = state.config
    taken = alternate(
        list(calls.values()), repeats=config.repeats, seconds=config.seconds, warmup=2, device=state.device, clock=config.clock
    )  # fmt: skip
    by_name = dict(zip(calls, taken, strict=True))
    seconds = {name: statistics.median(by_name[name]) if name in by_name else None for name in (*OTHERS, NAME)}
    speedup = {}
    for name in set(OTHERS) & set(by_name):
        paired = Paired(by_name[name], by_name[NAME]).summary()
        speedup[name] = {"median": paired["speedup"], "quartiles": paired["quartiles"]}
    return {
        "seconds": seconds, "failed": failed,
        "speedup": {name: speedup[name] for name in OTHERS if name in speedup}, "repeats": len(taken[0]),
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(state.device),
        "threads": torch.get_num_threads(), "clock": config.clock,
    }  # fmt: skip


def _under(model: Any, name: str, call: Call) -> Call:
    """`call` with that implementation chosen, untimed, before each run."""

    def prepare() -> None:
        model.set_experts_implementation(name)
        call.prepare()

    return Call(call.run, prepare)
