"""Every named method runs on the quickstart's stream, with a tiny CLIP in place of the nano model."""

from pathlib import Path

import pytest
import yaml
from support.records import record

from clmerge.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))


# One of every kind runs in the normal suite.
FEW = {
    *("adamerging_continual", "atlas"),
    *("attention_only", "bam", "chitale_lora", "ewc", "fisher", "iel", "joint", "lora_task_arithmetic", "magmax"),
    *("aswa", "dart", "diwa", "ema_within", "ema_horizons", "eoa", "forkmerge", "late_phase", "lawa", "lookaround"),
    "mean_teacher",
    *("online_merging", "papa", "ratatouille", "sparse_soup", "stock_periodic", "swa", "swad", "swalp", "twa", "warm"),
    *("warp", "wash"),
    *("adamergex_ia3", "lorahub", "lorm", "map", "mingle", "nufilt", "pwe_moe", "regmean", "repair", "replay"),
    *("sam_merging", "simple_cil", "slca_alignment", "surgery", "tangent_task_arithmetic", "tent"),
}


LONGER = {"twa": ["--trainer.limit_train_batches=2"]}  # a fit of one step has no first half


@pytest.mark.parametrize(
    "method", [method if method in FEW else pytest.param(method, marks=pytest.mark.exhaustive) for method in METHODS]
)
def test_method_runs_on_the_quickstart_stream(method, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])  # drawn elsewhere; seconds each
    monkeypatch.setattr("clmerge.merging.learned.learned.checked_steps", lambda steps, least: min(steps, 2))
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml")]
    arguments += ["--config", str(CONFIGS / "methods" / f"{method}.yaml"), "--run_dir", str(tmp_path / "run")]
    arguments += [f"--model.backbone.name={clip}", "--stream.num_tasks=2", "--logging.wandb=false"]
    arguments += ["--logging.csv=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    arguments += ["--learner.statistics_images=8", *LONGER.get(method, [])]
    assert main(arguments) == 0
    results = record(tmp_path / "run")
    mergers = yaml.safe_load((CONFIGS / "methods" / f"{method}.yaml").read_text()).get("mergers", [])
    models = [name for name in results["models"] if name not in ("expert", "zero_shot")]
    assert len([name for name in models if "+" not in name]) == len(mergers)
    assert results["models"]["expert"]["task_agnostic"]["R"][1][0] is not None


@pytest.mark.parametrize("method", METHODS)
def test_method_says_where_it_comes_from_and_how_it_runs(method):
    text = (CONFIGS / "methods" / f"{method}.yaml").read_text()
    assert yaml.safe_load(text)["name"] == method
    assert f"--config configs/methods/{method}.yaml" in text
    assert "arXiv:" in text or text.startswith(("# Baseline", "# Upper bound"))
