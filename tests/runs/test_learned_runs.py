"""Rules that learn, in runs: the images that they look at, in fit, on finished runs, and after an interruption."""

import json

import pytest
import torch
from support.records import record
from support.tiny import tiny_clip

from clmerge import load_run
from clmerge.cli import main
from clmerge.weights import load_tensors

CONFIG = """
name: learned
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  loss_classes: seen
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers:
- TaskArithmetic
- {{class_path: AdaMerging, init_args: {{steps: 3, lr: 0.05}}}}
- {{class_path: ATLAS, init_args: {{steps: 3, lr: 0.05}}}}
- {{class_path: ZipMerge, init_args: {{steps: 2, lr: 0.05}}}}
adaptation: {{source: buffer, per_class: 3, labels: true, batch_size: 8}}
data: {{batch_size: 64}}
trainer: {{max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, limit_train_batches: 3, limit_val_batches: 1}}
logging: {{wandb: false, csv: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip")))
    return file


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)


def fit(config, folder, *options):
    return main(["fit", "--config", str(config), "--run_dir", str(folder), *options])


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert fit(config, folder) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return folder


def test_what_every_model_looked_at_is_in_the_results_and_in_its_file(run):
    models = record(run)["models"]
    wanted = {
        "task_arithmetic": "none",
        "adamerging": "buffer(3 per class, unlabelled)",
        "atlas": "buffer(3 per class, labelled)",
        "zip_merge": "buffer(3 per class, unlabelled)",
    }
    assert {name: models[name]["data"] for name in wanted} == wanted
    assert models["adamerging"]["rule"]["requires"] == ["gradient"]
    assert {name: load_run(run).facts(name).data for name in wanted} == wanted
    assert record(run)["bytes"]["adaptation"] == 3 * 10 * 3 * 8 * 8


def rows(models, name):
    return [models[name][setting]["R"] for setting in ("task_agnostic", "task_aware")]


def test_a_finished_run_learns_the_same_again_and_other_images_are_another_row(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(run), "--out", str(out)]) == 0
    models, compared = record(run)["models"], record(out)["models"]
    for name in ("task_arithmetic", "adamerging", "atlas", "zip_merge"):
        assert rows(compared, name) == rows(models, name)
        assert compared[name]["data"] == models[name]["data"]
    cached = len(json.loads((out / "rows.json").read_text()))
    capsys.readouterr()
    again = ["compare", str(run), "--out", str(out), "--mergers=[TaskArithmetic, AdaMerging]"]
    assert main([*again, "--mergers.init_args.steps=1", "--adaptation.source=test", "--adaptation.per_class=2"]) == 0
    assert record(out)["models"]["adamerging"]["data"] == "test(transductive, 2 per class, unlabelled)"
    assert "test(transductive, 2 per class, unlabelled)" in capsys.readouterr().out
    assert len(json.loads((out / "rows.json").read_text())) == cached + 2  # of the rule that learns, not of the other
    assert "adaptation" in record(out)["bytes"]


def test_what_it_may_not_see_is_refused_before_anything_is_trained(config, run, tmp_path, capsys):
    assert fit(config, tmp_path / "run", "--adaptation.labels=false") == 1
    assert "merger 'atlas': expected labelled adaptation data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["compare", str(run), "--mergers=[ATLAS]", "--adaptation.source=val"]) == 1
    assert "adaptation.labels=true" in capsys.readouterr().err
    assert fit(config, tmp_path / "run", "--stream.val_fraction=0", "--adaptation.source=val") == 1
    assert "another adaptation.source" in capsys.readouterr().err


def test_test_images_are_named_as_what_they_are(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clmerge.merging.learned.learned.checked_steps", lambda steps, least: min(steps, 1))
    mergers = "--mergers=[{class_path: AdaMerging, init_args: {steps: 1}}]"
    options = ["--adaptation.source=test", "--adaptation.per_class=null", "--stream.num_tasks=2"]
    assert fit(config, tmp_path / "run", mergers, *options) == 0
    said = capsys.readouterr()
    assert "adamerging learns on test(transductive, unlabelled), the images that it is scored on" in said.err
    assert "test(transductive, unlabelled)" in said.out


def test_an_interrupted_run_learns_the_same_bits(config, run, tmp_path, monkeypatch):
    from clmerge.runs.learner import Learner

    evaluate = Learner._evaluate

    def interrupted(self, folder, trainers, results, task):
        if task == 0:
            raise RuntimeError("no power")
        evaluate(self, folder, trainers, results, task)

    other = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_evaluate", interrupted)
        assert fit(config, other) != 0
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    assert main(["fit", "--resume", str(other)]) == 0
    for name in ("adamerging", "atlas", "zip_merge"):
        straight, resumed = (load_tensors(folder / "model" / f"{name}.safetensors") for folder in (run, other))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
        assert rows(record(run)["models"], name) == rows(record(other)["models"], name)
