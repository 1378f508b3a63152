import re
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks.progress import EpochLines, EpochSeed, Pace, matrix_lines
from clmerge.merging import IsoC, MagMax


class Draws(Callback):
    """Draw a number in every training step; stop the run at the start of an epoch if told to."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.seen = {}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.stop_at:
            raise KeyError("killed")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(float(torch.rand(())))


class Logged(ForeignModule):
    def training_step(self, batch, batch_idx):
        self.log("train/loss", 0.25)
        self.log("other", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 0.75)


def fit(*callbacks, model=None, epochs=3, val=None, ckpt_path=None, bar=False, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model or ForeignModule(), toy_loader(0), val, ckpt_path=ckpt_path)
    return trainer


# EpochSeed ----------------------------------------------------------------------------------------------------


def drawn(seed, *callbacks, stop_at=None, before=0, **options):
    torch.manual_seed(before)
    draws = Draws(stop_at)
    try:
        fit(EpochSeed(seed), draws, *callbacks, **options)
    except KeyError:
        assert stop_at is not None
    return draws.seen


def test_every_epoch_draws_what_its_seed_and_number_say():
    seen = drawn(3)
    assert seen == drawn(3, before=99)
    for epoch, numbers in seen.items():
        torch.manual_seed(3 + epoch)
        assert numbers == [float(torch.rand(())) for _ in range(3)]
    assert len({numbers[0] for numbers in seen.values()}) == 3


def test_another_seed_draws_other_numbers():
    assert drawn(3)[0] != drawn(5)[0]


def test_a_resumed_run_draws_what_the_whole_run_drew(tmp_path):
    whole = drawn(3)
    first = drawn(3, ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False), stop_at=1)
    second = drawn(3, ModelCheckpoint(tmp_path, filename="last"), ckpt_path=tmp_path / "last.ckpt", before=7)
    assert list(second) == [1, 2]
    assert first | second == whole


def test_seeds_of_any_size_are_accepted():
    assert len(drawn(2**64 - 1, epochs=2)) == 2


# EpochLines ---------------------------------------------------------------------------------------------------


def test_a_line_per_epoch_goes_to_stderr(capsys):
    fit(EpochLines("task 1/5 cats"), model=Logged(), epochs=2, val=toy_loader(1))
    found = capsys.readouterr()
    lines = [line for line in found.err.splitlines() if line.startswith("task 1/5 cats")]
    pattern = r"task 1/5 cats: epoch {}/2  train/loss 0\.250  val/accuracy 0\.750  \d+\.\d s"
    assert len(lines) == 2
    for epoch, line in enumerate(lines, start=1):
        assert re.fullmatch(pattern.format(epoch), line)
    assert "task 1/5" not in found.out


def test_figures_that_nobody_logs_are_left_out(capsys):
    fit(EpochLines("cats"), epochs=1)
    assert re.search(r"^cats: epoch 1/1  \d+\.\d s$", capsys.readouterr().err, re.MULTILINE)


def test_a_fit_without_a_last_epoch_shows_none(capsys):
    fit(EpochLines("cats"), epochs=-1, max_steps=3)
    assert re.search(r"^cats: epoch 1  \d+\.\d s$", capsys.readouterr().err, re.MULTILINE)


def test_nothing_is_printed_beside_a_progress_bar(capsys):
    fit(EpochLines("task 1/5 cats"), bar=True, epochs=1)
    found = capsys.readouterr()
    assert "task 1/5" not in found.err + found.out


def test_only_one_process_prints(capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(EpochLines("task 1/5 cats"), epochs=1)
    assert "task 1/5" not in capsys.readouterr().err


def test_the_time_is_that_of_the_epoch(capsys, monkeypatch):
    now = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("clmerge.callbacks.progress.time", SimpleNamespace(perf_counter=lambda: next(now)))
    fit(EpochLines("cats"), epochs=2)
    assert re.findall(r"cats: .* (\d+\.\d) s", capsys.readouterr().err) == ["2.5", "1.0"]


def test_what_rules_take_for_a_matrix_is_said():
    model = ForeignModule()
    model.trained_names = [name for name, _ in model.named_parameters()]
    lines = matrix_lines(model, {"magmax": MagMax(), "iso_c": IsoC()})
    assert lines == ["iso_c: decomposes net.*.weight: (6, 4); net.*.weight: (3, 6)"]


def test_a_task_says_how_long_it_took_and_what_is_left():
    pace = Pace(4, {"train": 1.0, "evaluate": 2.0})
    seconds = {"train": 31.0, "evaluate": 12.0, "merge": 0.1}
    assert pace.line(1, seconds) == "task 2/4: train 30 s, evaluate 10 s; about 80 s left"
    assert pace.line(2, {**seconds, "train": 8000.0}) == "task 3/4: train 133 min; about 67 min left".replace(
        "133 min", "2 h 13 min"
    )
    assert pace.line(3, {**seconds, "train": 8000.0}) == "task 4/4: less than a second"
