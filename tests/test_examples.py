"""The examples in artifacts/examples, run on a tiny model as their users would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "artifacts" / "examples"
MOEFICATION = f"{sys.executable} -m moefication_cli"


def make(*variables: str) -> str:
    done = subprocess.run(
        ["make", "-f", str(EXAMPLES / "Makefile"), f"MOEFICATION={MOEFICATION} ", *variables],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_converges(bert: Path, data: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.tsv"
    test.write_text("".join(data.read_text().splitlines(keepends=True)[:20]))
    variables = [f"RUN={tmp_path / 'run'}", f"MODEL={bert}", f"DATA={data}", f"TEST={test}", "FRACTION=0.6"]
    assert make(*variables).count("-m moefication_cli") == 5
    assert "Nothing to be done" in make(*variables)
    # A file that only looks newer costs one look at it, and then make is content again
    os.utime(data)
    again = make(*variables)
    assert again.count("-m moefication_cli") == 5
    assert "Nothing to be done" in make(*variables)
    test.write_text(test.read_text() + "w1 w2\t1\n")
    assert make(*variables).count("-m moefication_cli") == 1


@pytest.mark.parametrize("tasks", [1, 3])
def test_array_tasks_share_the_layers(tasks: int, bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = [*MOEFICATION.split(), "split", str(run), "--model", str(bert), "--method", "random", "--layers", "0"]
    subprocess.run(first, capture_output=True, check=True)  # names the model
    for task in range(tasks):  # a stand-in for the scheduler
        environment = os.environ | {
            "RUN": str(run), "LAYERS": "2", "STAGE": "split --method random", "MOEFICATION": MOEFICATION,
            "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(tasks),
        }  # fmt: skip
        done = subprocess.run(
            [str(EXAMPLES / "slurm.sh")], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (run / "split" / "manifest.json").exists()
