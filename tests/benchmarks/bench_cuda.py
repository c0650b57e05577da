"""Everything a GPU is needed for, in one command of under eight minutes: `make cuda`, or

    python tests/benchmarks/bench_cuda.py --out cuda.json

Runs the tests marked `cuda`, the six stages on a trained model with --device cuda beside the CPU's figures, and `bench` on
four shapes in bfloat16. Writes one file of figures, anew after each part. What it gave on a GPU: cuda.md.
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

    def part(*words: object, seconds: float) -> None:
        found["parts"].append(call(*words, seconds=seconds))
        options.out.write_text(json.dumps(found, indent=2))

    part("pytest", "-q", "-m", "cuda", "tests", seconds=120)
    data = options.shared / "data" / "sst2"
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cuda", "cpu"):
            part("moefication_cli", "run", f"{folder}/{device}", "--model", options.shared / "models" / "bert-relu-minilm-sst2",
                 "--data", data / "train.tsv", "--max-tokens", 16000, "--refine", 20, "--eval-data", data / "dev.tsv",
                 "--eval-limit", 300, "--expert-size", 32, "--device", device, "--json", seconds=150)  # fmt: skip
        bench = "moefication_cli bench --mode ffn --dtype bfloat16 --backend triton --device cuda --seconds 1 --json".split()
        for shape in SHAPES:
            part(*bench, "--shape", shape, "--tokens", "1,4,16", "--expert-size", 32, seconds=60)
        part(*bench, "--shape", "llama-7b-layer", "--tokens", "2048,4096", "--expert-size", 128, seconds=60)
    print(f"figures: {options.out}")
    sys.exit(any(done["exit_code"] for done in found["parts"]))


if __name__ == "__main__":
    main()
