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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a CLIP with few and random weights, which ``OpenClip`` takes as its name."""
    from support.tiny import tiny_clip  # its libraries take seconds, and many tests need none of them

    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw none, which take seconds each and are tested elsewhere; nor do they write into another run's folder."""
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
