"""Files of schema 1, as the last version before schema 2 wrote them, are read again after their conversion."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support.run_folders import write_run

from clmerge.report import read_study
from clmerge.report.runs import read_runs
from clmerge.results.run_manifest import read_manifest

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_results.py"


def convert(*folders, monkeypatch):
    specification = importlib.util.spec_from_file_location("convert_results", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["convert_results.py", *map(str, folders)])
    module.main()


def old_run(folder):
    """Rewrite a made-up run's files as schema 1 had them; return the new record."""
    new = write_run(folder)
    figures = ("task_agnostic", "task_aware")
    models = {name: {setting: model[setting] for setting in figures} for name, model in new["models"].items()}
    for model in models.values():
        for setting in figures:
            del model[setting]["worst_task"], model[setting]["gap_to_experts"]
    kept = ("evaluation", "tasks", "classes", "samples", "baseline", "seconds", "bytes")
    old = {"schema": 1, **{key: new[key] for key in kept}, "models": models}
    (folder / "results.json").write_text(json.dumps(old))
    manifest = {"schema": 1, "finished": True, "trained": 3, "evaluated": 3, "state": "state/task_002", "results": old}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return json.loads(json.dumps(old))


def test_a_run_is_read_again(tmp_path, monkeypatch, capsys):
    old = old_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"schema 2, got 1; .*convert_results\.py RUN converts"):
        read_runs(tmp_path / "run")
    with pytest.raises(ValueError, match=r"got 1: an older version .* python scripts/convert_results\.py"):
        read_manifest(tmp_path / "run" / "manifest.json")
    convert(tmp_path / "run", monkeypatch=monkeypatch)
    assert "converted" in capsys.readouterr().out
    (run,) = read_runs(tmp_path / "run")
    assert read_manifest(tmp_path / "run" / "manifest.json").results["name"] == "run"
    found = run.results.to_dict()
    for name, model in old["models"].items():
        for setting, figures in model.items():
            assert {key: found["models"][name][setting][key] for key in figures} == figures
    assert found["models"]["magmax"]["rule"]["init_args"] == {"scale": 0.5}
    with pytest.raises(SystemExit, match="expected results with schema 1"):
        convert(tmp_path / "run", monkeypatch=monkeypatch)


def test_a_comparison_of_two_runs_is_read_again(tmp_path, monkeypatch):
    olds = [old_run(tmp_path / f"run{i}") for i in range(2)]
    models = {f"{name}@run{i}": model for i, old in enumerate(olds) for name, model in old["models"].items()}
    searches = [
        {
            "model": f"magmax@run{i}",
            "run": f"run{i}",
            "merger": "MagMax",
            "method": "grid",
            "parameters": {"scale": [0.5]},
            "points": [{"values": {"scale": 0.5}, "accuracy": [0.5] * 3, "score": 0.5}],
            "chosen": {"scale": 0.5},
            "score": 0.5,
            "rule": None,
        }
        for i in range(2)
    ]
    compare = {
        "schema": 1,
        "runs": [
            {"name": f"run{i}", "path": str(tmp_path / f"run{i}"), "group": "", "seed": i, "tasks": olds[i]["tasks"]}
            for i in range(2)
        ],
        "settings": {
            f"magmax@run{i}": {"merger": "MagMax", "init_args": {"scale": 0.5}, "search": i} for i in range(2)
        },
        "bytes_kept": {"magmax@run0": [92] * 3, "magmax@run1": [92] * 3},
        "merge_seconds": {"magmax@run1": [0.1] * 3},
        "searches": searches,
        "orders": None,
        "diagnostics": {"run": "run1", "tasks": olds[0]["tasks"]},
    }
    document = {**olds[0], "models": models, "baseline": None, "compare": compare}
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "results.json").write_text(json.dumps(document))
    convert(tmp_path / "compare", monkeypatch=monkeypatch)
    runs = read_runs(tmp_path / "compare")
    assert [(run.name, run.results.seed, run.tuned) for run in runs] == [
        ("run0", 0, {"magmax"}),
        ("run1", 1, {"magmax"}),
    ]
    assert runs[0].results.model("magmax").data == "val"
    assert runs[0].results.model("magmax").bytes_kept == [92] * 3
    assert [run.results.diagnostics is None for run in runs] == [True, False]
    magmax = next(entry for entry in read_study([tmp_path / "compare"]).mergers if entry.model == "magmax")
    assert len(magmax.runs) == 2
