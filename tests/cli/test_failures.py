"""A foreseen failure is one message, any other a traceback; both end with where it was and how to go on."""

import json
import signal

import pytest
import torch
from PIL import Image
from support.tiny import tiny_clip

import clmerge.cli.fit
from clmerge.cli import main
from clmerge.cli.failures import is_foreseen
from clmerge.cli.signals import Stopped
from clmerge.merging import MagMax
from clmerge.training.module import ContinualClassifier

CONFIG = """
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [MagMax]
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(tmp_path / "clip")))
    return path


def fit(config, *options):
    return main(["fit", "--config", str(config), "--run_dir", str(config.parent / "run"), *options])


def test_a_loss_that_is_no_number_is_one_message_that_names_the_task(config, capsys, monkeypatch):
    loss = ContinualClassifier.loss
    second = lambda self, *a: loss(self, *a) * (torch.nan if len(self._seen_classes) > 5 else 1)  # noqa: E731
    monkeypatch.setattr(ContinualClassifier, "loss", second)
    assert fit(config) == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith(
        "clmerge fit: expected a finite loss in task 2/2 five-six-and-3, got nan in epoch 1, step 1"
    )
    assert message.endswith(f"resume with clmerge fit --resume {config.parent / 'run'}")
    monkeypatch.setattr(ContinualClassifier, "loss", loss)
    assert main(["fit", "--resume", str(config.parent / "run")]) == 0
    assert json.loads((config.parent / "run" / "manifest.json").read_text())["finished"]


def test_adams_moments_that_nobody_keeps_are_refused_before_training(config, capsys):
    mergers = "--mergers=[{class_path: Fisher, init_args: {statistic: adam}}]"
    assert fit(config, mergers, "--model.tuning=LoRA") == 1
    shown = capsys.readouterr().err
    assert "modes of tuning such as LoRA train other parameters in its place" in shown
    assert "epoch 1/1" not in shown
    assert "Traceback" not in shown


def test_unknown_templates_are_one_message_before_anything_is_written(config, capsys):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = config.parent / "insects" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "a.png")
    source = f"{{class_path: ImageFolderSource, init_args: {{root: {config.parent / 'insects'}, templates: insects}}}}"
    assert fit(config, "--stream.num_tasks=1", f"--stream.source={source}") == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert "templates" in message
    assert "generic" in message
    assert not (config.parent / "run").exists()


def broken(*args, **kwargs):
    raise LookupError("nobody thought of this")


def test_what_is_not_foreseen_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(clmerge.cli.fit, "main", broken)
    assert main(["fit"]) == 1
    shown = capsys.readouterr().err
    assert "LookupError: nobody thought of this" in shown
    assert shown.splitlines()[-1].startswith("clmerge fit: ended by LookupError, which is not foreseen")


@pytest.mark.parametrize("raised", [LookupError, ValueError, Stopped])
def test_nothing_that_a_failure_says_steers_a_terminal(capsys, monkeypatch, raised):
    def fail(argv):
        error = Stopped(signal.SIGTERM) if raised is Stopped else raised("of \x1b[31mred")
        error.hint = "resume with \x1b[31mred"
        error.add_note("in \x1b[31mred")
        raise error

    monkeypatch.setattr(clmerge.cli.fit, "main", fail)
    assert main(["fit"]) in (1, 128 + signal.SIGTERM)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown


def test_names_of_tensors_options_and_folders_steer_no_terminal(tmp_path, capsys):
    weights = {"\x1b[31mred": torch.ones(1), "b": torch.ones(1)}
    torch.save(weights, tmp_path / "\x1bbase.pt")
    torch.save(weights | {"more\x1b\n": torch.ones(2)}, tmp_path / "a.pt")
    files = ["--base", str(tmp_path / "\x1bbase.pt"), "--models", str(tmp_path / "a.pt"), "--merger", "MagMax"]
    assert main(["merge", *files, "--out", str(tmp_path / "\x1bout.safetensors")]) == 0
    with pytest.raises(SystemExit):
        main(["fit", "--resume", "run", "--\x1b[31mred=1"])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\\x1bout.safetensors" in printed.out
    assert "more\\x1b\\n" in printed.out + printed.err
    assert "--\\x1b[31mred" in printed.err


def test_a_process_whose_peer_has_ended_says_so_in_one_line(capsys, monkeypatch):
    def fail(argv):
        error = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:18305. GLHF!")
        error.add_note("in task 2 of 2")
        raise error

    monkeypatch.setattr(clmerge.cli.fit, "main", fail)
    assert main(["fit"]) == 1
    reason = "ended since another process of this run did, which says why unless it was killed"
    assert capsys.readouterr().err == f"clmerge fit: {reason}; in task 2 of 2\n"


def test_a_variable_shows_every_traceback(capsys, monkeypatch):
    monkeypatch.setenv("CLMERGE_DEBUG", "1")
    monkeypatch.setattr(clmerge.cli.fit, "main", lambda argv: MagMax(scale="no") and 0)
    monkeypatch.setattr(clmerge.cli.fit, "main", lambda argv: MagMax().compute())
    assert main(["fit"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("clmerge fit: expected")


def test_messages_are_those_of_clmerge_and_of_the_system():
    def error_of(call):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return caught.value

    assert is_foreseen(error_of(lambda: MagMax().compute()))
    assert is_foreseen(error_of(lambda: open("/nowhere/at/all")))  # noqa: PTH123, SIM115
    assert not is_foreseen(error_of(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not is_foreseen(error_of(lambda: int("x")))
    assert not is_foreseen(error_of(broken))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.accelerator=gpuu", "expected options under trainer that Lightning accepts here, got: "),
        ("--trainer.devices=0", "expected options under trainer that Lightning accepts here, got: "),
        ("--trainer.max_epochs=-3", "expected options under trainer that Lightning accepts here, got: "),
        ("--model.optimizer.lr=-1", "expected settings that the optimizer accepts, got: Invalid learning rate: -1"),
    ],
)
def test_settings_that_a_library_refuses_end_in_one_line(config, option, message, capsys):
    assert fit(config, option) == 1
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1]
    assert "Traceback" not in told
    assert not (config.parent / "run").exists()
