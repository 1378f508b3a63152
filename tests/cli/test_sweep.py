import json

import pytest
from support.records import record
from support.tiny import tiny_clip

from clmerge.cli import main
from clmerge.cli.sweep import read_grids

CONFIG = """
name: swept
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model: {{backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}, optimizer: {{class_path: AdamW}}}}
mergers: [MagMax]
data: {{batch_size: 32}}
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip")))
    return path


@pytest.mark.slow
def test_seeds_and_settings_are_runs_that_the_report_reads(config, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--config", str(config), "--seeds", "0", "1"]
    grid = ["--grid", "learner.start_policy=base", "--out", str(out), "--launcher=local", "--launcher.jobs=2"]
    assert main(["sweep", *words, *grid]) == 0
    told = capsys.readouterr()
    runs = [out / f"start_policy-base_seed{seed}" for seed in range(2)]
    assert told.out == f"report    clmerge report {runs[0]} {runs[1]} --out {out}/report.html\n"
    assert "running 2 of 2 runs by LocalLauncher" in told.err
    assert [record(run)["seed"] for run in runs] == [0, 1]
    assert [json.loads((run / "manifest.json").read_text())["settings"]["start_policy"] for run in runs] == ["base"] * 2
    assert main(["report", *map(str, runs), "--format", "md"]) == 0
    assert "±" in capsys.readouterr().out
    before = {run: (run / "manifest.json").read_bytes() for run in runs}
    assert main(["sweep", *words, *grid]) == 0
    assert "running 0 of 2 runs" in capsys.readouterr().err
    assert before == {run: (run / "manifest.json").read_bytes() for run in runs}


def jobs_of(monkeypatch, code=0):
    """Let no job start; return those that would."""
    started = []

    def run(self, jobs):
        started.extend(jobs)
        yield from ((job, code) for job in jobs)

    monkeypatch.setattr("clmerge.runs.launching.LocalLauncher.run", run)
    return started


def test_fit_with_seeds_is_a_sweep(config, tmp_path, monkeypatch, capsys):
    started = jobs_of(monkeypatch)
    out = tmp_path / "out"
    assert main(["fit", "--config", str(config), "--seeds", "3", "4", "--run_dir", str(out)]) == 0
    assert [job.name for job in started] == ["seed3", "seed4"]
    assert started[0].command[1:4] == ("-m", "clmerge", "fit")
    own = ("--config", str(config), "--seed=3", f"--run_dir={out}/seed3", "--auto_resume")
    assert started[0].command[4:] == own


def test_a_run_that_fails_does_not_end_the_others(config, tmp_path, monkeypatch, capsys):
    jobs_of(monkeypatch, code=1)
    assert main(["sweep", "--config", str(config), "--seeds", "0", "1", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "failed seed1: 2 of 2" in told
    assert told.splitlines()[-1].startswith("clmerge sweep: 2 of 2 runs failed; the same command with --out")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--seed=1"], 2, "expected --seeds and --out in place of --seed=1"),
        (["--seeds", "1", "1"], 1, "expected seeds that differ, got [1, 1]"),
        (["--grid", "learner.start_policy"], 1, "expected --grid NAME=A,B once for every option"),
        (["--grid", "learner.start_policy=basis"], 2, "basis"),
        (["--lerner.start_policy=base"], 2, "did you mean --learner.start_policy"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(config, words, code, message, monkeypatch, capsys):
    assert not jobs_of(monkeypatch)
    try:
        found = main(["sweep", "--config", str(config), *words])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_an_option_has_one_list_of_values():
    with pytest.raises(ValueError, match=r"got 'seed=2'"):
        read_grids(["seed=1", "seed=2"])
