import pytest
import torch
from safetensors.torch import load_file, save_file

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.ledger import read_ledger
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import TaskArithmetic


def plus(state, number):
    return {name: tensor + number for name, tensor in state.items()}


def sets(theta, **numbers):
    """A file with several sets of weights, each told by what was added to the base."""
    return {"epoch": 3} | {name: plus(theta, number) for name, number in numbers.items()}


def read(path, weights=None):
    """Return which number was added to what is read."""
    return round(float(open_checkpoint(path, weights)["logit_scale"]), 3)


@pytest.mark.parametrize(
    ("numbers", "weights", "expected"),
    [
        ({"state_dict": 1, "state_dict_ema": 2}, None, 2),
        ({"state_dict_ema": 2, "state_dict": 1}, None, 2),
        ({"model": 1, "model_ema": 2}, None, 2),
        ({"state_dict": 1, "state_dict_ema": 2}, "state_dict", 1),
        ({"state_dict": 1, "teacher": 2}, None, 1),
        ({"state_dict": 1, "teacher": 2}, "teacher", 2),
        ({"net": 1, "teacher": 2}, "net", 1),
        ({"model_state_dict": 1}, None, 1),
        ({"state_dict": 1}, "state_dict_ema", 1),
    ],
)
def test_averaged_weights_come_first_and_any_set_may_be_named(numbers, weights, expected, theta, tmp_path):
    theta["logit_scale"] = torch.tensor(0.0)
    torch.save(sets(theta, **numbers), tmp_path / "all.pt")
    assert read(tmp_path / "all.pt", weights) == expected


def test_a_step_kept_as_a_tensor_is_no_state_dict(theta, tmp_path):
    torch.save({"step": torch.tensor(7), "state_dict": theta}, tmp_path / "all.pt")
    assert open_checkpoint(tmp_path / "all.pt").keys() == theta.keys()


def test_lightning_keeps_averaged_weights_as_the_state_dict(theta, tmp_path):
    theta["logit_scale"] = torch.tensor(0.0)
    content = {"pytorch-lightning_version": "2.6.6"} | sets(theta, state_dict=1, current_model_state=2)
    torch.save(content, tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt") == 1
    assert read(tmp_path / "last.ckpt", "current_model_state") == 2
    kind = open_checkpoint(tmp_path / "last.ckpt").kind
    assert kind == "Lightning checkpoint, under 'state_dict' (there are also 'current_model_state')"


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_set_may_be_the_first_part_of_names(kind, theta, tmp_path):
    theta["logit_scale"] = torch.tensor(0.0)
    both = {
        f"{name}.module.{key}": value
        for name, number in (("net", 1), ("ema_net", 2))
        for key, value in plus(theta, number).items()
    }
    path = tmp_path / f"both.{kind}"
    save_file(both, path) if kind == "safetensors" else torch.save({"state_dict": both}, path)
    assert read(path, "net") == 1
    assert read(path, "ema_net") == 2
    assert len(open_checkpoint(path, "ema_net").left_out) == len(theta)


def test_a_set_that_is_not_there_is_named_with_those_that_are(theta, tmp_path):
    torch.save(sets(theta, state_dict=1, teacher=2), tmp_path / "all.pt")
    with pytest.raises(ValueError, match=r"all\.pt holds, got 'techer'; there are 'state_dict', 'teacher'"):
        open_checkpoint(tmp_path / "all.pt", "techer")
    torch.save(sets(theta, net=1, teacher=2), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected a state dict in .*other\.pt.*; choose one with --weights net"):
        open_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(("weights", "number"), [(None, 2.0), ("state_dict", 1.0)])
def test_the_choice_is_printed_and_in_the_ledger(weights, number, theta, base, tmp_path, capsys):
    model, out = tmp_path / "model.pth", tmp_path / "out.safetensors"
    torch.save(sets(theta, state_dict=1, state_dict_ema=2), model)
    command = ["merge", "--base", str(base), "--models", str(model), "--merger", "TaskArithmetic", "--out", str(out)]
    assert main([*command, *([] if weights is None else ["--weights", weights])]) == 0
    read, other = ("state_dict_ema", "state_dict") if weights is None else ("state_dict", "state_dict_ema")
    assert f"torch.save, under '{read}' (there are also '{other}')" in capsys.readouterr().out
    ledger = read_ledger(out)
    assert ledger.weights == weights
    assert {file.path: file.weights for file in ledger.files} == {str(base): "", str(model): read}
    merger = TaskArithmetic()
    torch.testing.assert_close(load_file(out)["net.0.bias"], theta["net.0.bias"] + merger.scale * number)
    assert verify(out)[0] == []


def test_weights_that_no_input_has_are_refused(base, models, tmp_path):
    save_file(models[0], tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected a checkpoint that holds weights 'ema', got none"):
        CheckpointMerge(base, models=[tmp_path / "a.safetensors"], merger=TaskArithmetic(), weights="ema")


def test_another_choice_than_the_ledgers_is_found(theta, base, tmp_path, monkeypatch):
    torch.save(sets(theta, state_dict=1, state_dict_ema=2), tmp_path / "model.pth")
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=[tmp_path / "model.pth"], merger=TaskArithmetic()).run(out)
    monkeypatch.setattr("clmerge.checkpoints.choice.KNOWN", ("state_dict",))
    assert any("which is now read as 'state_dict'" in line for line in verify(out)[0])
