"""Probes of robustness and of held-out tasks in fit, compare and evaluate, with models that need to know the task."""

import json

import pytest
from support.records import record
from support.tiny import tiny_clip

from clmerge.cli import main

CONFIG = """
name: shifted
mergers: [TaskArithmetic, EMR]
transforms: [{class_path: HeldOut, init_args: {tasks: [1]}}, {class_path: FewShot, init_args: {shots: 16}}]
model:
  backbone: {class_path: OpenClip, init_args: {name: CLIP}}
  loss_classes: seen
  optimizer: {class_path: AdamW}
  regularizers: [{class_path: TRADES, init_args: {threats: [{norm: linf, eps: 0.1}, {norm: l2, eps: 1.0}], steps: 1}}]
stream: {class_path: ClassIncremental,
  init_args: {source: {class_path: SklearnDigits, init_args: {test_fraction: 0.1}}}}
learner: {probes: [HeldOutAccuracy, NovelClassAccuracy]}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 1, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""
ATTACKS = "[{class_path: PGDAccuracy, init_args: {num_images: 4, steps: 2}}, "
ATTACKS += "{class_path: PGDAccuracy, init_args: {norm: l2, num_images: 4, steps: 2}}, "
ATTACKS += "{class_path: CorruptionAccuracy, init_args: {corruptions: [contrast, jpeg]}}, HeldOutAccuracy]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shifted")
    (folder / "config.yaml").write_text(CONFIG.replace("CLIP", tiny_clip(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return folder / "run"


def test_held_out_tasks_are_probed_after_every_task(folder):
    models = record(folder)["models"]
    for name in ("task_arithmetic", "expert"):
        found = models[name]["probes"]["held_out_accuracy"]
        assert len(found["curve"]) == 4
        assert found["values"] == {"two-three": found["value"]}
        assert found["n"] == {"two-three": 36}
        assert models[name]["probes"]["novel_class_accuracy"]["values"].keys() == {"old", "novel", "clustering"}
    assert models["emr"]["probes"]["held_out_accuracy"]["value"] is None  # its weights depend on the task
    assert models["zero_shot"]["probes"]["held_out_accuracy"]["value"] is not None


def test_compare_and_evaluate_attack_models_of_a_finished_run(folder, tmp_path, capsys):
    assert main(["compare", str(folder), "--probes", ATTACKS, "--out", str(tmp_path / "c")]) == 0
    compared = json.loads((tmp_path / "c" / "results.json").read_text())["runs"][0]["models"]
    assert main(["evaluate", str(folder), "--probes", ATTACKS, "--out", str(tmp_path / "e")]) == 0
    evaluated = json.loads((tmp_path / "e" / "results.json").read_text())["runs"][0]["models"]
    for name in ("task_arithmetic", "emr"):
        for probe in ("pgd_linf", "pgd_l2", "corruption_accuracy"):
            found = compared[name]["probes"][probe]
            assert found["better"] == "higher"
            assert found["share"] is True
            assert len(found["per_task"]) == 4
            assert evaluated[name]["probes"][probe]["value"] == pytest.approx(found["value"])
            assert evaluated[name]["probes"][probe]["values"] == pytest.approx(found["values"])
        assert compared[name]["probes"]["pgd_linf"]["n"] == [4, 4, 4, 4]
        assert compared[name]["probes"]["pgd_linf"]["value"] <= compared[name]["probes"]["pgd_linf"]["values"]["clean"]
    own = record(folder)["models"]["task_arithmetic"]["probes"]["held_out_accuracy"]
    assert compared["task_arithmetic"]["probes"]["held_out_accuracy"]["curve"] == pytest.approx(own["curve"])
    assert "pgd_linf" in capsys.readouterr().out
