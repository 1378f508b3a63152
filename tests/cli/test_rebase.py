"""``clmerge rebase`` on runs of the embedded model: the new base is the old one with its units in another order."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.records import without_times

from clmerge.alignment import spec_of
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.cli import main
from clmerge.models import OpenClip
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.weights import load_metadata, load_tensors

DRIVER = Path(__file__).parents[1] / "support" / "kill_anywhere.py"

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
    assert {new.model(model).data for model in new.mergers} == {"none"}
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


def data_of(results):
    return {results.model(name).data for name in ("magmax", "task_arithmetic", "expert")}


def test_models_say_which_images_their_vectors_have_seen(made, tmp_path, capsys):
    out, seen = tmp_path / "new", "buffer(2 per class, labelled)"
    options = ["--transport", "GradientSignMask", "--transport.before=Permuted", "--few_shot", "0"]
    assert rebase(made, out, *options) == 0
    assert data_of(results_of(out)) == {seen}
    file = out / "model" / "magmax.safetensors"
    assert ModelFacts.from_metadata(load_metadata(file), str(file)).data == seen
    assert main(["fit", "--resume", str(out)]) == 0
    assert data_of(results_of(out)) == {seen}
    assert main(["compare", str(out), "--mergers", "TIES", "Fisher", "--out", str(tmp_path / "compared")]) == 0
    (found,) = json.loads((tmp_path / "compared" / "results.json").read_text())["runs"]
    assert found["models"]["ties"]["data"] == found["models"]["ensemble"]["data"] == seen
    assert found["models"]["fisher"]["data"] == f"{seen}+current"
    assert seen in capsys.readouterr().out


def killed_at(made, out, shares):
    """Kill a rebase at shares of what it writes; return what the driver tells."""
    backbone = ["--backbone", "OpenClip", f"--backbone.pretrained={made / 'other.safetensors'}"]
    transport = ["--transport", "GradientSignMask", "--transport.before=Permuted", "--few_shot", "0"]
    command = [sys.executable, str(DRIVER), str(out), json.dumps(shares), "rebase", str(made / "old")]
    subprocess.run([*command, *backbone, *transport], check=True, capture_output=True, timeout=600)
    return json.loads((out / "codes.json").read_text())


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param([0.05, 0.5, 0.95], marks=pytest.mark.slow),
        pytest.param([number / 24 for number in range(24)], marks=pytest.mark.exhaustive),
    ],
)
def test_a_rebase_that_is_killed_leaves_no_run_and_starts_again_to_the_same_bits(made, shares, tmp_path):
    before = digests(made / "old")
    told = killed_at(made, tmp_path, shares)
    assert told["codes"] == [0, *[-signal.SIGKILL] * len(shares), 0]
    assert told["count"] > 50
    assert not any(told["found"])
    assert digests(made / "old") == before
    assert not list(tmp_path.glob(".*"))
    whole, again = digests(tmp_path / "whole"), digests(tmp_path / "killed")
    assert whole.keys() == again.keys()
    timed = {"manifest.json", "results.json", ".lock"}
    assert {name for name in whole if whole[name] != again[name]} <= timed
    one, two = (results_of(tmp_path / name) for name in ("whole", "killed"))
    assert without_times(one.to_dict()) == without_times(two.to_dict())


def digests(folder):
    """Return the SHA-256 of every file of a run, by its path in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    assert "chose Permuted(aligner=WeightMatching(" in shown
    assert "matching lowers the barrier" in shown
    assert "few-shot" not in shown
    document = json.loads((tmp_path / "new" / "rebase" / "rebase.json").read_text())
    assert document["transport"].startswith("Auto(")
    assert document["chosen"].startswith("Permuted(")
    assert document["barriers"]["after"] < 1e-3 < document["barriers"]["before"]
    assert f"from {document['barriers']['before']:.3f} to" in document["why"]
    run = RunFolder.open(tmp_path / "new", writes=False)
    assert (run.manifest.trained, run.manifest.finished) == (1, False)
    assert run.manifest.data == "buffer(52 per class, unlabelled)"
    assert not (tmp_path / "new" / ".lock").exists()
    assert main(["fit", "--resume", str(tmp_path / "new")]) == 0
    run = RunFolder.open(tmp_path / "new", writes=False)
    assert (run.manifest.trained, run.manifest.finished) == (2, True)
    assert not list(tmp_path.glob(".*"))
    assert data_of(results_of(tmp_path / "new")) == {"buffer(52 per class, unlabelled)"}


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
