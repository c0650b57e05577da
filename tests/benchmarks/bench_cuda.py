"""Everything a GPU is needed for, in one command of under eight minutes: `make cuda`, or

    python tests/benchmarks/bench_cuda.py --out cuda.json

Runs the tests marked `cuda`, the six stages on a trained model with --device cuda beside the CPU's figures, and `bench` on
four shapes in bfloat16. Writes one file of figures. Its parts have run on a GPU (cuda.md), the file as a whole has not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = ("t5-base", "bert-large", "opt-1.3b", "llama-7b-layer")
ROOT = Path(__file__).parents[2]


def call(*words: object, seconds: float) -> dict[str, Any]:
    """One command: its exit code, seconds, and the JSON object it printed or the end of what it said."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = 124, "", f"took more than {seconds:.0f} s"
    found: dict[str, Any] = {
        "command": " ".join(map(str, words)),
        "exit_code": code,
        "seconds": time.perf_counter() - started,
    }
    try:
        found["result"] = json.loads(out)
    except ValueError:
        found["output"] = (out + err)[-3000:]
    print(f"{found['seconds']:7.1f} s  exit {code}  {found['command'][:110]}", flush=True)
    return found


def main() -> None:
    """Run everything, write the file, exit 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"))
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA GPU here: nothing was run")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "parts": []}
    parts = found["parts"]
    parts.append(call("pytest", "-q", "-m", "cuda", "tests", seconds=120))
    data = options.shared / "data" / "sst2"
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cuda", "cpu"):
            parts.append(
                call("moefication_cli", "run", f"{folder}/{device}", "--model", options.shared / "models" / "bert-relu-minilm-sst2",
                     "--data", data / "train.tsv", "--max-tokens", 16000, "--refine", 20, "--eval-data", data / "dev.tsv",
                     "--eval-limit", 300, "--expert-size", 32, "--device", device, "--json", seconds=150)
            )  # fmt: skip
        for shape in SHAPES:
            parts.append(
                call("moefication_cli", "bench", "--shape", shape, "--mode", "ffn", "--tokens", "1,4,16", "--dtype", "bfloat16",
                     "--expert-size", 32, "--backend", "triton", "--device", "cuda", "--seconds", 1, "--json", seconds=60)
            )  # fmt: skip
    options.out.write_text(json.dumps(found, indent=2))
    print(f"figures: {options.out}")
    sys.exit(any(part["exit_code"] for part in parts))


if __name__ == "__main__":
    main()
