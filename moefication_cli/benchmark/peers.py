"""`bench --peers`: the stock model as a user would speed it up without converting it, timed in the same turns as dense and MoE.

A new peer is a row of `PEERS` and its name in `config.tools.PeerName`. Each keeps weights of its own where its dtype is another, and
is compared with the dense model before it is timed. One that is not installed or cannot run a model stays as a row that says so.
Axes as in `calls`.
"""

import copy
import importlib.util
import io
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moefication_cli.benchmark.calls import ffn_call
from moefication_cli.benchmark.int8 import dynamic_twin
from moefication_cli.benchmark.llama_cpp import llama_cpp_twin
from moefication_cli.benchmark.shapes import share
from moefication_cli.benchmark.timing import Call, Paired
from moefication_cli.errors import UnavailableError, first_line

_PROBE = 64  # tokens that a peer is compared with dense on


@dataclass(frozen=True)
class Peer:
    """`make(module, inputs)` of a copy of the dense module in `dtype` (None: dense's own), which takes `inputs` by name or position.

    `rounding`: relative error of the output that its arithmetic explains.
    """

    make: Callable[[Any, Any], Any]
    dtype: torch.dtype | None = torch.float32
    rounding: float = 1e-4
    modes: tuple[str, ...] = ("ffn", "prefill", "decode")
    needs: tuple[str, ...] = ()
    install: str = ""


@dataclass
class Beside:
    """A peer made of one model, or of the FFNs of a rotation: `runs` it, or `why` there is nothing to run."""

    name: str
    runs: Any = None
    why: str | None = None
    error: float | None = None  # relative, of the output on a few tokens

    def can(self, mode: str) -> bool:
        """Whether it is to be timed in this mode."""
        return self.runs is not None and mode in PEERS[self.name].modes


def _same(module: Any, inputs: Any) -> Any:
    return module


def _compiled(module: Any, inputs: Any) -> Any:
    """`torch.compile` with its defaults; of an encoder-decoder the encoder as well, which `prefill` calls alone."""
    module.compile()
    if _has_encoder(module):
        module.get_encoder().compile()
    return module


def _dynamic(module: Any, inputs: Any) -> Any:
    twin = dynamic_twin(module)
    if twin is None:
        raise UnavailableError("this torch has no dynamic quantisation any more", "use --peers without dynamic-int8")
    return twin


class _First(nn.Module):
    """The first output of a model, which is what an engine's graph gives."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if hasattr(model, "can_generate") and model.can_generate() else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]
        return y


class _OpenVINO:
    """A compiled OpenVINO graph behind the call of the module it was made of."""

    def __init__(self, graph: Any, config: Any) -> None:
        self.graph, self.config = graph, config

    def get_encoder(self) -> "_OpenVINO":
        return self

    def __call__(self, *args: Tensor, **inputs: Tensor) -> tuple[Tensor]:
        given: Any = {name: x.numpy() for name, x in inputs.items()} or [x.numpy() for x in args]
        return (torch.from_numpy(self.graph(given, share_outputs=True)[0]),)


@contextmanager
def _quiet() -> Iterator[None]:
    """OpenVINO and NNCF without progress bars on stdout and without reports of usage, which they leave out under CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def _openvino(module: Any, inputs: Any) -> Any:
    """int8 weights by NNCF, symmetric per row; activations and precision as OpenVINO chooses them for this CPU."""
    with _quiet():
        import nncf
        import openvino

        config = getattr(module, "config", None)
        if config is not None:
            module = _First(module.get_encoder() if _has_encoder(module) else module)
        with torch.no_grad():
            graph = openvino.convert_model(module, example_input=inputs)
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        return _OpenVINO(openvino.compile_model(graph, "CPU", settings), config)


PEERS: dict[str, Peer] = {
    "float32": Peer(_same),
    "bfloat16": Peer(_same, torch.bfloat16, rounding=0.05),
    "compile": Peer(_compiled, None, rounding=0.01),
    "dynamic-int8": Peer(_dynamic, rounding=0.1),
    "llama.cpp": Peer(
        llama_cpp_twin,
        None,
        rounding=0.1,
        modes=("prefill", "decode"),
        needs=("llama_cpp", "gguf"),
        install="pip install llama-cpp-python 'moefication[gguf]'",
    ),
    "openvino-int8": Peer(
        _openvino,
        rounding=0.1,
        modes=("ffn", "prefill"),  # the key-value cache would need optimum-intel, which keeps transformers below 5.6
        needs=("openvino", "nncf"),
        install="pip install 'moefication[openvino]'",
    ),
}


def peer_models(names: Sequence[str], model: Any, ids_BS: Tensor) -> list[Beside]:
    """The peers of a whole model, compared with it on the prompt `ids_BS` (of an encoder-decoder, on its encoder)."""
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}

    def made(peer: Peer) -> tuple[Any, Tensor]:
        other = peer.make(_copied(model, peer), inputs)
        return other, _whole(other)(**inputs)[0]

    return _all_of(names, ("prefill", "decode"), made, lambda: _whole(model)(**inputs)[0])


def peer_ffns(names: Sequence[str], ffns: Sequence[nn.Module], inputs_TD: Sequence[Tensor]) -> list[Beside]:
    """The peers of the FFNs of a rotation, the first compared with its original."""
    x_TD = inputs_TD[0][:_PROBE]

    def made(peer: Peer) -> tuple[Any, Tensor]:
        given = x_TD if peer.dtype is None else x_TD.to(peer.dtype)
        others = [peer.make(_copied(ffn, peer), given) for ffn in ffns]
        return others, _tensor(others[0](given))

    return _all_of(names, ("ffn",), made, lambda: ffns[0](x_TD))


def peer_ffn_call(beside: Beside, inputs_TD: Sequence[Tensor], tokens: int) -> Call:
    """As `calls.ffn_call`, with inputs in the peer's dtype."""
    dtype = PEERS[beside.name].dtype
    return ffn_call(beside.runs, [x_TD if dtype is None else x_TD.to(dtype) for x_TD in inputs_TD], tokens, 0)


@torch.inference_mode()
def _all_of(
    names: Sequence[str], modes: Sequence[str], made: Callable[[Peer], Any], exact: Callable[[], Tensor]
) -> list[Beside]:
    """One of each name; nothing is made of a peer that runs in none of the `modes`."""
    y, found = exact().float(), []
    for name in names:
        peer = PEERS[name]
        if not set(modes) & set(peer.modes):
            found.append(Beside(name))
            continue
        missing = [package for package in peer.needs if importlib.util.find_spec(package) is None]
        if missing:
            found.append(Beside(name, why=f"not installed: {peer.install}"))
            continue
        try:
            runs, other = made(peer)
            found.append(Beside(name, runs, error=float((other.float() - y).norm() / y.norm())))
        except Exception as error:  # what compilers and engines raise has no common class
            found.append(Beside(name, why=f"cannot run this model: {first_line(error)}"))
    return found


def checked(beside: Beside, call: Call) -> Call | None:
    """The call, if it runs; else the reason goes to the row."""
    try:
        call.prepare()
        call.run()
    except Exception as error:  # as above
        beside.why = f"cannot run this model: {first_line(error)}"
        beside.runs = None
        return None
    return call


def peer_row(beside: Beside, mode: str, taken: Sequence[float] | None, moe: Sequence[float]) -> dict[str, Any]:
    """An entry of a row's `peers`; `speedup` is that of the MoE over the peer, of paired rounds. Nothing was timed where `said` is why."""
    row: dict[str, Any] = {"peer": beside.name, "error": beside.error, "said": None}
    if taken is None:
        said = beside.why or f"not timed in mode {mode}"
        return row | {"said": said, "seconds": None, "speedup": None, "min": None, "max": None, "within_rounding": None}
    ratios = Paired(taken, moe).ratios
    return row | {
        "seconds": statistics.median(taken),
        "speedup": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "within_rounding": beside.error is not None and beside.error <= PEERS[beside.name].rounding,
    }


def _copied(module: Any, peer: Peer) -> Any:
    if peer.dtype is None or all(p.dtype == peer.dtype for p in module.parameters()):
        return share(module)
    # Tensor by tensor: there is never a second copy in the module's own dtype
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(peer.dtype), False) for p in module.parameters()}
    tensors |= {id(b): b.to(peer.dtype) if b.is_floating_point() else b.clone() for b in module.buffers()}
    return copy.deepcopy(module, tensors)


def _has_encoder(module: Any) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _whole(model: Any) -> Any:
    return model.get_encoder() if _has_encoder(model) else model


def _tensor(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]
