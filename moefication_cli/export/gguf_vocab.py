"""A tokenizer.json as the vocabulary of a GGUF file.

After `conversion/base.py` of llama.cpp; the scores of SentencePiece's BPE are the order of the merges, since transformers keeps
that alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moefication_cli.errors import ConfigError

# Regular expressions of byte-level tokenizers -> llama.cpp's name of what splits words there
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", None: "gpt-2"}


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add tokens, scores, types, merges and special tokens of `folder` to a gguf.GGUFWriter; `size` tokens in all.

    Raises ConfigError where llama.cpp has no tokenizer of that kind, naming the way round it.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refusal("it has no tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model, steps = tokenizer["model"], list(_steps(tokenizer))
    if model.get("type") != "BPE":
        raise _refusal(f"its tokenizer is of the kind {model.get('type')}")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and not model.get("byte_fallback"):
        raise _refusal("its tokenizer has neither bytes nor a fallback to bytes")
    tokens: dict[int, tuple[str, Any]] = {
        index: (text, gguf.TokenType.NORMAL) for text, index in model["vocab"].items()
    }
    if not byte_level:
        tokens |= {index: (text, gguf.TokenType.BYTE) for text, index in model["vocab"].items() if _is_byte(text)}
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if unknown := model.get("unk_token"):
        tokens[model["vocab"][unknown]] = (unknown, gguf.TokenType.UNKNOWN)
    if max(tokens) >= size:
        raise _refusal(f"its tokenizer has {max(tokens) + 1} tokens and the model {size}")
    whole = [tokens.get(index, (f"[PAD{index}]", gguf.TokenType.UNUSED)) for index in range(size)]
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(_split(steps) if byte_level else "default")
    writer.add_token_list([text for text, _ in whole])
    writer.add_token_types([int(kind) for _, kind in whole])
    if not byte_level:
        writer.add_token_scores(_scores(model, [text for text, _ in whole]))
        writer.add_add_space_prefix(_prefixes_a_space(steps))
    special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=size)
    special.add_special_token.setdefault("bos", False)  # where nothing is said llama.cpp goes by the kind of tokenizer
    special.add_to_gguf(writer, quiet=True)


def _refusal(why: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp's vocabulary cannot be written: {why}",
        "export --to mixtral or qwen2_moe, then try llama.cpp's own convert_hf_to_gguf.py on the folder",
    )


def _steps(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of normalizer and pre-tokenizer, one by one."""
    for name in ("normalizer", "pre_tokenizer"):
        part = tokenizer.get(name)
        if part is not None:
            yield from part.get("normalizers") or part.get("pretokenizers") or [part]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _split(steps: list[dict[str, Any]]) -> str:
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    others = {step["type"] for step in steps} - {"Split", "ByteLevel", "NFC"}
    pattern = patterns[0] if patterns else None
    if others or len(patterns) > 1 or pattern not in _SPLITS:
        raise _refusal("its tokenizer splits words in a way that llama.cpp has no known name for")
    return _SPLITS[pattern]


def _scores(model: dict[str, Any], texts: list[str]) -> list[float]:
    """What a merge makes is worth the more the earlier it is; what no merge makes is never compared."""
    order: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault(left + right, -float(rank))
    return [order.get(text, -float(len(model["merges"]))) for text in texts]


def _prefixes_a_space(steps: list[dict[str, Any]]) -> bool:
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
