"""The sweep file and the report that ship for W&B use options and metrics that exist."""

import importlib.util
import itertools
import warnings
from pathlib import Path

import pytest
import yaml
from made_up import make_results

from clmerge.cli.fit import build_parser, spread_lists
from clmerge.loggers import describe_run, task_metrics

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


@pytest.fixture
def report():
    with warnings.catch_warnings(action="ignore"):  # W&B's library uses what its own libraries deprecate
        pytest.importorskip("wandb_workspaces")
        spec = importlib.util.spec_from_file_location("wandb_report", ROOT / "scripts" / "wandb_report.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_report_shows_metrics_that_are_logged(report):
    results = make_results(2)
    logged = task_metrics(results).keys() | {"train/loss", "val/loss", "val/accuracy"}
    logged |= {f"cl_matrix/{model}" for model in results.models}
    shown = set()
    for panels in report.sections(results.models).values():
        for panel in panels:
            for field in ("y", "metrics", "media_keys"):
                shown |= {getattr(name, "name", name) for name in getattr(panel, field, None) or []}
    assert shown <= logged
    assert {f"cl_average_accuracy/{model}" for model in results.models} <= shown
    settings = describe_run({}, stream="s", num_tasks=2, mergers=["magmax"]).settings
    assert set(report.KEYS) <= settings.keys()


def test_the_view_groups_seeds_and_sorts_by_average_accuracy(report):
    view = report.build_view("me", "clmerge", ["magmax"])._to_model().model_dump_json(by_alias=True)
    assert '"grouping":[{"section":"run","name":"group"}]' in view
    assert '"section":"summary","name":"cl/average_accuracy"' in view


def test_the_project_must_be_named_with_its_entity(report, capsys):
    with pytest.raises(SystemExit):
        report.main(["clmerge", "--models", "magmax"])
    assert "ENTITY/PROJECT, got 'clmerge'" in capsys.readouterr().err
