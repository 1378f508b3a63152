"""Probes and stream transforms in a run of fit: resumed, compared, evaluated again, logged."""

import json
import math
import re

import pytest
from support.records import record, without_times
from support.tiny import tiny_clip

from clmerge.cli import main
from clmerge.cli.open_run import open_run
from clmerge.evaluation.probes import Measured, WeightProbe
from clmerge.loggers.metrics import task_metrics
from clmerge.results.run_folder import RunFolder
from clmerge.runs.learner import Learner

CONFIG = """
name: probed
mergers: [TaskArithmetic, EMR]
transforms: [{class_path: Poisoned, init_args: {tasks: [0], ratio: 0.5}}]
model: {backbone: {class_path: OpenClip, init_args: {name: CLIP}}, loss_classes: all, optimizer: {class_path: AdamW}}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, source: {class_path: SklearnDigits}}}
learner: {probes: [{class_path: AttackSuccess, init_args: {tasks: [0]}}, CalibrationError]}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 4, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""
PROBES = ["attack_success", "calibration_error"]


class Distance(WeightProbe):
    """How far the merged parameters are from the base."""

    name = "distance"

    def measure(self, weights, base, occasion):
        assert weights.keys() == base.keys()
        return Measured(math.sqrt(sum(float((weights[key] - base[key]).square().sum()) for key in base)), n=len(base))


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    (folder / "config.yaml").write_text(CONFIG.replace("CLIP", tiny_clip(folder)))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def folder(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(config), "--run_dir", str(config.parent / "run")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return config.parent / "run"


def test_every_model_has_every_probe_with_its_curve(folder):
    models = record(folder)["models"]
    for name in ("task_arithmetic", "emr", "expert"):
        for probe in PROBES:
            found = models[name]["probes"][probe]
            assert len(found["curve"]) == 2
            assert found["curve"][-1] == found["value"]
            assert found["better"] == "lower"
    attacked = models["task_arithmetic"]["probes"]["attack_success"]
    assert attacked["share"] is True
    assert attacked["per_task"][1] is None
    assert attacked["n"][1] == 0
    assert 0 <= attacked["per_task"][0] <= 1
    assert len(models["zero_shot"]["probes"]["calibration_error"]["per_task"]) == 2


def test_the_poisoned_stream_is_that_of_the_opened_run(folder):
    run, _ = open_run(str(folder), name="run")
    assert run.stream.dataset(0, "train").targets.count(0) > run.stream.dataset(0, "train").targets.count(1) * 2


def test_compare_and_evaluate_find_the_same(folder, tmp_path, capsys):
    assert main(["compare", str(folder), "--probes", "CalibrationError", "--out", str(tmp_path / "c")]) == 0
    assert "calibration_error" in capsys.readouterr().out
    again = json.loads((tmp_path / "c" / "results.json").read_text())["runs"][0]["models"]
    own = record(folder)["models"]
    for name in ("task_arithmetic", "emr", "expert"):
        found, expected = (one[name]["probes"]["calibration_error"] for one in (again, own))
        assert found["per_task"] == pytest.approx(expected["per_task"])
        assert found["n"] == expected["n"]
    assert again["task_arithmetic"]["probes"]["calibration_error"]["curve"] == pytest.approx(
        own["task_arithmetic"]["probes"]["calibration_error"]["curve"]
    )
    assert main(["evaluate", str(folder), "--probes", "CalibrationError", "--out", str(tmp_path / "e")]) == 0
    assert "calibration_error" in capsys.readouterr().out
    evaluated = json.loads((tmp_path / "e" / "results.json").read_text())["runs"][0]["models"]
    value = evaluated["task_arithmetic"]["probes"]["calibration_error"]["value"]
    assert value == pytest.approx(own["task_arithmetic"]["probes"]["calibration_error"]["value"])


MARK = (
    "[{class_path: WatermarkBits, init_args: {key: mine, parameter: '*resblocks.0.mlp.c_fc.weight', random_keys: 1}}]"
)


def test_evaluate_and_compare_read_weights_alike(folder, config, tmp_path, capsys):
    found = {}
    for command, words in (("compare", ()), ("evaluate", ()), ("checkpoint", ("--backbone=OpenClip",))):
        target, name = str(folder), command
        if command == "checkpoint":
            clip = re.search(r"local-dir:[^}]+", config.read_text())[0]
            target, name = str(folder / "model" / "task_arithmetic.safetensors"), "evaluate"
            words = (*words, f"--backbone.name={clip}", "--stream=ClassIncremental", "--stream.source=SklearnDigits")
        out = tmp_path / command
        assert main([name, target, "--probes", MARK, "--out", str(out), *words]) == 0
        models = json.loads((out / "results.json").read_text())["runs"][0]["models"]
        probes = {model: one.get("probes", {}) for model, one in models.items()}
        name = "watermark_task_vector"
        found[command] = {model: one[name] for model, one in probes.items() if name in one}
    for model in ("task_arithmetic", "expert", "zero_shot"):
        ours, theirs = (found[command][model] for command in ("compare", "evaluate"))
        assert (ours["value"], ours["values"]) == (theirs["value"], theirs["values"])
    assert found["evaluate"]["zero_shot"]["value"] is None
    assert found["checkpoint"]["task_arithmetic"]["value"] == found["evaluate"]["task_arithmetic"]["value"]
    assert "emr" not in found["evaluate"]  # a view per task is no one set of weights


def test_probes_look_at_test_images_only(folder, capsys):
    assert main(["evaluate", str(folder), "--probes", "CalibrationError", "--split", "all"]) == 1
    assert "expected --split test with --probes" in capsys.readouterr().err


def test_a_resumed_run_has_the_probes_of_an_undisturbed_one(folder, config, tmp_path, monkeypatch):
    evaluate = Learner._evaluate

    def once(self, run, trainers, results, task):
        if task == 1 and not once.failed:
            once.failed = True
            raise KeyboardInterrupt
        evaluate(self, run, trainers, results, task)

    once.failed = False
    monkeypatch.setattr(Learner, "_evaluate", once)
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) != 0
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    assert main(["fit", "--resume", str(run)]) == 0
    assert without_times(record(run))["models"] == without_times(record(folder))["models"]


def test_probes_are_metrics(folder):
    run, _ = open_run(str(folder), name="run")
    metrics = task_metrics(run.results)
    assert "cl_probe_attack_success/task_arithmetic" in metrics
    assert any(name.startswith("cl_probe_calibration_error_task_arithmetic/") for name in metrics)
    first = task_metrics(run.results.until(1))
    curve = run.results.model("task_arithmetic").probes["attack_success"]["curve"]
    assert first["cl_probe_attack_success/task_arithmetic"] == curve[0]


def test_a_probe_of_weights_sees_dense_parameters(folder):
    run, _ = open_run(str(folder), name="run", merges_again=True)
    run.enter(1)
    probe = Distance()
    tau = run.bank[1]
    moved = {name: run.base[name] + tau[name] for name in run.base}
    from clmerge.deploy.predictors import Merged

    rows = run.evaluate_again(
        "", {"expert": Merged(run.expert(1))}, 1, probes=[probe], weights={"expert": lambda: moved}
    )
    expected = math.sqrt(sum(float(tensor.square().sum()) for tensor in tau.values()))
    assert rows["expert"]["probes"]["distance"].value == pytest.approx(expected, rel=1e-4)


def test_resuming_with_other_transforms_is_refused(folder):
    found = RunFolder.open(folder, writes=False)
    assert "Poisoned" in found.config.read_text()
