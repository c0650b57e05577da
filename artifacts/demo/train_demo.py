"""Train the demo model that `moefication demo` converts: a small ReLU language model of Python source.

OPT architecture, byte-level BPE, about 3.4 M parameters, stored in float16 (under 8 MB). Trained on the source text
of the standard library of the Python that runs this script, without the modules the demo evaluates on
(`moefication_cli/tasks/stdlib.py` says which). The feed-forward layers are wide (8 x d) because they are
what the demo is about.

    python artifacts/demo/train_demo.py --steps 4000 --out artifacts/demo

Two CPU cores need about an hour. The result is not bit-reproducible across machines or Python versions.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from moefication_cli.tasks.stdlib import stdlib_documents

END, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the end token joins documents and starts every generation."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=PAD, model_max_length=256
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, an end token after each."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, verbose=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


@torch.inference_mode()
def perplexity(model: OPTForCausalLM, ids: torch.Tensor, length: int) -> float:
    """exp of the mean next-token loss over windows without overlap."""
    model.eval()
    windows = ids[: len(ids) // length * length].view(-1, length).long()
    losses = [model(input_ids=w, labels=w).loss.item() for w in windows.split(32) if len(w)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Train, report held-out perplexity, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_texts, heldout_texts = stdlib_documents("train"), stdlib_documents("heldout")
    tokenizer = train_tokenizer(train_texts, vocab_size=2048)
    train_ids, heldout_ids = encode(tokenizer, train_texts), encode(tokenizer, heldout_texts)
    config = OPTConfig(
        vocab_size=2048, hidden_size=192, ffn_dim=1536, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=256, word_embed_proj_dim=192, activation_function="relu", dropout=0.0,
        attention_dropout=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train_ids)} training tokens, {len(heldout_ids)} held out, {parameters} parameters", flush=True)

    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    warmup = 200

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    started = time.time()
    for step in range(args.steps):
        starts = torch.randint(len(train_ids) - args.length, (args.batch_size,))
        batch = torch.stack([train_ids[s : s + args.length] for s in starts]).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
        if step and step % 1000 == 0:
            save(model, tokenizer, args, perplexity(model, heldout_ids[:65536], args.length), step)
    save(model, tokenizer, args, perplexity(model, heldout_ids, args.length), args.steps)


def save(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, value: float, step: int
) -> None:
    """Write the float16 folder and what was measured, the way the demo reads it."""
    state = {name: tensor.detach().to(torch.float16) for name, tensor in model.state_dict().items()}
    copy = OPTForCausalLM(model.config).to(torch.float16)
    copy.load_state_dict(state)
    copy.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    result = {
        "heldout_perplexity": round(value, 3),
        "steps": step,
        "batch_size": args.batch_size,
        "length": args.length,
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"step {step}: held-out perplexity {value:.2f}", flush=True)


if __name__ == "__main__":
    main()
