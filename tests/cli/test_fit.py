import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file
from streams.tiny_layouts import write_tree
from support.records import record, without_times
from support.tiny import tiny_clip
from wandb_reader import find_runs

from clmerge.callbacks.progress import EpochLines
from clmerge.cli import main
from clmerge.cli.fit import spread_lists
from clmerge.cli.resume import complete_line, split_resume
from clmerge.results.run_folder import RunFolder
from clmerge.results.run_manifest import read_manifest
from clmerge.runs.task_training import TaskTraining

CONFIG = """
name: small
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  loss_classes: all
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [MagMax, TIES]
data: {{batch_size: 64}}
trainer: {{max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, limit_train_batches: 3, limit_val_batches: 1}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip")))
    return path


@pytest.fixture(autouse=True)
def private_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A whole run with W&B and CSV."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(run.parent / "wandb"))
        assert main(["fit", "--config", str(config), "--run_dir", str(run), "--logging.artifacts=true"]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return run


def test_results_keep_the_contract(finished):
    results = record(finished)
    assert (results["name"], results["seed"], results["path"]) == (finished.name, 0, None)
    assert results["models"]["ties"]["rule"]["merger"] == "TIES"
    assert (results["models"]["ties"]["kind"], results["models"]["ties"]["data"]) == ("merged", "none")
    assert all(model["bytes_kept"] for model in results["models"].values())
    assert all(seconds > 0 for seconds in results["models"]["magmax"]["merge_seconds"])
    assert results["tasks"] == ["zero-one-and-3", "five-six-and-3"]
    assert [len(names) for names in results["classes"]] == [5, 5]
    assert set(results["models"]) == {"magmax", "ties", "expert", "zero_shot"}
    for settings in results["models"].values():
        for setting in ("task_agnostic", "task_aware"):
            figures = settings[setting]
            assert [len(row) for row in figures["R"]] == [2, 2]
            assert len(figures["average_accuracy"]) == 2
            for key in ("average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
                assert isinstance(figures[key], float)
            assert isinstance(figures["learning_accuracy"], float)
    assert {"train", "evaluate", "merge"} <= set(results["seconds"])


def test_models_load_strictly_into_open_clip(finished, config):
    name = yaml.safe_load(config.read_text())["model"]["backbone"]["init_args"]["name"]
    model = open_clip.create_model(name)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for merger in ("magmax", "ties"):
        merged = load_file(finished / "model" / f"{merger}.safetensors")
        model.load_state_dict(merged, strict=True)
        changed = {key for key in base if not torch.equal(base[key], merged[key])}
        assert changed
        assert all(key.startswith("visual.") for key in changed)


def test_the_saved_config_runs_again(finished, config, tmp_path):
    again = tmp_path / "again"
    arguments = ["--config", str(finished / "config.yaml"), "--run_dir", str(again), "--logging.wandb=false"]
    assert main(["fit", *arguments]) == 0
    first, second = (without_times(record(run))["models"] for run in (finished, again))
    assert first == second


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = {path: path.read_bytes() for path in [finished / "results.json", *finished.glob("model/*")]}
    assert main(["fit", "--resume", str(finished)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert "results" in capsys.readouterr().out


def test_csv_has_one_continuous_axis(finished):
    (file, *_) = sorted(finished.glob("logs/csv/*/metrics.csv"))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    steps = [int(row["step"]) for row in rows if row.get("train/loss")]
    epochs = [float(row["epoch"]) for row in rows if row.get("train/loss")]
    assert steps == list(range(6))
    assert epochs == [0, 0, 0, 1, 1, 1]
    rates = [float(row["train/lr"]) for row in rows if row.get("train/loss")]
    assert rates[0] == rates[3] > rates[1] > rates[2] > 0, "the schedule of every task begins anew"
    assert all(0 <= float(row["train/accuracy"]) <= 1 for row in rows if row.get("train/loss"))


def test_wandb_has_the_figures_by_name_and_one_continuous_axis(finished):
    runs = find_runs(finished / "logs")
    first = runs[0]
    rows = [row for row in first.history if "cl/average_accuracy" in row]
    results = record(finished)["models"]["magmax"]["task_agnostic"]
    assert [row["cl/average_accuracy"] for row in rows][:2] == results["average_accuracy"]
    assert [row["cl/task"] for row in rows][:2] == [1, 2]
    losses = [row["trainer/global_step"] for row in first.history if "train/loss" in row]
    assert losses == list(range(6))


def test_wandb_knows_what_the_run_is(finished):
    run = find_runs(finished / "logs")[0]
    assert run.run.display_name == "small magmax+ties full previous s0"
    group, _, digest = run.run.run_group.rpartition(" ")  # the experiment's settings, without its seed
    assert (group, run.run.job_type) == ("small magmax+ties full previous", "fit")
    assert re.fullmatch("[0-9a-f]{6}", digest)
    assert list(run.run.tags) == ["ClassIncremental", "full", "previous", "magmax", "ties"]
    wanted = {
        "stream": "SklearnDigits-2",
        "method": "magmax+ties",
        "mergers/TIES/density": 0.2,
        "trainer/max_epochs": 1,
    }
    assert {key: run.config[key] for key in wanted} == wanted
    assert run.config["run_dir"] == str(finished)
    assert {"base", "task-vector", "merged-model"} <= {artifact.type for artifact in run.artifacts}
    results = record(finished)["models"]["magmax"]["task_agnostic"]
    assert run.summary["cl/average_accuracy"] == results["average_accuracy"][-1]
    assert run.summary["cl/forgetting"] == results["forgetting"]
    assert "method: magmax+ties" in (finished / "logs" / "csv" / "version_0" / "hparams.yaml").read_text()


def test_pictures_are_there(finished):
    names = {path.name for path in finished.glob("plots/*.png")}
    assert {"matrices.png", "forgetting_curves.png", "average_accuracy.png", "final_accuracy.png"} <= names


def test_nothing_temporary_is_left(finished):
    assert not [path for path in finished.rglob("*") if path.suffix in (".tmp", ".ckpt")]


def test_an_existing_folder_is_never_overwritten(config, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["fit", "--config", str(config), "--run_dir", str(tmp_path)]) == 1
    assert "--run_dir" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_what_is_read_of_a_checkpoint_is_printed(config, tmp_path, capsys):
    weights = load_file(config.parent / "clip" / "open_clip_model.safetensors")
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "last.pt")
    chosen = ["--model.backbone.pretrained", str(tmp_path / "last.pt"), "--model.backbone.weights=state_dict"]
    assert main(["fit", "--config", str(config), *chosen, "--run_dir", str(tmp_path)]) == 1  # which has content
    assert "last.pt (torch.save, under 'state_dict' (there are also 'state_dict_ema'): " in capsys.readouterr().out


def test_an_existing_run_is_continued_with_resume(config, finished, capsys):
    assert main(["fit", "--config", str(config), "--run_dir", str(finished)]) == 1
    assert f"--resume {finished}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learner.start_polcy=base"], "did you mean --learner.start_policy?"),
        (["--mergers", "MagMaxx"], "did you mean MagMax?"),
        (["--model.backbone.nam=x"], "did you mean name?"),
        (["--learner.start_policy=bse"], "did you mean 'base'?"),
        (["--trainer.max_epochs=abc"], "trainer.max_epochs"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_typo_names_the_nearest_option_and_writes_nothing(config, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.backbone.name=ViT-B-61"], "nearest: ViT-B-16"),
        (["--mergers", "GreedySoup", "--stream.val_fraction=0"], "set stream.val_fraction above 0"),
        (["--learner.epochs=[1,2,3]"], "expected epochs for each of the 2 tasks, got 3"),
        (["--mergers", "[MagMax, MagMax]"], "twice"),
        (["--logging.artifacts=true", "--learner.keep_task_vectors=false"], "keep_task_vectors=false; set it to true"),
        (
            [
                "--logging.artifacts=true",
                "--model.tuning=Frozen",
                "--model.head=LinearHead",
                "--model.loss_classes=seen",
            ],
            "frozen",
        ),
        (
            [
                *("--stream.source", "TorchvisionSource"),
                *("--stream.source.dataset=CIFAR100", "--stream.source.root=nowhere"),
            ],
            "CIFAR100",
        ),
        (["--stream.num_tasks=0"], "clmerge fit: expected num_tasks of 1 or more, got 0\n"),
        (["--stream.val_fraction=1.5"], "clmerge fit: expected val_fraction in [0, 1), got 1.5\n"),
        (["--model.tuning=Partial", "--model.tuning.scope=attentoin"], "did you mean 'attention'?\n"),
        (["--model.optimizer.lr=-1"], "Invalid learning rate: -1.0; see model.optimizer\n"),
        (["--trainer.max_epochs=0"], "expected trainer.max_epochs of 1 or more, or -1 for no limit, got 0"),
        (["--trainer.max_steps=0"], "expected trainer.max_steps of 1 or more"),
        (["--learner.epochs=[1,0]"], "expected learner.epochs of 1 or more for every task, got 0"),
        (["--trainer.accelerator=gpuu"], "gpuu"),
        (["--trainer.accumulate_grad_batches=0"], "expected trainer.accumulate_grad_batches of 1 or more, got 0"),
        (["--trainer.check_val_every_n_epoch=0"], "expected trainer.check_val_every_n_epoch of 1 or more, got 0"),
        (["--seed=-1"], "expected a seed from 0 to 4294967295, got -1"),
        (
            ["--data.augmentation=[{class_path: RandomResizedCrop, init_args: {size: -5}}]"],
            "expected settings that Random",
        ),
        (["--data.augmentation=[ToImage]"], "expected a step of data.augmentation that returns a picture"),
        (
            [
                "--trainer.callbacks+=EarlyStopping",
                "--trainer.callbacks.monitor=x",
                "--trainer.callbacks.mode=smallest",
            ],
            "`mode` can be min, max",
        ),
        (
            ["--model.backbone=Timm", "--model.backbone.name=test_vit", "--model.loss_classes=seen"],
            "no text tower, got none",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"],
            "for EarlyStopping to monitor (train/loss, train/accuracy, train/lr, val/loss, val/accuracy, epoch, step), "
            "got 'val/los'; did you",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--stream.val_fraction=0"],
            "got 'val/loss'; the stream holds no validation images out: set stream.val_fraction above 0",
        ),
        (
            [
                "--trainer.callbacks+=ModelCheckpoint",
                "--trainer.callbacks.monitor=train/ewcc",
                "--model.regularizers=[EWC]",
            ],
            "train/ewc, val/loss, val/accuracy, epoch, step), got 'train/ewcc'; did you mean 'train/ewc'?",
        ),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(config, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(config), *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1, "and nothing was begun"
    assert [*tmp_path.iterdir()] == []


def test_other_loggers_write_into_the_run(config, tmp_path, capsys):
    run = tmp_path / "run"
    other = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path / 'mine'}, name: own}}}}"
    extra = f"--logging.extra=[TensorBoardLogger, CSVLogger, {other}]"
    assert main(["fit", "--config", str(config), "--run_dir", str(run), "--logging.wandb=false", extra]) == 0
    assert list((run / "logs" / "lightning_logs" / "version_0").glob("events.out.tfevents.*"))
    kept = [path.read_text() for path in (run / "logs").rglob("metrics.csv")]
    assert len(kept) == 2
    assert (tmp_path / "mine" / "own" / "version_0" / "metrics.csv").read_text() in kept
    with pytest.raises(SystemExit) as stop:  # and the configuration of the run is one to begin another with
        main(["fit", "--config", str(run / "config.yaml"), "--print_config"])
    assert stop.value.code == 0
    assert "save_dir: null" in capsys.readouterr().out


def test_a_logger_without_its_package_is_one_sentence(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    run = tmp_path / "run"
    given = ["--run_dir", str(run), "--logging.wandb=false", "--logging.extra=[TensorBoardLogger]"]
    assert main(["fit", "--config", str(config), *given]) == 1
    told = capsys.readouterr().err
    assert "clmerge fit: TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available." in told
    assert "Traceback" not in told
    assert not run.exists()


def test_an_own_folder_without_templates_is_trained_on_with_a_notice(config, tmp_path, capsys):
    for part, number in (("train", 6), ("test", 2)):
        write_tree(tmp_path / "pets" / part, ["cat", "dog"], number)
    source = ["--stream.source=ImageFolderSource", f"--stream.source.root={tmp_path / 'pets'}"]
    assert (
        main(["fit", "--config", str(config), *source, "--run_dir", str(tmp_path / "run"), "--logging.wandb=false"])
        == 0
    )
    told = capsys.readouterr().err
    assert "prompts are 'a photo of a {}.' with the names of the classes, since none are known for 'pets'" in told


def test_print_config_shows_overrides(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--trainer.max_epochs=7", "--mergers", "TIES", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_epochs"] == 7
    assert [merger["class_path"] for merger in shown["mergers"]] == ["clmerge.merging.TIES"]


def test_help_is_what_the_parser_says(capsys):
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, str(root / "scripts" / "update_generated.py"), "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert main(["fit", "--help"]) == 0
    assert "--learner.start_policy" in capsys.readouterr().out


def test_mergers_may_be_listed_with_spaces():
    assert spread_lists(["--mergers", "A", "B", "--x", "1"]) == ["--mergers=[A, B]", "--x", "1"]
    assert spread_lists(["--mergers", "[A, B]"]) == ["--mergers", "[A, B]"]
    assert spread_lists(["--mergers=A", "x"]) == ["--mergers=[A]", "x"]
    assert spread_lists(["--calibrations", "A", "B"]) == ["--calibrations=[A, B]"]
    assert spread_lists(["--learner.calibrations=A"]) == ["--learner.calibrations=[A]"]
    assert spread_lists(["--mergers=[A]", "--mergers=null"]) == ["--mergers=[A]", "--mergers=null"]
    assert spread_lists(["--mergers", "--x"]) == ["--mergers", "--x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "got no folder"),
        (["--resume="], "got no folder"),
        (["--resume", "--trainer.max_epochs=1"], "got no folder"),
        (["--resume", "x", "--seed", "1"], "beside --resume, got --seed=1: the rest of a run's configuration"),
        (["--learner.start_policy=base", "--resume=x"], "got --learner.start_policy=base"),
        (["--resume=x", "--trainer.max_epochs"], "got --trainer.max_epochs:"),
        (["--resume=x", "--config", "c.yaml"], "got --config=c.yaml"),
    ],
)
def test_resume_wants_a_run_and_options_that_may_change(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        split_resume(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_is_not_resumed(tmp_path, capsys):
    assert main(["fit", "--resume", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"clmerge fit: expected a run folder with a manifest.json, got {tmp_path}\n"


def stopped_after_first_task(config, run, monkeypatch, *options):
    """Run until the second task begins."""
    train = TaskTraining.train

    def stop(self, results, task):
        if task == 1:
            raise OSError("the disk is gone")
        train(self, results, task)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTraining, "train", stop)
        assert main(["fit", "--config", str(config), "--run_dir", str(run), "--logging.wandb=false", *options]) == 1


def test_options_of_a_resume_are_on_record_and_edited_files_are_refused(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    stopped_after_first_task(config, run, monkeypatch)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("clmerge fit: the disk is gone")
    assert told.endswith(f"; what was trained is kept: resume with clmerge fit --resume {run}")
    whole = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_epochs: 1", "max_epochs: 2"))
    assert main(["fit", "--resume", str(run)]) == 1
    assert (
        "config.yaml as the run began with it, got 'max_epochs: 2' where it had 'max_epochs: 1'"
        in capsys.readouterr().err
    )
    (run / "config.yaml").write_text(text)

    vector = run / "bank" / "task_000.safetensors"
    vector.write_bytes(vector.read_bytes()[:-1] + b"x")
    assert main(["fit", "--resume", str(run)]) == 1
    assert f"expected {vector} as the run has committed it" in capsys.readouterr().err
    vector.write_bytes(whole[vector.relative_to(run)])
    assert {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()} == whole

    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2", "--trainer.limit_train_batches=2"]) == 0
    results = record(run)
    assert results["options"] == [[], ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2"]]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["options"] == [{"task": 1, "options": results["options"][1]}]
    assert read_manifest(run / "manifest.json").results == results
    assert (manifest["epochs"], manifest["step"]) == (3, 3 + 2 * 2)
    assert (run / "config.yaml").read_text() == text

    (run / "plots" / "task_aware" / "matrices.png").unlink()
    (run / "model" / "ties.safetensors").unlink()
    (run / "plots" / ".matrices.png.0123.tmp").touch()
    assert main(["fit", "--resume", str(run)]) == 0
    assert (run / "plots" / "task_aware" / "matrices.png").is_file()
    assert (run / "model" / "ties.safetensors").is_file()
    assert not list(run.rglob("*.tmp"))


def test_sigterm_in_training_ends_with_143_and_the_run_resumes_to_the_same_bits(
    config, finished, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "on_train_batch_start", terminated_in_the_second_task)
        assert main(["fit", "--config", str(config), "--run_dir", str(run), "--logging.wandb=false"]) == 143
    told = capsys.readouterr().err.splitlines()[-1]
    stands = "1 of 2 tasks are trained and merged; resume with clmerge fit --resume"
    assert told == f"clmerge fit: stopped by SIGTERM; {stands} {run}"
    assert json.loads((run / "manifest.json").read_text())["trained"] == 1
    assert main(["fit", "--resume", str(run)]) == 0
    for name in ("model/magmax.safetensors", "model/ties.safetensors", "bank/task_001.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def terminated_in_the_second_task(self, trainer, module, batch, batch_idx):
    if trainer.datamodule.task == 1 and batch_idx == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_complete_run_says_so_at_once(finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = (run / "config.yaml").read_text().replace("artifacts: true", "artifacts: false")
    manifest = json.loads((run / "manifest.json").read_text()) | {"config": config}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr("clmerge.cli.fit.build_parser", None)  # nothing is loaded
    assert main(["fit", "--resume", str(run)]) == 0
    told = capsys.readouterr().out
    assert told == f"{run} is complete: 2 of 2 tasks; its results are in {run / 'results.json'}\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert complete_line(str(finished)) is None, "artifacts may be missing, which only W&B knows"
    vector = run / "bank" / "task_001.safetensors"
    vector.write_bytes(vector.read_bytes()[:-1] + b"x")
    assert complete_line(str(run)) is None, "opening the run says what is wrong with it"


def test_a_start_that_fails_leaves_no_folder(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(TaskTraining, "train", failing)
    command = ["fit", "--config", str(config), "--run_dir", str(run), "--logging.wandb=false"]
    assert main(command) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("clmerge fit: expected an image, got a.png")
    assert "--resume" not in told
    assert not run.exists()


def failing(self, results, task):
    raise OSError("expected an image, got a.png")


@pytest.fixture
def spoilt(config, tmp_path):
    """Arguments of a run on files two of which cannot be read, and the folder of the run."""
    for part, number in (("Train", 8), ("TEST", 3)):
        write_tree(tmp_path / "photos" / part, ["кот", "щит"], number)
    (tmp_path / "photos" / "Train" / "кот" / "image_3.png").write_bytes(b"")
    (tmp_path / "photos" / "TEST" / "щит" / "image_1.png").write_text("<html>")
    source = {
        "class_path": "ImageFolderSource",
        "init_args": {"root": str(tmp_path / "photos"), "templates": "generic"},
    }
    own = {"stream": {"class_path": "ClassIncremental", "init_args": {"source": source, "num_tasks": 2}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, allow_unicode=True))
    given = ["fit", "--config", str(config), "--config", str(tmp_path / "own.yaml"), "--run_dir", str(tmp_path / "run")]
    return [*given, "--logging.wandb=false", "--mergers=[MagMax]"], tmp_path / "run"


@pytest.mark.parametrize("flag", ["--check_data", "--check-data"])
def test_images_that_cannot_be_read_are_found_before_the_first_task(spoilt, flag, capsys):
    arguments, run = spoilt
    assert main([*arguments, flag]) == 1
    told = capsys.readouterr().err
    assert "Train/кот/image_3.png, got an empty file, in the training images of task 1, кот\n" in told
    assert "TEST/щит/image_1.png, got cannot identify image file" in told
    assert "clmerge fit: expected images that can be read, got 2 of 22 images that cannot: " in told
    assert "--skip_unreadable=true" in told
    assert not run.exists()


def test_an_unreadable_image_ends_a_run_with_one_line(spoilt, capsys):
    arguments, run = spoilt
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "TEST/щит/image_1.png, got cannot identify image file" in told
    assert "; --check_data finds all such images before a run" in told
    assert not run.exists(), "nothing was trained"


def test_a_run_that_met_an_unreadable_image_goes_on_when_it_is_mended(spoilt, capsys, monkeypatch):
    """The images of the second task are spoilt; one test image is, too, which a resume meets before it has trained."""
    arguments, run = spoilt
    photos = run.parent / "photos"
    sound = (photos / "Train" / "кот" / "image_1.png").read_bytes()
    (photos / "Train" / "кот" / "image_3.png").write_bytes(sound)
    late = [path for path in (photos / "Train" / "щит").iterdir() if path.name != "image_0.png"]
    for path in late:
        path.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "discard", lambda self: None)  # as where the process was killed
        assert main(arguments) == 1
    capsys.readouterr()
    resume = ["fit", "--resume", str(run)]
    assert main(resume) == 1
    told = capsys.readouterr().err
    assert "TEST/щит/image_1.png, got cannot identify image file" in told
    assert f"; resume with clmerge fit --resume {run}; --check_data finds" in told
    (photos / "TEST" / "щит" / "image_1.png").write_bytes(sound + b"mended")
    assert main(resume) == 1
    told = capsys.readouterr().err
    assert "Train/щит/image_" in told
    assert f"; what was trained is kept: resume with clmerge fit --resume {run}" in told
    for path in late:
        path.write_bytes(sound + b"mended, too")
    (photos / "TEST" / "щит" / "image_1.png").write_bytes(sound)
    assert main(resume) == 1
    assert "for task 2 (щит), got test images in files of other sizes" in capsys.readouterr().err
    (photos / "TEST" / "щит" / "image_1.png").write_bytes(sound + b"mended")
    assert main(resume) == 0
    assert json.loads((run / "manifest.json").read_text())["finished"]


def test_unreadable_images_are_left_out_of_a_run_and_of_its_comparison(spoilt, capsys, monkeypatch):
    arguments, run = spoilt
    assert main([*arguments, "--skip_unreadable=true"]) == 0
    told = capsys.readouterr()
    assert "leaving out 2 of 22 images, which cannot be read\n" in told.err
    lines = told.err.splitlines()
    assert lines[lines.index("photos-2: 2 classes in 2 tasks") :][1:5] == [
        "task  train  val  test  classes",
        "   1      6    1     3  1: кот",
        "   2      7    1     2  1: щит",
        " all     13    2     5",
    ]
    assert len(json.loads((run / "data_check.json").read_text())["unreadable"]) == 2
    results = record(run)
    assert results["samples"] == [3, 2]
    assert results["tasks"] == ["кот", "щит"]
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    assert main(["compare", str(run), "--mergers", "MagMax"]) == 0
    compared = record(run / "compare")
    assert without_times(compared)["models"]["magmax"] == without_times(results)["models"]["magmax"]


@pytest.mark.distributed
def test_two_processes_write_one_run(config, tmp_path):
    run = tmp_path / "run"
    found = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "clmerge", "fit", "--config", str(config), "--run_dir", str(run)),
            *("--trainer.devices=2", "--trainer.strategy=ddp"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    results = record(run)
    assert [len(row) for row in results["models"]["ties"]["task_agnostic"]["R"]] == [2, 2]
    assert found.stdout.count("results   ") == 1
