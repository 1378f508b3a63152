import pytest
from lightning.pytorch import Trainer

from clmerge.cli import main
from clmerge.results.run_folder import RunFolder
from clmerge.runs.trainers import Trainers, partial_lines, require_whole


def trainers(folder, **options):
    def build(**given):
        return Trainer(accelerator="cpu", **(options | given))

    return Trainers(build, RunFolder.create(folder), [], progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_test_batches": 1},
        {"limit_test_batches": 0.5},
        {"limit_test_batches": 0},
        {"limit_predict_batches": 3},
        {"overfit_batches": 1},
        {"overfit_batches": 0.1},
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
    ],
)
def test_what_would_cut_a_measurement_short_is_refused_with_the_reason(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"no trainer.{name}, got .*: .*, so the last|same few|one batch") as raised:
        require_whole(options)
    with pytest.raises(ValueError, match=name) as again:
        trainers(tmp_path / "run", **options).for_evaluation("")
    assert str(again.value) == str(raised.value)


def test_whole_sets_are_no_cuts(tmp_path):
    whole = {"limit_test_batches": 1.0, "limit_predict_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}
    for options in ({}, whole, dict.fromkeys(whole)):
        require_whole(options)
    trainers(tmp_path / "run", **whole).for_evaluation("")


def test_a_shorter_epoch_is_said_once(tmp_path, capsys):
    found = trainers(tmp_path / "run", limit_train_batches=3, limit_val_batches=0.5)
    for task in range(2):
        found.for_fit("task", 0, tmp_path / f"{task}.ckpt", [])
    told = capsys.readouterr().err
    assert told.count("trainer.limit_train_batches=3: an epoch trains on 3 batches at most\n") == 1
    assert told.count("trainer.limit_val_batches=0.5: an epoch validates on 50% of the batches\n") == 1
    assert partial_lines(Trainer(accelerator="cpu", limit_val_batches=0, logger=False)) == []


# 2, not 1: Python keeps one Optional[Union[int, float]] for both orders, so that what another library has imported
# decides whether "1" is a number of batches here. In a process of its own the command reads it as one.
@pytest.mark.parametrize("option", ["limit_test_batches=2", "fast_dev_run=true", "overfit_batches=2"])
def test_the_command_line_refuses_before_it_makes_a_folder(tmp_path, capsys, option):
    arguments = ["fit", "--config", "configs/quickstart.yaml", f"--trainer.{option}"]
    assert main([*arguments, "--run_dir", str(tmp_path / "run")]) == 1
    assert f"clmerge fit: expected no trainer.{option.partition('=')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
