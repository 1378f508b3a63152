"""The sweep file and the report that ship for W&B use options and metrics that exist."""

import importlib.util
import itertools
import json
import warnings
from pathlib import Path

import pytest
import yaml
from made_up import answer, make_results
from wandb_reader import find_runs

from clmerge.cli import main
from clmerge.cli.fit import build_parser, spread_lists
from clmerge.cli.run_loggers import Logging, build_loggers
from clmerge.loggers import describe_run, finish_loggers, log_summary, log_task, task_metrics
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def test_every_combination_of_the_sweep_is_a_valid_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((ROOT / "configs" / "wandb" / "sweep.yaml").read_text())
    assert sweep["metric"]["name"] in task_metrics(make_results(2))
    program, command, *given, macro = sweep["command"]
    assert (program, command, macro) == ("clmerge", "fit", "${args}")
    values = {name: parameter["values"] for name, parameter in sweep["parameters"].items()}
    parser = build_parser()
    found = []
    for combination in itertools.product(*values.values()):
        arguments = [f"--{name}={value}" for name, value in zip(values, combination, strict=True)]
        config = parser.parse_args(spread_lists([*given, *arguments]))
        found.append((config.learner.start_policy, config.model.optimizer.init_args.lr, config.seed))
    assert found == list(itertools.product(*values.values()))


def test_every_method_of_the_sweep_over_methods_is_a_group_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((ROOT / "configs" / "wandb" / "methods.yaml").read_text())
    *_, option, base, _ = sweep["command"]
    methods, parser = sweep["parameters"]["config"]["values"], build_parser()
    groups = []
    for method, seed in itertools.product(methods, (0, 1)):
        config = parser.parse_args([option, base, f"--config={method}", f"--seed={seed}"])
        mergers = [merger.class_path.rpartition(".")[2].lower() for merger in config.mergers]
        groups.append(describe_run(config.as_dict(), stream="digits", num_tasks=5, mergers=mergers).group)
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == len(methods)
    assert [group.split()[0] for group in groups[::2]] == [Path(method).stem for method in methods]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("wandb_report", ROOT / "scripts" / "wandb_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METHODS = {"MagMax": "previous", "TIES": "base"}
CONFIG = {
    "name": "sweep",
    "stream": {
        "class_path": "ClassIncremental",
        "init_args": {"num_tasks": 2, "source": {"class_path": "SklearnDigits", "init_args": {"test_fraction": 0.1}}},
    },
    "model": {"backbone": "OpenClip", "loss_classes": "all"},
    "data": {"batch_size": 64},
    "logging": {"csv": False, "project": "sweeps"},
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
    },
}


def fit(folder, merger, start, seed):
    """Train a run; return its results."""
    config = {**CONFIG, "seed": seed, "mergers": [merger], "learner": {"start_policy": start}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return Results.from_dict(json.loads((folder / "run" / "results.json").read_text())["runs"][0])


def tell(folder, merger, start, seed):
    """Tell W&B made-up results as a run does; return them."""
    model = {"backbone": {"class_path": "OpenClip"}}
    config = {**CONFIG, "model": model, "seed": seed, "mergers": [{"class_path": merger}]}
    config["learner"] = {"start_policy": start}
    facts = describe_run(config, stream="SklearnDigits-2", num_tasks=2, mergers=[merger.lower()])
    options = Logging(csv=False, project="sweeps")
    loggers = build_loggers(options, [], facts, RunFolder.create(folder / "run"))
    results = answer(make_results(2, (merger.lower(), "expert")))
    loggers[0].log_metrics({"train/loss": 0.5, "val/loss": 0.4, "val/accuracy": 0.9}, step=2)
    for task in range(2):
        log_task(loggers, results, task)
    log_summary(loggers, results)
    finish_loggers(loggers)
    return results


@pytest.mark.parametrize("make", [tell, pytest.param(fit, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_a_sweep_of_methods_and_seeds_makes_one_page_that_is_right(make, wandb_home, report):
    """Four offline runs, two methods by two seeds, read back from W&B's files."""
    expected = {}
    for (merger, start), seed in itertools.product(METHODS.items(), (0, 1)):
        folder = wandb_home / f"{merger}-{seed}"
        folder.mkdir()
        expected[merger.lower(), seed] = make(folder, merger, start, seed)
    found = {(run.config["method"], run.config["seed"]): run for run in find_runs(wandb_home)}
    assert found.keys() == expected.keys()

    groups = {}
    for (method, seed), run in found.items():
        groups.setdefault(run.run.run_group, []).append((method, seed))
        start = METHODS["MagMax" if method == "magmax" else "TIES"]
        assert run.run.display_name == f"sweep {method} full {start} s{seed}"
        assert (run.run.job_type, run.run.project, list(run.run.tags)[-1]) == ("fit", "sweeps", method)
        assert tuple(key for key in report.KEYS if key in run.config) == report.KEYS
        assert (run.config["start_policy"], run.config["stream"]) == (start, "SklearnDigits-2")
    assert sorted(map(sorted, groups.values())) == [[(m, 0), (m, 1)] for m in ("magmax", "ties")], "seeds, not methods"

    for key, results in expected.items():
        run, models = found[key], [*results.mergers, "expert", "zero_shot"]
        for name, value in task_metrics(results).items():
            assert run.summary[name] == pytest.approx(value, rel=1e-12), name
        assert run.summary["cl/deployed"] == key[0]
        assert {*report.COLUMNS, report.SORTED_BY} <= run.summary.keys()
        logged = {name.removesuffix("/path") for row in run.history for name in row}
        panels = [each for section in report.sections(models).values() for each in section]
        confusions = {f"cl_confusion/{model}" for model in models if results.confusion(model) is None}
        shown = {name for _, _, names in panels for name in names}
        assert shown - confusions <= logged, "the template names what is there"
        assert {f"cl_average_accuracy/{model}" for model in models} <= shown
        assert run.step_metric("cl/average_accuracy") == report.TASK_KEY
        assert run.step_metric("*") == report.STEP
    if make is fit:  # a comparison is in the group of its run, and is no fit
        run = wandb_home / "MagMax-0" / "run"
        assert main(["compare", str(run), "--mergers", "TaskArithmetic", "--wandb"]) == 0
        (compared,) = find_runs(run / "compare")
        assert (compared.run.run_group, compared.run.job_type) == (found["magmax", 0].run.run_group, "compare")


@pytest.mark.peers
def test_the_report_and_the_view_are_built_as_wandb_wants_them(report):
    with warnings.catch_warnings(action="ignore"):  # W&B's library uses what its own libraries deprecate
        pytest.importorskip("wandb_workspaces")
        view = report.build_view("me", "clmerge", ["magmax"])._to_model().model_dump_json(by_alias=True)
        page = report.build_report("me", "clmerge", ["magmax", "zero_shot"])
    assert '"grouping":[{"section":"run","name":"group"}]' in view
    assert '"section":"summary","name":"cl/average_accuracy"' in view
    assert '{"section":"run","name":"jobType"},"op":"=","value":"fit"' in view, "comparisons would count twice"
    grids = [block for block in page.blocks if hasattr(block, "runsets")]
    assert len(grids) == len(report.sections(["magmax"]))
    assert {(grid.runsets[0].filters, *grid.runsets[0].groupby) for grid in grids} == {(report.FITS, "Group")}
    assert [panel.media_keys for panel in grids[2].panels] == [["cl_matrix/magmax"]]


def test_the_project_must_be_named_with_its_entity(report, capsys):
    with pytest.raises(SystemExit):
        report.main(["clmerge", "--models", "magmax"])
    assert "ENTITY/PROJECT, got 'clmerge'" in capsys.readouterr().err
