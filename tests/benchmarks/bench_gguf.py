"""llama.cpp: an exported MoE against the dense model it could come from, prompt and generation, at the same quantisation.

    python tests/benchmarks/bench_gguf.py                            d 2048, F 8192, 4 layers, 32 experts top 8, q8_0: some minutes
    python tests/benchmarks/bench_gguf.py --cases 32x8,16x4 --quantise f16 --repeats 3 --json

Needs llama-cpp-python and the extra gguf. Weights are random, the same in both files, so a row says nothing about quality. Dense and
MoE take turns; figures are medians, quartiles those of the paired ratios. `bound` is the ratio of the bytes that one token reads,
which is that of the multiply-adds too: attention and head are not made cheaper.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from moefication_cli.export.formats import FORMATS, Layer, Shape
from moefication_cli.export.gguf_file import write_gguf
from moefication_cli.ffn import FFNWeights

VOCAB, HEAD = 4096, 64


def random_tokenizer(folder: Path) -> None:
    """A tokenizer of SentencePiece's kind with every byte and made-up words: what llama.cpp needs to load a model."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [f"word{number}" for number in range(VOCAB - len(tokens))]
    special = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": []}
    model["vocab"] = {token: index for index, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": special}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_random(
    folder: Path, width: int, neurons: int, layers: int, shape: Shape | None, name: str = "mixtral"
) -> None:
    """A checkpoint of random weights: a dense Llama, or the same weights as a MoE of the format `name`."""
    folder.mkdir()
    random_tokenizer(folder)
    config: dict[str, Any] = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD, "intermediate_size": neurons,
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "head_dim": HEAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    row = FORMATS[name]
    stored = config if shape is None else row.config_json(config, shape)
    (folder / "config.json").write_text(json.dumps(stored))
    generator = torch.Generator().manual_seed(0)

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * size[-1] ** -0.5

    index: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor]) -> None:
        file = f"part-{len(set(index.values()))}.safetensors"
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}{kind}_layernorm.weight": torch.ones(width) for kind in ("input", "post_attention")}
        tensors |= {f"{start}self_attn.{part}_proj.weight": matrix(width, width) for part in "qkvo"}
        if row.zero_biases and shape is not None:
            tensors |= {f"{start}self_attn.{part}_proj.bias": torch.zeros(width) for part in "qkv"}
        up, gate, down = (matrix(neurons, width) for _ in range(3))
        if shape is None:
            mlp = {"up_proj": up, "gate_proj": gate, "down_proj": down.T.contiguous()}
            tensors |= {f"{start}mlp.{key}.weight": tensor for key, tensor in mlp.items()}
        else:
            ffn = FFNWeights(up, down, gate, activation="silu")
            made = row.layer(Layer(ffn, matrix(shape.num_experts, width) * 2.0**-11, shape))
            tensors |= {start + key: tensor.contiguous() for key, tensor in made.items()}
        save(tensors)
    save({"model.embed_tokens.weight": matrix(VOCAB, width), "model.norm.weight": torch.ones(width)})
    save({"lm_head.weight": matrix(VOCAB, width)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def made(folder: Path, args: argparse.Namespace, shape: Shape | None) -> Path:
    """The file of one case; its checkpoint is deleted again."""
    import shutil

    file = folder / ("dense.gguf" if shape is None else f"{shape.num_experts}x{shape.top_k}.gguf")
    write_random(folder / "native", args.width, args.neurons, args.layers, shape)
    write_gguf(folder / "native", args.quantise, file, file.stem)
    shutil.rmtree(folder / "native")
    return file


def seconds(model: Any, prompt: list[int], args: argparse.Namespace) -> tuple[float, float]:
    """(of the prompt, of the generated tokens one by one)."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    model.reset()
    start = clock()
    model.eval(prompt)
    middle = clock()
    for token in prompt[: args.generate]:
        model.eval([token])
    return middle - start, clock() - middle


def bound(args: argparse.Namespace, shape: Shape) -> float:
    """How much faster it could be: weights that one token reads, dense over MoE."""
    other = args.layers * 4 * args.width**2 + VOCAB * args.width
    ffn = args.layers * 3 * args.width * args.neurons
    routers = args.layers * args.width * shape.num_experts
    return (other + ffn) / (other + routers + ffn * shape.top_k / shape.num_experts)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from llama_cpp import Llama

    def loaded(file: Path) -> Any:
        return Llama(
            str(file), n_ctx=2048, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
        )

    dense = loaded(made(folder, args, None))
    prompt = np.random.default_rng(0).integers(3, VOCAB, args.prompt).tolist()
    rows = []
    for case in args.cases.split(","):
        experts, top_k = map(int, case.split("x"))
        shape = Shape(experts, args.neurons // experts, 0, top_k)
        moe = loaded(made(folder, args, shape))
        both = []
        for _ in range(args.repeats + 1):  # the first warms up
            both.append((seconds(dense, prompt, args), seconds(moe, prompt, args)))
        times = np.array(both[1:])  # [repeats, dense or MoE, prompt or generation]
        ratios = times[:, 0] / times[:, 1]
        for part, tokens in ((0, args.prompt), (1, args.generate)):
            low, middle, high = np.percentile(ratios[:, part], [25, 50, 75])
            rows.append({
                "case": case, "expert_size": shape.expert_size, "quantise": args.quantise,
                "what": ("prompt", "generation")[part],
                "dense_tokens_per_second": round(tokens / float(np.median(times[:, 0, part])), 1),
                "moe_tokens_per_second": round(tokens / float(np.median(times[:, 1, part])), 1),
                "speedup": round(middle, 2), "low": round(low, 2), "high": round(high, 2),
                "bound": round(bound(args, shape), 2),
            })  # fmt: skip
        del moe
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="32x8", help="comma list of EXPERTSxTOP_K")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quantise", default="q8_0", choices=["f32", "f16", "q8_0"])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generate", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    clocks = ["wall", "cpu"]
    parser.add_argument(
        "--clock", default="wall", choices=clocks, help="cpu: other programs disturb less (--threads 1)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    if args.json:
        print(json.dumps({"machine": platform.platform(), "threads": args.threads, "rows": rows}))
        return
    print("  ".join(f"{name:>10}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>10}" for value in row.values()))


if __name__ == "__main__":
    main()
