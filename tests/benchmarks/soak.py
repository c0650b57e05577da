"""Kills, damage and bad command lines at full size, on tiny models; the quick part of each is in the suite.

    python tests/benchmarks/soak.py [--minutes N] [--seed N] [--flips N] [--only PART ...]

kills      SIGKILL at a random moment of a random command, fine-tuning, export and report included: the same command run
           again completes, leaves nothing over and writes the same bytes; until 100 died of it, or the minutes are over
full       every command on a disk without room, and on one that fills up while it works: exit 1, nothing lost, completes later
unwritable every command on a read-only disk and without permission: exit 1, nothing changed
users      two processes start every command at the same time: one works, the other waits or exits 5; one result
damage     flipped bits in each file of a run, of its model folder and of an export, and 20 truncations: `verify` finds each
mistakes   1,000 generated bad command lines and configuration files: no traceback, documented exit codes, JSON parses
status     of a run with 96 layers, warm: under a second

Prints one line each; exit code 1 if anything was missed.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import soak_faults  # noqa: E402
import transformers  # noqa: E402
from cli_runner import Outcome  # noqa: E402
from test_config import check_mistakes  # noqa: E402
from test_interruption import contents  # noqa: E402
from tiny_models import VOCAB, D, save_tiny, tiny_tokenizer  # noqa: E402

from moefication_cli.cli.app import exit_code  # noqa: E402
from moefication_cli.cli.console import Console  # noqa: E402

PARTS = ("mistakes", "status", "kills", "full", "unwritable", "users", "damage")
KILLS, TRUNCATIONS, MISTAKES, LAYERS = 100, 20, 1000, 96
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def here(*words: object) -> Outcome:
    """A command in this process."""
    out, err = StringIO(), StringIO()
    line = [str(word) for word in words]
    with redirect_stdout(out), redirect_stderr(err):
        code = exit_code(Console(json_mode="--json" in line), line)
    return Outcome(code, out.getvalue(), err.getvalue())


def start(words: list[object], before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """The same in a process of its own, started through the command `before`."""
    command = [*before, sys.executable, "-m", "moefication_cli", *map(str, words)]
    kinds = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, **kinds)


def write_lines(path: Path, seed: int, count: int) -> Path:
    rng = random.Random(seed)
    path.write_text("".join(" ".join(f"w{rng.randrange(40)}" for _ in range(12)) + "\n" for _ in range(count)))
    return path


def commands(folder: Path) -> list[tuple[list[object], str]]:
    """(command, what it writes, seen from `folder`) in order, of a tiny Llama."""
    run, lines = folder / "run", ["--documents", "line"]
    return [
        (["collect-activations", run, "--model", folder / "model", "--data", folder / "train.txt", *lines,
          "--max-length", 16], "run/activations"),
        (["build-graph", run], "run/graph"),
        (["split", run, "--num-experts", 6], "run/split"),
        (["train-router", run, "--router", "native"], "run/router/native"),
        (["train-router", run, "--router", "mlp", "--epochs", 2], "run/router/mlp"),
        (["apply", run, "--router", "native", "--for", "mixtral", "--fraction", 0.6], "run/model"),
        (["export", run, "--to", "mixtral", "--out", folder / "out"], "out"),
        (["train-router", run, "--router", "regression", "--epochs", 2], "run/router/regression"),
        (["apply", run, "--router", "regression", "--fraction", 0.6, "--refine", 20], "run/model"),
        (["finetune", run, "--steps", 12, "--tokens", 64, "--save-steps", 3, "--train", "all"], "run/finetuned/default"),
        (["eval", run, "--data", folder / "test.txt", *lines, "--selection", "regression,neuron"], "run/eval/default"),
        (["report", run], "run/report"),
    ]  # fmt: skip


def deterministic(path: Path) -> dict[str, bytes]:
    """What must come out the same: evaluations and reports have times in them, and so have cards of exported models."""
    apart = ("report", "quality.png", "README.md")
    return {name: data for name, data in contents(path).items() if not name.startswith(apart)}


def outputs(path: Path) -> tuple[set[str], dict[str, bytes]]:
    """The names of all files, and the contents of those that must come out the same."""
    return set(contents(path)), deterministic(path)


def leftovers(folder: Path) -> list[str]:
    names = [path.name for path in folder.rglob("*") if not {".cache", ".locks"} & set(path.parts)]
    return [name for name in names if name.endswith((".tmp", ".partial", ".old")) or name == ".work"]


def prepare(folder: Path) -> None:
    """Runs every command N undisturbed: `before-N`, `after-N` and `seconds-N` beside the folder."""
    save_tiny("llama", folder / "model")
    write_lines(folder / "train.txt", 3, 300)
    write_lines(folder / "test.txt", 4, 40)
    for number, (words, _) in enumerate(commands(folder)):
        shutil.copytree(folder, folder.with_name(f"before-{number}"))
        started = time.monotonic()
        process = start(words)
        _, err = process.communicate()
        assert process.returncode == 0, (words, err)
        folder.with_name(f"seconds-{number}").write_text(str(time.monotonic() - started))
        shutil.copytree(folder, folder.with_name(f"after-{number}"))


def kills(folder: Path, rng: random.Random, until: float) -> str:
    """Raises AssertionError naming the command and the moment."""
    line = commands(folder)
    seconds = [float(folder.with_name(f"seconds-{number}").read_text()) for number in range(len(line))]
    done = killed = 0
    while killed < KILLS and (time.monotonic() < until or done == 0):
        number = rng.randrange(len(line))
        words, writes = line[number]
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name(f"before-{number}"), folder)
        # Half of them in the last fifth, where things are written: the first seconds are imports
        moment = seconds[number] * (rng.random() if rng.random() < 0.5 else rng.uniform(0.8, 1.0))
        process = start(words)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        again = start(words)
        _, err = again.communicate()
        case = (f"{words[0]} killed after {moment:.2f} of {seconds[number]:.2f} s", err)
        assert again.returncode == 0, case
        assert not leftovers(folder), (case, leftovers(folder))
        assert outputs(folder / writes) == outputs(folder.with_name(f"after-{number}") / writes), case
        done += 1
    return f"{done} commands, {killed} killed before their end; all completed, nothing left over, the same bytes"


def damage(folder: Path, rng: random.Random, flips: int) -> str:
    """On a run with all commands done, and on what was exported. Raises AssertionError naming the files and the bits."""
    whole = folder.with_name(f"after-{len(commands(folder)) - 1}")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    run, out = folder / "run", folder / "out"

    def finds(path: Path) -> bool:
        asked = [out] if path.is_relative_to(out) else [run]
        if path.is_relative_to(run / "model") and path.name != "manifest.json":
            asked.append(run / "model")
        return all(here("verify", target).code == 4 for target in asked)

    assert all(here("verify", target).code == 0 for target in (run, run / "model", out))
    apart = {".cache", ".locks"}
    files = [p for top in (run, out) for p in sorted(top.rglob("*")) if p.is_file() and not apart & set(p.parts)]
    files.remove(out / "README.md")  # people write in it before they publish; its record leaves it out
    passed_over = []
    for path in files:
        before = path.read_bytes()
        for _ in range(flips if before else 0):
            at, bit = rng.randrange(len(before)), 1 << rng.randrange(8)
            path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
            if not finds(path):
                passed_over.append(f"{path.relative_to(folder)}: byte {at}, {before[at]:#x} ^ {bit:#x}")
        path.write_bytes(before)
    for path in rng.choices([path for path in files if path.stat().st_size > 1], k=TRUNCATIONS):
        before = path.read_bytes()
        os.truncate(path, length := rng.randrange(len(before)))
        if not finds(path):
            passed_over.append(f"{path.relative_to(folder)}: {length} of {len(before)} bytes")
        path.write_bytes(before)
    assert not passed_over, passed_over
    assert all(here("verify", target).code == 0 for target in (run, run / "model", out))
    return f"{len(files)} files with {flips} flipped bits each and {TRUNCATIONS} truncations, all found by verify"


def status(folder: Path) -> str:
    """Raises AssertionError where it takes a second or more."""
    model, run = folder / "deep", folder / "deep-run"
    shape = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = transformers.OPTConfig(**shape, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=D)
    transformers.OPTForCausalLM(config).save_pretrained(model)
    tiny_tokenizer(model)
    data = write_lines(folder / "deep.txt", 5, 60)
    options = ["--documents", "line", "--max-length", 16]
    for words in (
        ["collect-activations", run, "--model", model, "--data", data, *options],
        ["split", run, "--method", "random", "--num-experts", 6],
        ["train-router", run, "--router", "similarity"],
        ["apply", run, "--fraction", 0.5, "--fraction-of", "neurons"],
    ):
        outcome = here(*words)
        assert outcome.code == 0, outcome.err
    took, worked = [], []
    for _ in range(5):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = start(["status", run, "--json"])
        _, err = process.communicate()
        assert process.returncode == 0, err
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(time.monotonic() - started)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    said = f"{min(worked):.2f} s of a CPU, {min(took):.2f} s on the clock, for {LAYERS} layers, warm, imports included"
    assert min(worked) < 1.0, said  # the clock also counts what other programs do
    return said


def mistakes(folder: Path, seed: int) -> str:
    """Raises AssertionError naming the command line."""
    with chdir(folder):
        check_mistakes(here, folder, seed, MISTAKES)
    return f"{MISTAKES} command lines and files: no traceback, documented codes, JSON parses"


def main() -> int:
    """Run all parts; what one misses does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="for the kills; the rest takes a few")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=3, help="bits in each file, one at a time")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    asked = parser.parse_args()
    rng, missed = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # for the user without permission
        folder = Path(name) / "work"
        folder.mkdir()
        parts = {
            "mistakes": lambda: mistakes(Path(name), asked.seed),
            "status": lambda: status(Path(name)),
            "kills": lambda: kills(folder, rng, time.monotonic() + 60 * asked.minutes),
            "full": lambda: soak_faults.full(folder, commands(folder), start, outputs, rng),
            "unwritable": lambda: soak_faults.unwritable(folder, commands(folder), start),
            "users": lambda: soak_faults.users(folder, commands(folder), start, outputs),
            "damage": lambda: damage(folder, rng, asked.flips),
        }
        if set(asked.only) - {"mistakes", "status"}:
            prepare(folder)
        for part in asked.only:
            started = time.monotonic()
            try:
                said = parts[part]()
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                said, missed = f"MISSED: {error}", missed + 1
            print(f"{part:10} {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
