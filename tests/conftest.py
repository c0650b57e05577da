"""What every test may use. Real models and data lie beside the checkout; tests that need them skip without."""

import os
import random
from pathlib import Path

import pytest
from cli_runner import Runner
from tiny_models import save_tiny

SENTENCES = ["sentence\tlabel", *(f"w{i % 30} w{(i * 7) % 30} w{(i * 3) % 30} w5\t{i % 2}" for i in range(60))]


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m cuda` the suite is about the CPU, also on a machine with a GPU: the same paths on every machine."""
    if "cuda" not in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def no_known_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on this machine changes which kernels `auto` takes: each test begins without, and keeps its own."""
    monkeypatch.setattr("moefication_cli.runtime.kernel_times.cache_folder", lambda folder: tmp_path / "kernel-times")


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real models and data; the test is skipped, with this reason, where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the real models and data in {folder}, which is not there")
    return folder


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs a command and returns its exit code, stdout and stderr."""
    return Runner(capsys)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT classifier of two classes."""
    save_tiny("bert", tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixty labelled sentences for it."""
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


@pytest.fixture
def calibrated_run(tmp_path: Path, run_cli: Runner) -> tuple[Path, Path]:
    """(run directory with activations, split and a calibrated router, model folder) of a tiny OPT."""
    model, run, data = tmp_path / "opt", tmp_path / "run", tmp_path / "train.txt"
    save_tiny("opt", model)
    rng = random.Random(3)
    data.write_text("".join(" ".join(f"w{rng.randrange(40)}" for _ in range(12)) + "\n" for _ in range(300)))
    run_cli.ok("collect-activations", run, "--model", model, "--data", data, "--documents", "line", "--max-length", 16)
    run_cli.ok("split", run, "--expert-size", 4)
    run_cli.ok("train-router", run, "--epochs", 2)
    return run, model
