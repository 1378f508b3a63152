"""Tasks that are left out of a merge, as if they had never been there."""

import pytest
import torch

from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import DARE, TIES, MagMax, RandomMix, WeightedAverage
from clmerge.weights import TaskVectorBank, apply_task_vector, fingerprint, load_tensors, save_tensors

NAMES = ["cats", "dogs", "birds", "1"]


@pytest.fixture
def bank(tmp_path):
    """A base, and a bank of four tasks; one is named like another's index."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (40, 30), "b": (7,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_tensors(tmp_path / "base.safetensors", base)
    taus = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in NAMES]
    stored = TaskVectorBank(tmp_path / "bank")
    for task, (name, tau) in enumerate(zip(NAMES, taus, strict=True)):
        stored.append(task, tau, name=name, base=fingerprint(base))
    return base, taus


def merge(folder, *arguments):
    command = ["merge", "--base", folder / "base.safetensors", "--models", folder / "bank", *arguments]
    return main([str(argument) for argument in command])


RULES = {
    "MagMax": ([], MagMax()),
    "TIES": ([], TIES()),
    "DARE": (["--merger.seed=3"], DARE(seed=3)),
    "RandomMix": ([], RandomMix()),
    "WeightedAverage": (
        ["--merger.by=given", "--merger.weights=[0.1,0.2,0.3,0.4]"],
        WeightedAverage("given", weights=[0.1, 0.2, 0.3, 0.4]),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_others_are_merged_with_their_own_indices(bank, tmp_path, rule):
    base, taus = bank
    settings, merger = RULES[rule]
    out = tmp_path / "out.safetensors"
    left_out = ["--without", "dogs", "0"]
    assert merge(tmp_path, "--merger", rule, *settings, *left_out, "--out", out) == 0
    for task in (2, 3):
        merger.update(taus[task], task=task)
    expected = apply_task_vector(base, merger.compute())
    found = load_tensors(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    differences, ledger = verify(out)
    assert (differences, ledger.without) == ([], ["dogs", "0"])


def test_a_name_goes_before_an_index(bank, tmp_path, capsys):
    assert merge(tmp_path, "--merger", "MagMax", "--without", "1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("task ")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["cows"], "expected one task 'cows' to leave out, got 0 of the tasks 0 (cats), 1 (dogs), 2 (birds), 3 (1)"),
        (["cats", "dogs", "2", "3"], "expected a task that is left, got all 4 to leave out"),
    ],
)
def test_what_cannot_be_left_out_is_refused(bank, tmp_path, capsys, without, message):
    assert merge(tmp_path, "--merger", "MagMax", "--without", *without, "--out", tmp_path / "out.safetensors") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_task_that_two_banks_share_is_named_and_can_be_dropped(bank, tmp_path, capsys):
    base, taus = bank
    other = TaskVectorBank(tmp_path / "other")
    other.append(0, taus[2], name="birds again", base=fingerprint(base))
    other.append(1, {name: tau + 1 for name, tau in taus[0].items()}, name="fish", base=fingerprint(base))
    both = ["--models", tmp_path / "bank", tmp_path / "other", "--merger", "MagMax"]
    assert merge(tmp_path, *both, "--dry-run") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("twice")]
    assert said == ["twice   task 4 is the same as task 2: it counts twice, --without 4 drops it"]
    assert merge(tmp_path, *both, "--without", "4", "--dry-run") == 0
    assert "twice" not in capsys.readouterr().out
    assert merge(tmp_path, "--models", tmp_path / "bank", tmp_path / "bank", "--merger", "MagMax", "--dry-run") == 0
    assert capsys.readouterr().out.count("\ntwice ") == 4
