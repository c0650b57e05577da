"""The examples in artifacts/examples, run on a tiny model as their users would run them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks import free_port

EXAMPLES = Path(__file__).parents[1] / "artifacts" / "examples"
MOEFICATION = f"{sys.executable} -m moefication_cli"


def make(*variables: str) -> str:
    done = subprocess.run(
        ["make", "-f", str(EXAMPLES / "Makefile"), f"MOEFICATION={MOEFICATION} ", *variables],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def question(*variables: str) -> int:
    """What `make -q` answers: 0 where nothing is to be done, 1 where something is."""
    return subprocess.run(["make", "-q", "-f", str(EXAMPLES / "Makefile"), *variables], check=False).returncode


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
    assert question(*variables) == 0
    test.write_text(test.read_text() + "w1 w2\t1\n")
    assert question(*variables) == 1
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


# Says that it runs, then waits for the signal that ends it, at most a minute, and exits as the program does
WAITS = """#!/bin/sh
trap 'exit 75' USR1
touch "$STARTED"
i=0
while [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done
exit 1
"""


@pytest.mark.parametrize("early", [True, False])
def test_a_task_that_ends_early_is_queued_again(early: bool, tmp_path: Path) -> None:
    started, requeued, program = tmp_path / "started", tmp_path / "requeued", tmp_path / "program"
    program.write_text(WAITS if early else "#!/bin/sh\nexit 3\n")
    stand_in = tmp_path / "scontrol"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {requeued}\n')
    for path in (program, stand_in):
        path.chmod(0o755)
    environment = os.environ | {
        "RUN": "run", "LAYERS": "4", "MOEFICATION": str(program), "STARTED": str(started),
        "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_JOB_ID": "77",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    task = subprocess.Popen([str(EXAMPLES / "slurm.sh")], env=environment)
    if early:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        task.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@120` does: to the script alone
    assert task.wait(60) == (75 if early else 3)
    assert requeued.exists() is early
    if early:
        assert requeued.read_text() == "requeue 77_2\n"


def test_torchrun_shares_a_run(bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = os.environ | {
        "RUN": str(run), "MODEL": str(bert), "DATA": str(data), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "LAUNCH": f"{sys.executable} -m torch.distributed.run --master-addr 127.0.0.1 --master-port {free_port()}",
    }  # fmt: skip
    options = ["--expert-size", "4", "--router", "linear", "--epochs", "1", "--refine", "0", "--fraction", "0.6"]
    done = subprocess.run(
        [str(EXAMPLES / "torchrun.sh"), *options, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] and (run / "model" / "manifest.json").exists()
