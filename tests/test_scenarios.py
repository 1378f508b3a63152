"""Every scenario runs on the quickstart's stream, with a tiny CLIP in place of the nano model, and has its probes."""

from pathlib import Path

import pytest
import yaml
from support.records import record

from clmerge.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
SCENARIOS = sorted(path.stem for path in (CONFIGS / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_runs_on_the_quickstart_stream(scenario, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])  # drawn elsewhere; seconds each
    file = CONFIGS / "scenarios" / f"{scenario}.yaml"
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(file)]
    arguments += ["--run_dir", str(tmp_path / "run"), f"--model.backbone.name={clip}", "--logging.wandb=false"]
    arguments += ["--stream.source.test_fraction=0.1", "--logging.csv=false", "--trainer.max_epochs=1"]
    arguments += ["--trainer.limit_train_batches=1", "--learner.statistics_images=8"]
    assert main(arguments) == 0
    probes = yaml.safe_load(file.read_text()).get("learner", {}).get("probes", [])
    found = record(tmp_path / "run")["models"]["expert"]["probes"]
    assert len(found) == len(probes) > 0
    for one in found.values():
        assert {"value", "curve", "n"} <= one.keys()
        assert one.get("per_task") or one.get("values")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_says_where_it_comes_from_and_how_it_runs(scenario):
    text = (CONFIGS / "scenarios" / f"{scenario}.yaml").read_text()
    assert yaml.safe_load(text)["name"] == scenario
    assert f"--config configs/scenarios/{scenario}.yaml" in text
    assert "arXiv" in text
