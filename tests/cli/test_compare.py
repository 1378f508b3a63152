import contextlib
import gc
import json
import shutil
import signal

import pytest
import torch
from support.locks import end, other_process
from support.records import record, without_times
from support.tiny import tiny_clip
from wandb_reader import find_runs

from clmerge.cli import main
from clmerge.cli.open_run import open_run
from clmerge.deploy.calibration import CalibratedModels
from clmerge.deploy.predictors import Merged
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import WeightAverage
from clmerge.report import read_study
from clmerge.report.diagnostics import diagnostic_figures
from clmerge.report.figures import common_figures
from clmerge.report.fronts import fronts_of
from clmerge.results.results import Results, validate
from clmerge.runs.stored_run import StoredRun
from clmerge.weights import TaskVectorBank, load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = """
name: small
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 3}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  head: {head}
  loss_classes: {loss}
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers:
- MagMax
- TIES
- RandomMix
- Fisher
- RegMean
- FedNova
- {{class_path: WeightedAverage, init_args: {{by: loss}}}}
- PAINT
- EMR
- TALL
data: {{batch_size: 64}}
learner: {{statistics_images: 16}}
trainer: {{max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, limit_train_batches: 6, limit_val_batches: 1}}
logging: {{wandb: false, csv: false}}
"""


def make_run(folder, *arguments, head="ZeroShotHead", loss="seen"):
    (folder / "config.yaml").write_text(CONFIG.format(backbone=tiny_clip(folder / "clip"), head=head, loss=loss))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        run = folder / "run"
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(run), *arguments]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run to write into."""
    return shutil.copytree(finished, tmp_path / "run")


def compare(*arguments):
    assert main(["compare", *map(str, arguments)]) == 0


def document(folder):
    found = json.loads((folder / "results.json").read_text())
    validate(found)
    return found["runs"][0]


def alike(one, other):
    """Whether two models of results were computed alike."""
    assert {**one, "merge_seconds": None} == {**other, "merge_seconds": None}
    return True


def test_models_that_fit_evaluated_come_out_with_the_same_bits(run, capsys):
    """Also those whose statistics, scores and counts are taken anew; without --mergers they are the run's own."""
    compare(run)
    fitted = record(run)
    found = document(run / "compare")
    assert len(fitted["models"]) == 12
    for model, figures in fitted["models"].items():
        assert alike(found["models"][model], figures), model
    assert fitted["models"]["fisher"] != fitted["models"]["regmean"]
    assert {"task_agnostic", "task_aware"} == fitted["models"]["magmax"]["confusion"].keys()
    ensemble = Results.from_dict(found).confusion("ensemble", "task_agnostic")
    assert sum(ensemble.images) == sum(found["samples"])
    last = found["models"]["ensemble"]["task_agnostic"]["R"][-1]
    assert sum(ensemble.right) == pytest.approx(sum(a * n for a, n in zip(last, found["samples"], strict=True)))
    shown = capsys.readouterr()
    assert "magmax" in shown.out
    assert "task 2/3: 10 models, test images" in shown.err


@pytest.mark.parametrize("buffers", ["mean", "base", "re-estimated"])
def test_growing_heads_and_running_statistics_are_those_of_their_task(tmp_path, buffers):
    arguments = ["--mergers", "MagMax", "Fisher", "PAINT", f"--learner.buffers={buffers}"]
    run = make_run(tmp_path, *arguments, "--model.backbone=support.toy_backbone.Normed", head="CosineHead")
    kept = [load_tensors(run / "unmerged" / f"task_{task:03d}.safetensors") for task in (0, 2)]
    assert len(kept[0]["head.known"]) < len(kept[1]["head.known"])
    assert not torch.equal(*(state["backbone.model.2.running_mean"] for state in kept))
    compare(run, "--mergers", "PAINT", "Fisher", "MagMax", "--allow", "support")
    fitted, found = record(run), document(run / "compare")
    for model in ("magmax", "fisher", "paint", "expert"):
        assert alike(found["models"][model], fitted["models"][model])
    assert found["baseline"] is None
    rows = found["models"]["ensemble"]["task_agnostic"]["R"]
    assert [[value is None for value in row] for row in rows] == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]


@pytest.mark.parametrize("mode", ["LoRA", "Linearized"])
def test_every_mode_of_tuning_is_evaluated_as_it_was_trained(tmp_path, mode):
    run = make_run(tmp_path, "--mergers", "TIES", "Fisher", f"--model.tuning={mode}")
    compare(run)
    fitted, found = record(run), document(run / "compare")
    for model in ("ties", "fisher", "expert", "zero_shot"):
        assert alike(found["models"][model], fitted["models"][model])


CALIBRATIONS = (
    "[{class_path: SampleTuning, init_args: {per_class: 2, epochs: 1}}, HeadAlignment, "
    "{class_path: Repair, init_args: {adaptation: {source: buffer, per_class: 4}}}, "
    "HeadRotation, {class_path: Surgery, init_args: {steps: 2}}, "
    "{class_path: Surgery, init_args: {steps: 2, deep: true, routed: false}}]"
)


NAMES = ("tuned", "aligned", "repaired", "rotated", "surgery", "surgery2_told")


@pytest.mark.parametrize("mode", ["Full", "LoRA"])
def test_models_that_fit_calibrated_come_out_with_the_same_bits(tmp_path, mode, monkeypatch):
    arguments = ["--mergers", "MagMax", "WeightAverage", "EMR", f"--model.tuning={mode}"]
    run = make_run(tmp_path, *arguments, f"--learner.calibrations={CALIBRATIONS}", head="LinearHead")
    compare(run, "--mergers", "WeightAverage", "MagMax", "EMR", f"--calibrations={CALIBRATIONS}")
    fitted, found = record(run), document(run / "compare")
    models = [f"{merger}+{name}" for merger in ("magmax", "weight_average") for name in NAMES]
    for model in ("magmax", *models):
        assert alike(found["models"][model], fitted["models"][model]), model
        assert None not in found["models"][model]["merge_seconds"]
    assert [name for name in found["models"] if "+" in name] == [*models[len(NAMES) :], *models[: len(NAMES)]]
    assert found["models"]["magmax+tuned"]["data"] == "buffer(2 per class)"
    assert found["models"]["magmax+repaired"]["data"] == "buffer(4 per class, unlabelled)"
    rows = fitted["models"]["magmax+tuned"]["task_agnostic"]["R"]
    assert rows != fitted["models"]["magmax"]["task_agnostic"]["R"]

    # What is in the cache is not calibrated again; a setting more is another row.
    seen = []
    collect = CalibratedModels.collect

    def counting(self, merged, task, *rest, **more):
        seen.append((*merged, *self.calibrations, task))
        return collect(self, merged, task, *rest, **more)

    monkeypatch.setattr(CalibratedModels, "collect", counting)
    compare(run, "--mergers", "WeightAverage", "MagMax", "EMR", f"--calibrations={CALIBRATIONS}")
    assert not seen
    compare(run, "--mergers", "WeightAverage", "--calibrations=[HeadAlignment]", "--calibrations.epochs=2")
    assert seen == [("weight_average", "aligned", task) for task in range(3)]


def test_calibrations_that_a_run_cannot_have_are_refused(run, capsys):
    for arguments, message in (
        (["--calibrations=[HeadAlignment]"], "a head that learns its classes for HeadAlignment, got ZeroShotHead"),
        (["--calibrations=[SampleTuning]", "--without", "0"], "expected --calibrations, which keep data of all tasks"),
    ):
        assert main(["compare", str(run), "--mergers", "MagMax", *arguments]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_document_has_what_its_page_says(run):
    compare(run, "--mergers", "MagMax", "OPCM", "--scale", "0.3:0.9:0.3", "--orders", "3", "--scale-rule")
    found = document(run / "compare")
    models = [
        "magmax",
        "opcm",
        "magmax_scale-rule",
        "opcm_scale-rule",
        "expert",
        "task_oracle",
        "ensemble",
        "zero_shot",
    ]
    assert list(found["models"]) == models
    results = Results.from_dict(found)
    assert {model for model in models if results.model(model).rule} == set(models[:4])
    assert all(None not in results.model(model).bytes_kept for model in models)
    assert {model for model in models if None not in results.model(model).merge_seconds} == set(models[:4])
    assert {results.model(model).data for model in models[:4]} == {"val"}
    assert [results.model(model).kind for model in models[4:]] == ["unmerged", "per_task", "ensemble", "unmerged"]
    sizes = [path.stat().st_size for path in sorted((run / "bank").iterdir())]
    assert results.model("task_oracle").bytes_kept == [sum(sizes[:t]) for t in (1, 2, 3)]
    num_parameters = sum(map(torch.numel, TaskVectorBank(run / "bank")[0].values()))
    assert results.model("magmax").bytes_kept == [4 * num_parameters] * 3
    assert results.best_merger() in models[:4]
    for model in models:
        R, expert = results.matrix(model), results.matrix("expert").diagonal()
        own = results.figures(model)
        assert own["worst_task"][-1] == pytest.approx(min(R[-1]), nan_ok=True)
        assert own["gap_to_experts"][1] == pytest.approx((expert[:2] - R[1, :2]).mean(), nan_ok=True)
    oracle = results.matrix("task_oracle", "task_aware")
    assert oracle[-1].tolist() == results.matrix("expert", "task_aware").diagonal().tolist()
    assert found["models"]["task_oracle"]["task_agnostic"] is None  # it needs the task of every image

    search = found["searches"][0]
    assert [point["values"] for point in search["points"]] == [{"scale": 0.3}, {"scale": 0.6}, {"scale": 0.9}]
    best = max(search["points"], key=lambda point: point["score"])
    assert search["chosen"] == best["values"]
    assert found["models"]["magmax"]["rule"]["init_args"]["scale"] == best["values"]["scale"]
    assert search["rule"]["used"][1] == search["rule"]["chosen"][0]
    orders = found["orders"]["models"]
    assert (orders["magmax"]["order_free"], len(orders["magmax"]["permutations"])) == (True, 1)
    assert (orders["opcm"]["order_free"], len(orders["opcm"]["permutations"])) == (False, 3)
    assert orders["opcm"]["task_agnostic"]["accuracy"][0] == found["models"]["opcm"]["task_agnostic"]["R"][-1]


def test_a_comparison_that_was_interrupted_goes_on(run, monkeypatch, capsys):
    from clmerge.runs.comparison.row_cache import RowCache

    arguments = ["compare", str(run), "--mergers", "MagMax", "Fisher", "--scale=0.5,1.0"]
    assert main([*arguments, "--out", str(run / "whole")]) == 0
    add, calls = RowCache.add, []

    def killed(self, rows):
        add(self, rows)
        calls.append(rows)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RowCache, "add", killed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    try:
        assert main([*arguments, "--out", str(run / "killed")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()  # the end of the process would take back the lock
    (run / "killed" / ".rows.json.abc.tmp").write_text("what a kill in the middle of a write leaves")
    (run / "killed" / ".scratch").mkdir()
    monkeypatch.setattr(RowCache, "add", add)
    capsys.readouterr()
    assert main([*arguments, "--out", str(run / "killed")]) == 0
    assert "settings of" not in capsys.readouterr().err, "what was found is not computed again"
    assert without_times(document(run / "killed")) == without_times(document(run / "whole"))
    assert {p.name for p in (run / "killed").iterdir()} == {"results.json", "rows.json"}


def test_groups_that_fit_the_memory_give_the_same(run):
    compare(run, "--out", run / "together")
    compare(run, "--out", run / "single", "--memory=1e-6", "--image-memory=0")
    assert without_times(document(run / "single")) == without_times(document(run / "together"))


def test_runs_are_told_apart_and_aggregated(run, tmp_path, capsys):
    arguments = ["--config", run / "config.yaml", "--mergers", "MagMax"]
    for name, options in (("seed1", ["--seed=1"]), ("base", ["--learner.start_policy=base"])):
        assert main(["fit", *map(str, arguments), "--run_dir", str(tmp_path / name), *options]) == 0
    capsys.readouterr()
    compare(run, tmp_path / "seed1", tmp_path / "base", "--mergers", "MagMax", "--out", tmp_path / "out", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [each["name"] for each in found["runs"]] == ["run", "seed1", "base"]
    assert [each["group"] for each in found["runs"]] == ["start_policy=previous"] * 2 + ["start_policy=base"]
    fitted = {name: record(tmp_path / name) for name in ("run", "seed1", "base")}
    for each in found["runs"]:
        assert alike(each["models"]["magmax"], fitted[each["name"]]["models"]["magmax"])
        assert Results.from_dict(each).to_dict() == each
    a, b = (fitted[name]["models"]["magmax"]["task_agnostic"]["average_accuracy"][-1] for name in ("run", "seed1"))
    study = read_study([tmp_path / "out"])  # the page says the same
    assert [e.name for e in study.mergers] == ["magmax (start_policy=previous)", "magmax (start_policy=base)"]
    shown = study.mergers[0].figure("average_accuracy", "task_agnostic")
    assert (shown.mean, shown.std) == (pytest.approx((a + b) / 2), pytest.approx(abs(a - b) / 2**0.5))


@pytest.mark.slow
def test_runs_that_are_compared_by_jobs_give_the_same(run, tmp_path, capsys):
    """Rows of a second run come from the file of its job, and are the bits that one process computes."""
    other = shutil.copytree(run, tmp_path / "other")
    arguments = [run, other, "--mergers", "MagMax", "TaskArithmetic", "--scale=0.5,1.0"]
    compare(*arguments, "--out", tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.stored_run.StoredRun.evaluate", None)  # this process evaluates nothing
        compare(*arguments, "--launcher=local", "--launcher.jobs=2", "--out", tmp_path / "jobs")
    told = capsys.readouterr().err
    assert "comparing 2 of 2 runs by LocalLauncher" in told
    assert "compared other: " in told
    found, alone = (json.loads((tmp_path / name / "results.json").read_text())["runs"] for name in ("jobs", "alone"))
    assert [*map(without_times, found)] == [*map(without_times, alone)]
    assert {p.name for p in (tmp_path / "jobs").iterdir()} == {"results.json", "rows.json"}


def test_a_job_that_fails_ends_the_comparison_with_its_words(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    assert main(["compare", str(run), str(shutil.copytree(run, tmp_path / "other")), "--launcher=local"]) == 1
    assert "to be done by a job, got exit code 1" in capsys.readouterr().err


def test_one_run_is_not_compared_by_jobs(run, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(run), "--launcher=local"])
    assert "expected two runs or more for --launcher" in capsys.readouterr().err


def test_a_task_that_is_left_out_is_as_if_it_never_came(run, capsys):
    names = [task["name"] for task in record_of_stream(run)]
    arguments = [run, "--mergers", "WeightAverage", "MagMax", "--scale", "0.5,1.0"]
    compare(*arguments, "--out", run / "all")
    capsys.readouterr()
    compare(*arguments, "--without", names[1], "--orders", "2", "--scale-rule", "--out", run / "less")
    found, whole = document(run / "less"), document(run / "all")
    assert found["tasks"] == [names[0], names[2]]
    R, expert = (found["models"][model]["task_agnostic"]["R"] for model in ("magmax", "expert"))
    assert [len(row) for row in R] == [2, 2]
    assert not [model for model in found["models"].values() if "confusion" in model], "of all tasks or of none"
    before = whole["models"]["expert"]["task_agnostic"]["R"]
    assert expert == [[before[0][0], before[0][2]], [before[2][0], before[2][2]]]
    assert found["models"]["ensemble"]["bytes_kept"][1] < whole["models"]["ensemble"]["bytes_kept"][2]
    assert found["orders"]["models"]["magmax"]["permutations"] == [[0, 2]]

    stored, _ = open_run(str(run), name="x")
    bank = stored.bank
    mean = {name: (bank[0][name] + bank[2][name]) / 2 for name in bank[0]}
    stored.enter(2)
    merged = Merged(RunningMerge(WeightAverage(), base=stored.base).weights_with(mean, stored.module))
    row = stored.evaluate_again("", {"mean": merged}, 2)["mean"]["task_agnostic"]
    assert f"magmax: on tasks that were left out {names[1]} " in capsys.readouterr().out
    compare(run, "--mergers", "WeightAverage", "--without", "1", "--out", run / "mean")
    average = document(run / "mean")["models"]["weight_average"]
    assert average["task_agnostic"]["R"][-1] == [row[0], row[2]]
    assert average["probes"]["forgotten"]["values"] == {names[1]: row[1]}
    assert main(["compare", str(run), "--without", "9"]) == 1
    assert "expected one task '9' to leave out, got 0 of the tasks 0 (" in capsys.readouterr().err
    assert main(["compare", str(run), "--without", "0", "--diagnose"]) == 1
    assert "or --without, got both" in capsys.readouterr().err


def record_of_stream(run):
    return json.loads((run / "manifest.json").read_text())["stream"]["tasks"]


def test_a_joint_run_is_a_reference(run, tmp_path):
    config = ["--config", str(run / "config.yaml"), "--stream.num_tasks=1", "--mergers", "MagMax"]
    assert main(["fit", *config, "--run_dir", str(tmp_path / "joint")]) == 0
    compare(run, "--mergers", "MagMax", "--joint", tmp_path / "joint")
    found, joint = document(run / "compare"), record(tmp_path / "joint")
    row = found["models"]["joint"]["task_agnostic"]["R"][0]
    right = sum(accuracy * count for accuracy, count in zip(row, found["samples"], strict=True))
    assert right / sum(found["samples"]) == pytest.approx(joint["models"]["expert"]["task_agnostic"]["R"][0][0])


def test_a_run_without_vectors_says_how_to_keep_them(run, capsys):
    shutil.rmtree(run / "bank")
    assert main(["compare", str(run)]) == 1
    assert f"expected {run / 'bank' / 'task_000.safetensors'}, as the run has committed it" in capsys.readouterr().err
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"] = {name: value for name, value in manifest["files"].items() if not name.startswith("bank/")}
    (run / "manifest.json").write_text(json.dumps(manifest))  # as of a run that has kept none
    assert main(["compare", str(run)]) == 1
    error = capsys.readouterr().err
    assert "--learner.keep_task_vectors=true" in error
    assert "MB per task" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--mergers", "TEIS"], 2, "TIES"),
        (["--mergerz", "TIES"], 2, "--mergers"),
        (["--grid", "MagMax.scal=1,2"], 1, "did you mean 'scale'"),
        (["--grid", "MagMix.scale=1,2"], 1, "did you mean 'MagMax'"),
        (["--scale", "1:2"], 1, "first:last:step"),
        (["--scale-rule"], 2, "expected --scale"),
        (["--joint", "nowhere"], 1, "expected a run folder"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_right_word(run, capsys, arguments, code, message):
    try:
        found = main(["compare", str(run), *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err
    assert not (run / "compare" / "results.json").exists()


def test_an_unfinished_run_is_refused(run, capsys):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    assert main(["compare", str(run)]) == 1
    assert f"clmerge fit --resume {run}" in capsys.readouterr().err


def test_two_comparisons_into_one_folder_at_once_are_refused(run, tmp_path, capsys):
    out = tmp_path / "out"
    (out / ".scratch").mkdir(parents=True)
    process = other_process(out)
    assert main(["compare", str(run), "--mergers", "MagMax", "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"no other process writes, got {out}, which process {process.pid} on " in message
    assert len(message.splitlines()) == 1
    assert {path.name for path in out.iterdir()} == {".lock", ".scratch"}, "nothing of the other was touched"
    end(process)
    compare(run, "--mergers", "MagMax", "--out", out)
    assert {path.name for path in out.iterdir()} == {"results.json", "rows.json"}


def test_help_is_static(capsys):
    assert main(["compare", "--help"]) == 0
    assert "--scale-rule" in capsys.readouterr().out


def test_diagnose_says_why_with_the_chosen_settings(run, capsys):
    compare(run, "--mergers", "MagMax", "TaskArithmetic", "--scale", "0.3,0.9", "--diagnose")
    found = document(run / "compare")
    diagnosed = found["diagnostics"]
    assert diagnosed["tasks"] == found["tasks"]
    assert diagnosed["models"]["split"] == "val"
    assert list(diagnosed["models"]["models"]) == ["base", "expert", "magmax", "task_arithmetic"]
    known = diagnosed["models"]["knowledge"]
    assert known["shared"]["remembered"].keys() == {"base", "magmax", "task_arithmetic"}
    printed = capsys.readouterr()
    assert f"% of {known['unshared']['n']} that one alone knows" in printed.out
    assert len(diagnosed["vectors"]["whole"]["cosine"]) == 3
    # Validation images of all tasks are few enough here to be all: the errors are those that the search saw.
    for search in found["searches"]:
        (chosen,) = [point for point in search["points"] if point["values"] == search["chosen"]]
        errors = diagnosed["models"]["models"][search["model"]]["error"]
        assert [1 - error for error in errors] == pytest.approx(chosen["accuracy"])
    assert "run: diagnosing on task 3 of 3" in printed.err
    study = read_study([run / "compare"])
    figures = {figure.name for figure in (*common_figures(study), *diagnostic_figures(study))}
    assert {"searches", "cosine", "layers_norm", "effective_rank", "barriers", "disagreement"} <= figures


def test_a_comparison_goes_to_wandb_when_asked(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    compare(run, "--mergers", "MagMax", "TaskArithmetic", "--scale", "0.3,0.9", "--wandb")
    found = document(run / "compare")
    (logged,) = find_runs(run / "compare")
    assert logged.run.job_type == "compare"
    assert logged.run.display_name == "compare small magmax+task_arithmetic full previous s0"
    assert logged.config["run"] == str(run)
    for model, settings in found["models"].items():
        if settings["task_agnostic"] is None:
            continue
        averages = settings["task_agnostic"]["average_accuracy"]
        assert logged.rows(f"cl_average_accuracy/{model}") == [(t + 1, value) for t, value in enumerate(averages)]
    assert logged.summary["cl_search/magmax/scale"] == found["searches"][0]["chosen"]["scale"]
    assert "wandb sync" in capsys.readouterr().out


def test_without_diagnose_there_are_no_diagnostics(run):
    compare(run, "--mergers", "MagMax")
    assert document(run / "compare")["diagnostics"] is None


def test_a_scale_that_views_do_not_depend_on_is_not_searched(tmp_path, capsys):
    run = make_run(tmp_path, "--stream.val_fraction=0.2", "--mergers", "EMR", "MagMax")
    capsys.readouterr()
    compare(run, "--scale", "0.5,1.0")
    told = capsys.readouterr()
    assert "emr: scale is not searched: its views for the tasks do not depend on it" in told.err
    found = document(run / "compare")
    assert [search["merger"] for search in found["searches"]] == ["MagMax"]
    assert "emr: must be told the task of every image, so task-aware only" in told.out
    capsys.readouterr()
    assert main(["compare", str(run), "--grid", "EMR.scale=0.5,1.0"]) == 1
    assert "got EMR.scale: emr is evaluated with a view for every task" in capsys.readouterr().err
    for form in ("md", "latex"):
        assert main(["report", str(run), "--format", form]) == 0
        assert "emr: must be told the task" in capsys.readouterr().out


def searched(run, *arguments):
    """Search weights per task, and return the search and the merger's model."""
    weights = ["--mergers", "TaskArithmetic", "--grid", "TaskArithmetic.weights[*]=0:1:0.5"]
    compare(run, *weights, *arguments)
    document = record(run / "compare")
    validate({"schema": 2, "runs": [document]})
    return document["searches"][0], document["models"]["task_arithmetic"]


def test_a_search_of_weights_goes_on_where_it_was_interrupted(run, monkeypatch):
    options = ["--search", "cma_es", "--budget", "14"]
    passes = []
    evaluate = StoredRun.evaluate_again

    def interrupted(self, label, predictors, task, split="test", **options):
        passes.append(split)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return evaluate(self, label, predictors, task, split, **options)

    monkeypatch.setattr(StoredRun, "evaluate_again", interrupted)
    with pytest.raises(AssertionError, match="130"):
        searched(run, *options)
    found, model = searched(run, *options)
    assert passes.count("val") == 3  # one of them was cut off, and the first is not repeated
    assert found["method"] == "cma_es"
    assert len(found["points"]) == 14
    assert model["data"] == "val"
    assert model["rule"]["init_args"]["weights"] == [found["chosen"][f"weights[{task}]"] for task in range(3)]
    best = max(point["score"] for point in found["points"])
    assert found["score"] == best


def test_a_sweep_of_preferences_has_a_front_in_table_and_report(run, tmp_path, capsys):
    found, _ = searched(run, "--search", "preferences", "--budget", "6", "--mergers.scale=1")
    assert len(found["points"]) == 6
    assert found["front"]
    study = read_study([run / "compare"])
    fronts = fronts_of(study)
    printed = capsys.readouterr().out
    assert ("points that no other beats on all tasks" in printed) == bool(fronts)
    assert [figure.name for figure in common_figures(study) if figure.name.startswith("front_")] == [
        "front_task_arithmetic" for _ in fronts
    ]


def test_adapters_of_other_tasks_are_composed_for_one_that_was_left_out(run):
    found, model = searched(run, "--without", "2", "--preference", "2=1", "--search", "quadratic", "--budget", "8")
    assert list(found["parameters"]) == ["weights[0]", "weights[1]"]
    assert found["goal"]["weights"] == [0, 0, 1]
    assert len(found["points"][0]["accuracy"]) == 2  # those of the merged tasks
    assert list(model["probes"]["forgotten"]["values"]) == [record(run)["tasks"][2]]


def test_a_task_is_unlearned_within_a_limit(run):
    compare(
        *(run, "--mergers", "TaskArithmetic", "--scale=-1:1:0.5", "--preference", "0=-1", "--at-least", "1=0.9"),
    )
    (found,) = record(run / "compare")["searches"]
    at_least = found["goal"]["at_least"]["1"]
    kept = [point for point in found["points"] if point["accuracy"][1] >= at_least]
    assert {"scale": 0.0} in [point["values"] for point in kept]
    assert found["score"] == max(point["score"] for point in kept) == -min(point["accuracy"][0] for point in kept)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--search", "cma_es"], "expected --scale or --grid with what to search"),
        (["--scale", "0.5", "--budget", "0"], "expected --budget of 1 or more"),
        (["--scale", "0.5", "--preference", "nine=1"], "expected TASK=NUMBER in --preference"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(arguments, told, run, capsys):
    with pytest.raises(SystemExit) if told.startswith("expected --") else contextlib.nullcontext():
        assert main(["compare", str(run), "--mergers", "MagMax", *arguments]) == 1
    assert told in capsys.readouterr().err
