import os

import pytest


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """Keep W&B's files and credentials of this machine out of the test."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # for good: the service of an earlier test has just ended
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)
