"""``clmerge rebase`` on runs of the embedded model: the new base is the old one with its units in another order."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clmerge.alignment import spec_of
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.cli import main
from clmerge.models import OpenClip
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.weights import load_tensors

CONFIG = """
name: digits
mergers: [MagMax, TaskArithmetic]
model: {backbone: OpenClip, loss_classes: all, optimizer: {class_path: AdamW, init_args: {lr: 2.0e-4}}}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, source: {class_path: SklearnDigits,
  init_args: {test_fraction: 0.1}}}}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 3, limit_val_batches: 1, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and the weights of its base with the units in another order."""
    folder = tmp_path_factory.mktemp("rebase")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "old")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    model = OpenClip("nano").model
    hidden = random_reparametrization(spec_of(model), torch.Generator().manual_seed(1))
    moved = {name: tensor.contiguous() for name, tensor in hidden.apply(model.state_dict()).items()}
    save_file(moved, folder / "other.safetensors")
    return folder


def rebase(made, out, *options, run="old"):
    backbone = ["--backbone", "OpenClip", f"--backbone.pretrained={made / 'other.safetensors'}"]
    return main(["rebase", str(made / run), *backbone, "--out", str(out), *options])


def results_of(run):
    return Results.from_dict(RunFolder.open(run, writes=False).manifest.results)


def test_a_run_on_a_permuted_base_is_the_run(made, tmp_path, capsys):
    out, oracle = tmp_path / "new", ["--oracle", str(made / "old")]
    assert rebase(made, out, "--transport", "Permuted", "--few_shot", "1", *oracle, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    old, new = results_of(made / "old"), results_of(out)
    assert new.name == "new"
    for model in ("magmax", "task_arithmetic", "expert"):
        assert np.allclose(old.matrix(model, "task_agnostic"), new.matrix(model, "task_agnostic"), atol=0.02)
    rows = document["rows"]
    assert list(rows) == ["new base alone", "identity", "transported", "few-shot fine-tuning", "oracle"]
    assert rows["transported"]["mean"] == pytest.approx(rows["oracle"]["mean"], abs=0.01)
    assert rows["transported"]["transfer_ratio"] > 0.9
    assert rows["identity"]["mean"] < rows["transported"]["mean"] - 0.03
    assert rows["new base alone"]["transfer_ratio"] == 0.0
    assert document["data"] == "none"
    assert set(document["alignment"]["moved"]) == set(load_groups(out))
    assert json.loads((out / "rebase" / "rebase.json").read_text()) == document
    assert main(["fit", "--resume", str(out)]) == 0
    assert main(["compare", str(out), "--mergers", "TIES", "--out", str(tmp_path / "compared")]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert results_of(out).to_dict() == new.to_dict()


def load_groups(run):
    return {name.removesuffix(".index") for name in load_tensors(run / "rebase" / "alignment.safetensors")}


def test_the_tasks_that_were_not_trained_are_trained_on_the_new_base(made, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise RuntimeError("stopped before the second task")

    config = str(made / "config.yaml")
    with monkeypatch.context() as patch:
        from clmerge.runs.task_training import TaskTraining

        train = TaskTraining.train
        patch.setattr(
            TaskTraining, "train", lambda self, results, task: train(self, results, task) if not task else stop()
        )
        assert main(["fit", "--config", config, "--run_dir", str(tmp_path / "half")]) == 1
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    assert rebase(made, tmp_path / "new", "--transport", "auto", "--few_shot", "0", run=tmp_path / "half") == 0
    shown = capsys.readouterr().out
    assert "matching lowers the barrier" in shown
    assert "few-shot" not in shown
    run = RunFolder.open(tmp_path / "new", writes=False)
    assert (run.manifest.trained, run.manifest.finished) == (1, False)
    assert main(["fit", "--resume", str(tmp_path / "new")]) == 0
    run = RunFolder.open(tmp_path / "new", writes=False)
    assert (run.manifest.trained, run.manifest.finished) == (2, True)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_carried_over_is_said(made, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert rebase(made, tmp_path / "full", "--transport", "Identity") == 1
    assert "expected a new or empty folder for --out" in capsys.readouterr().err
    timm = ["--backbone", "Timm", "--backbone.name=test_vit", "--backbone.image_size=32"]
    found = main(["rebase", str(made / "old"), *timm, "--transport", "Identity", "--out", str(tmp_path / "new")])
    assert found == 1
    assert "expected a head that learns its classes for Timm" in capsys.readouterr().err
    assert rebase(made, tmp_path / "new", "--transport", "Identity", "--few_shot=-1") == 1
    assert "few_shot of 0 or more" in capsys.readouterr().err
    other = tmp_path / "other"
    assert rebase(made, tmp_path / "new", "--transport", "Identity", "--oracle", str(other)) == 1
    assert "expected a run folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


LEARNED = """
mergers: [WeightAverage]
model: {backbone: {class_path: Timm, init_args: {name: test_vit, image_size: 32}}, head: LinearHead, tuning: LoRA,
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-3}}}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, source: {class_path: SklearnDigits,
  init_args: {test_fraction: 0.1}}}}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""


def test_a_learned_head_follows_the_features(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(LEARNED)
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "old")]) == 0
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    weights = load_tensors(tmp_path / "old" / "state" / "task_001" / "module.safetensors")
    base = RunFolder.open(tmp_path / "old", writes=False).load_weights()[1]
    from clmerge.models import Timm

    model = Timm("test_vit", image_size=32).model
    names = model.state_dict()
    own = {name: base.get(f"backbone.model.{name}", weights.get(f"backbone.model.{name}")) for name in names}
    assert all(tensor is not None for tensor in own.values())
    hidden = random_reparametrization(spec_of(model, readers=[]), torch.Generator().manual_seed(1))
    save_file({name: tensor.contiguous() for name, tensor in hidden.apply(own).items()}, tmp_path / "other.safetensors")
    backbone = ["--backbone", "Timm", "--backbone.name=test_vit", "--backbone.image_size=32"]
    backbone.append(f"--backbone.checkpoint={tmp_path / 'other.safetensors'}")
    options = ["--transport", "Permuted", "--few_shot", "0", "--out", str(tmp_path / "new")]
    assert main(["rebase", str(tmp_path / "old"), *backbone, *options]) == 0
    old, new = results_of(tmp_path / "old"), results_of(tmp_path / "new")
    for model in ("weight_average", "expert"):
        found = new.matrix(model, "task_aware")
        assert np.allclose(old.matrix(model, "task_aware"), found, atol=0.01, equal_nan=True)
    capsys.readouterr()


@pytest.mark.parametrize(
    "words",
    [
        ["--transport", "auto"],
        ["--transport=auto", "--transport.images=5"],
        ["--transport", "GradientSignMask", "--transport.before=Permuted"],
        ["--transport", "Permuted", "--transport.aligner", "WeightMatching", "--transport.aligner.within_head", "none"],
        ["--transport", "Permuted", "--transport.aligner=ActivationMatching", "--transport.aligner.weights=0.3"],
    ],
)
def test_transports_and_their_settings_are_options(words, tmp_path, capsys):
    backbone = ["--backbone", "OpenClip", "--backbone.name", "nano"]
    assert main(["rebase", str(tmp_path / "none"), *backbone, *words, "--out", str(tmp_path / "new")]) == 1
    assert "expected a run folder" in capsys.readouterr().err
