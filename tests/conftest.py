"""What every test may use. Real models and data lie beside the checkout; tests that need them skip without."""

from pathlib import Path

import pytest
from cli_runner import Runner


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
