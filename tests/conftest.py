"""What every test is held to."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE_BY_TOOLS = {".hypothesis", ".mypy_cache", ".ruff_cache", ".coverage", "uv.lock"}


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_repository():
    """Libraries write to the working folder where they are not told another one."""
    before = {path.name for path in ROOT.iterdir()}
    yield
    left = {path.name for path in ROOT.iterdir()} - before - MADE_BY_TOOLS
    assert not left, f"written into {ROOT}: {sorted(left)}; pass default_root_dir, or run the test in tmp_path"
