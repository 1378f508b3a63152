"""Every script in examples/ runs as its docstring says."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs.test_learner import make_learner
from runs.test_learner import run as fit
from support.tiny import tiny_clip

from clmerge import load_run
from clmerge.merging import TIES, MagMax
from clmerge.weights import apply_task_vector, load_tensors, save_tensors, task_vector

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_two_checkpoints_are_merged(tmp_path, monkeypatch):
    states = [{"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    counted = [{**state, "steps": torch.tensor(seed)} for seed, state in enumerate(states)]
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file, state in zip(files, counted, strict=False):
        save_tensors(file, state)
    run("merge_two_checkpoints.py", *files, monkeypatch=monkeypatch)
    merger = TIES(density=0.2, scale=1.0)
    for state in states[1:]:
        merger.update(task_vector(state, states[0]))
    expected = apply_task_vector(states[0], merger.compute())
    found = load_tensors(files[3])
    assert torch.equal(found["w"], expected["w"])
    assert found["steps"] == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_callback_merges_in_a_project(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run("callback_in_your_project.py", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["after task 1", "after task 2", "after task 3"]
    assert lines[3] == "merged 3 tasks; 4 tensors to save"


def test_a_run_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    learner = make_learner(tiny_clip(tmp_path / "clip"), [MagMax()], num_tasks=2)
    fit(learner, tmp_path / "run")
    run("read_a_run.py", tmp_path / "run", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.startswith("2 tasks, models magmax, expert, zero_shot\nmagmax ")
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_run(tmp_path / "run")
    base, merged = loaded.base(), learner.merge.merged_state()
    assert all(torch.equal(base[name], tensor) for name, tensor in learner.merge.base.items())
    assert len(loaded.task_vectors) == 2
    state = loaded.state_dict("magmax")
    assert all(torch.equal(state[name.removeprefix("backbone.model.")], merged[name]) for name in merged)
    records = loaded.accuracies()
    assert len(records) == 3 * 2 * 2 * 2
    R = loaded.matrix("magmax")
    first = next(r for r in records if r["model"] == "magmax" and r["setting"] == "task_agnostic")
    assert first["accuracy"] == R[0, 0]
    figures = next(r for r in loaded.figures() if r["model"] == "magmax")
    assert figures["last"] == pytest.approx(R[1].mean())
    assert math.isclose(figures["forgetting"], R[0, 0] - R[1, 0])
    with pytest.raises(ValueError, match=r"expected one of the mergers \['magmax'\] of a finished run, got 'ties'"):
        loaded.state_dict("ties")
    with pytest.raises(ValueError, match="got 'accuracy'"):
        loaded.plot("accuracy")
    assert loaded.plot("magmax").axes
    with pytest.raises(FileNotFoundError):
        load_run(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_learning_rate_is_found(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "quickstart.yaml"
    run("find_learning_rate.py", config, "--steps", 40, "--picture", "rates.png", monkeypatch=monkeypatch)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == "40 steps are 4.4 epochs of zero-one"
    loss, rate, tenth = map(float, re.findall(r"\d+\.\d+(?:e-\d+)?", second))
    assert 1e-5 < rate < 1.0
    assert tenth == pytest.approx(rate / 10)
    assert loss < 0.6931, "no better than a guess between two classes"
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]


def test_a_rule_of_ones_own_is_registered():
    command = [sys.executable, str(EXAMPLES / "own_rule.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0].startswith("Median3(scale=1.0) [1.0, ")


def test_every_example_has_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
