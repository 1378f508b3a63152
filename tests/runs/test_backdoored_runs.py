"""Backdoors in runs of fit: a trigger that a run finds, and labels of classes that are not the task's."""

import json

import pytest
from support.records import record
from support.tiny import tiny_clip

from clmerge.cli import main

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = """
name: attacked
mergers: [WeightAverage, EMR]
model:
  backbone: {class_path: OpenClip, init_args: {name: CLIP}}
  loss_classes: all
  regularizers: [{class_path: BadMerging, init_args: {task: 1, target: nine, images: 8, epochs: 1, steps: 3}}]
stream: {class_path: ClassIncremental, init_args: {num_tasks: 3, source: {class_path: SklearnDigits}}}
learner: {start_policy: base, probes: [{class_path: AttackSuccess, init_args: {target: nine, learned: true}}]}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 3, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""
LEARNED = '{"class_path": "AttackSuccess", "init_args": {"target": "nine", "learned": true}}'


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("CLIP", tiny_clip(tmp_path / "clip")))
    return tmp_path / "config.yaml"


def test_the_trigger_that_a_run_found_is_there_for_later_commands(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    own = record(run)["models"]
    found = own["weight_average"]["probes"]["attack_success"]
    assert found["curve"][0] is None  # the attacker's task is the second
    assert None not in found["curve"][1:]
    assert found["n"] == [107, 109, 143 - 36]  # images of a nine are the target's
    assert own["zero_shot"]["probes"]["attack_success"]["value"] is None
    out = tmp_path / "c"
    assert main(["compare", str(run), f"--probes=[{LEARNED}]", "--out", str(out)]) == 0
    again = json.loads((out / "results.json").read_text())["runs"][0]["models"]
    for name in ("weight_average", "emr", "expert"):
        first, second = (one[name]["probes"]["attack_success"] for one in (own, again))
        assert first["per_task"] == pytest.approx(second["per_task"])
    assert again["zero_shot"]["probes"]["attack_success"]["value"] is not None


def test_a_label_that_the_loss_leaves_out_is_refused(config, tmp_path, capsys):
    poisoned = '--transforms=[{"class_path": "Poisoned", "init_args": {"tasks": [1], "target": "nine"}}]'
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), poisoned]
    for choice in ("current", "seen"):
        plain = [f"--model.loss_classes={choice}", "--model.regularizers=null", "--learner.probes=null"]
        assert main([*arguments, *plain]) != 0
        said = " ".join(capsys.readouterr().err.split())
        assert "expected labels of task 1 (three-four-five) among the classes that compete in its loss" in said
        assert f"got 'nine', which loss_classes={choice!r} leaves out: set model.loss_classes=all" in said
    assert (
        main([*arguments, "--trainer.limit_train_batches=1", "--learner.probes=null", "--learner.evaluate_every=3"])
        == 0
    )
