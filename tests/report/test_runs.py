import json

import pytest
import torch
from support.run_folders import write_run

from clmerge.report.runs import read_runs
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.weights import TaskVectorBank, checksum
from clmerge.weights.factored import Product


def test_a_run_is_read_with_what_lies_beside_its_results(tmp_path):
    document = write_run(tmp_path / "run")
    (run,) = read_runs(tmp_path / "run")
    assert (run.name, run.results.seed, run.num_finished, run.is_finished) == ("run", 0, 3, True)
    assert run.results.to_dict() == document
    assert run.num_parameters == 23
    assert repr(run.rules["ties"].merger).startswith("TIES(density=0.1")


def test_parameters_that_are_stored_as_factors_count_in_full(tmp_path):
    write_run(tmp_path / "run", bank=False)
    factors = Product(torch.ones(1, 5), torch.ones(4, 1), 0.5)
    tau = {"a.weight": factors.dense(), "b": torch.ones(3)}
    TaskVectorBank(tmp_path / "run" / "bank").append(0, tau, factors={"a.weight": factors})
    assert read_runs(tmp_path / "run")[0].num_parameters == 23


def test_a_run_of_rules_from_elsewhere_has_no_rules_and_imports_nothing(tmp_path):
    from support.run_folders import config_of

    config = config_of(mergers=[{"class_path": "antigravity.Merger"}])
    write_run(tmp_path / "run", config=config)
    assert read_runs(tmp_path / "run")[0].rules == {}


def test_an_unfinished_run_is_one(tmp_path):
    write_run(tmp_path / "run", finished=2)
    (run,) = read_runs(tmp_path / "run")
    assert (run.num_finished, run.is_finished) == (2, False)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "results.json").write_text("{"), ValueError, "damaged.*--resume .* writes it anew"),
        (lambda folder: (folder / "results.json").write_text("[]"), ValueError, "a JSON object .*got list"),
        (lambda folder: (folder / "results.json").write_text('{"schema": 7}'), ValueError, "schema 2, got 7"),
        (lambda folder: (folder / "results.json").unlink(), FileNotFoundError, "not evaluated anything yet"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), ValueError, r"got .*config.yaml: .* at line \d"),
        (lambda folder: (folder / "config.yaml").write_text("!!python/object:a.B {}"), ValueError, "config.yaml"),
    ],
)
def test_damage_is_named_with_its_place_and_a_way_out(tmp_path, damage, error, message):
    write_run(tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(error, match=message):
        read_runs(tmp_path / "run")


@pytest.mark.parametrize("change", [{"models": 3}, {"tasks": None}, {"models": {"a": {"task_agnostic": 1}}}])
def test_results_of_another_shape_are_refused(tmp_path, change):
    document = write_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps({"schema": 2, "runs": [document | change]}))
    with pytest.raises(ValueError, match=r"expected the results of a run in .*results\.json"):
        read_runs(tmp_path / "run")


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_runs(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        read_runs(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        read_runs(tmp_path)
    write_run(tmp_path / "run", finished=0)
    with pytest.raises(ValueError, match="at least one finished task"):
        read_runs(tmp_path / "run")


def test_a_finished_run_that_was_evaluated_now_and_then_is_read(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    results = Results(["a", "b", "c"], classes=[["x"], ["y"], ["z"]])
    results.set_zero_shot([0.5] * 3, [0.5] * 3)
    for model in ("magmax", "expert"):
        results.add_skipped({model: 4})
        results.add_skipped({model: 4})
        results.add_row(model, [1.0] * 3, [1.0] * 3, bytes_kept=4)
    run.manifest.record(results)
    run.manifest.trained = run.manifest.evaluated = 3
    run.manifest.state = "state/task_002"
    run.manifest.finished = True
    run.commit()
    assert '"same"' in (run.path / "manifest.json").read_text()
    assert read_runs(run.path)[0].results.to_dict() == results.to_dict()


def test_what_a_run_has_committed_is_what_is_shown(tmp_path):
    run = tmp_path / "run"
    document = write_run(run)
    vector = run / "bank" / "task_001.safetensors"
    config = (run / "config.yaml").read_text()
    manifest = {
        "schema": 1,
        "finished": True,
        "results": document,
        "config": config,
        "files": {"bank/task_001.safetensors": checksum(vector)},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_runs(run)[0].results.to_dict() == document
    whole = vector.read_bytes()
    vector.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.raises(ValueError, match=f"expected {vector} as the run has committed it"):
        read_runs(run)
    vector.write_bytes(whole)
    (run / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    with pytest.raises(
        ValueError, match=r"config\.yaml as the run began with it, got 'seed: 1' where it had 'seed: 0'"
    ):
        read_runs(run)
    (run / "config.yaml").write_text(config)
    document["models"]["ties"]["task_agnostic"]["forgetting"] = 0.0
    (run / "results.json").write_text(json.dumps({"schema": 2, "runs": [document]}))
    with pytest.raises(ValueError, match=r"expected the results in .*results\.json that the run has committed"):
        read_runs(run)
