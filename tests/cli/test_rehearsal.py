import tempfile

import pytest
from streams.tiny_layouts import write_tree
from support.tiny import tiny_clip

from clmerge.cli import main
from clmerge.cli.rehearsal import in_turn, shrink
from clmerge.streams import ClassIncremental, SklearnDigits

CONFIG = """
name: small
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model: {{backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}, loss_classes: seen}}
mergers: [MagMax, TIES]
data: {{batch_size: 20}}
trainer: {{max_epochs: 3, accelerator: cpu}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(tmp_path / "clip")))
    (tmp_path / "here").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    return path


def nothing_was_written(tmp_path):
    return [*(tmp_path / "here").iterdir(), *(tmp_path / "tmp").iterdir()] == []


def test_a_dry_run_says_what_the_run_would_be(config, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--dry_run"]) == 0
    told = capsys.readouterr().err.splitlines()
    said = {line.split(maxsplit=1)[0]: line for line in told}
    assert told[0] == "SklearnDigits-2: 10 classes in 2 tasks"
    assert said["backbone"].startswith("backbone  OpenClip, ")
    assert "ZeroShotHead, which knows all classes from their names; the loss is over seen classes" in said["head"]
    assert "magmax, ties; every task starts from previous, magmax is deployed" in said["mergers"]
    assert " MB a task vector, " in said["bytes"]
    assert said["device"] == "device    cpu, precision 32-true, 20 images a step"
    # 649 and 646 images in batches of 20, three epochs; two mergers and the expert
    assert f": {3 * (33 + 33)} steps of " in said["time"]
    assert "2 evaluations of 3 models on 359 images of " in said["time"]
    assert told[-1] == "nothing was written; leave --dry_run out to begin"
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.head=CosineHead"],
        ["--model.head=LinearHead", "--model.tuning=Frozen"],
        ["--model.regularizers=[EWC]", "--learner.epochs=[1,2]", "--trainer.accumulate_grad_batches=2"],
        ["--model.tuning=LoRA", "--stream.val_fraction=0"],
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=saved"],
    ],
    ids=lambda options: " ".join(options),
)
def test_a_dry_run_of_any_kind_of_run_writes_nothing(config, options, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--dry-run", *options]) == 0
    told = capsys.readouterr().err
    assert "\ntime      about " in told
    if "--model.tuning=Frozen" in options:
        assert "mergers   none: the backbone is frozen" in told
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize("options", [[], ["--model.head=CosineHead", "--learner.branches=2"], ["--mergers=GreedySoup"]])
def test_a_fast_run_goes_the_whole_path_and_leaves_nothing(config, options, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--fast_dev_run", *options]) == 0
    told = capsys.readouterr().err
    assert "fast_dev_run: 2 tasks were trained, merged, evaluated and saved in " in told
    assert nothing_was_written(tmp_path)


def test_what_fails_in_a_fast_run_is_one_sentence_and_leaves_nothing(config, tmp_path, capsys):
    for part, number in (("train", 4), ("test", 2)):
        write_tree(tmp_path / "pets" / part, ["cat", "dog"], number)
    for image in (tmp_path / "pets" / "test" / "dog").iterdir():
        image.write_bytes(b"x")
    source = ["--stream.source=ImageFolderSource", f"--stream.source.root={tmp_path / 'pets'}"]
    for option in ("--fast_dev_run", "--dry_run"):
        assert main(["fit", "--config", str(config), *source, option]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("clmerge fit: expected ")
        assert "test/dog/image_" in told
        assert "--resume" not in told
        assert nothing_was_written(tmp_path)


def test_a_rehearsal_is_of_a_new_run(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--resume", str(tmp_path), "--dry_run"])
    assert stop.value.code == 2
    assert "got --dry_run: the rest of a run's configuration is what the run is" in capsys.readouterr().err


def test_images_are_taken_from_all_classes_in_turn():
    assert in_turn([3, 3, 3, 5, 5, 7], 4) == [0, 1, 3, 5]
    assert in_turn([], 4) == []
    stream = ClassIncremental(SklearnDigits(), num_tasks=2)
    shrink(stream, 10)
    kept = stream.dataset(1, "train").targets
    assert sorted(kept) == sorted([5, 6, 7, 8, 9] * 2)
