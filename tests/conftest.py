"""What every test may use. Real models and data lie beside the checkout; tests that need them skip without."""

from pathlib import Path

import pytest


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real models and data; the test is skipped, with this reason, where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the real models and data in {folder}, which is not there")
    return folder
