"""What every test is held to."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE_BY_LIBRARIES = ("checkpoints", "lightning_logs", "wandb", "runs", "mlruns", "plots")


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_repository():
    """Libraries write to the working folder where they are not told another one."""
    before = {name for name in MADE_BY_LIBRARIES if (ROOT / name).exists()}
    yield
    left = {name for name in MADE_BY_LIBRARIES if (ROOT / name).exists()} - before
    assert not left, f"written into {ROOT}: {sorted(left)}; pass default_root_dir, or run the test in tmp_path"
