"""``clmerge compare RUN RUN ... --soup``: averages of the final models of several runs."""

import json
from itertools import chain

import pytest
import torch
from support.tiny import tiny_clip

from clmerge.cli import main
from clmerge.cli.open_run import open_run
from clmerge.results.results import Results, validate
from clmerge.weights import load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = """
name: small
stream:
  class_path: ClassIncremental
  init_args:
    source: {{class_path: SklearnDigits, init_args: {{test_fraction: 0.1}}}}
    num_tasks: 2
    val_fraction: 0.2
model:
  backbone: {backbone}
  head: {head}
  loss_classes: seen
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [WeightAverage]
data: {{batch_size: 64}}
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 4, limit_val_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


CLIP = '{{class_path: OpenClip, init_args: {{name: "{name}"}}}}'


def make_runs(folder, *, backbone=None, head="ZeroShotHead", number=3):
    clip = CLIP.format(name=tiny_clip(folder / "clip")) if backbone is None else backbone
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(backbone=clip, head=head))
    runs = []
    for index in range(number):
        runs.append(folder / f"run{index}")
        rate = f"--model.optimizer.lr={(index + 1) * 1e-3}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
            assert main(["fit", "--config", str(config), "--run_dir", str(runs[-1]), rate]) == 0
            patch.delenv("CLMERGE_RUN_DIR")
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


def compare(*arguments):
    assert main(["compare", *map(str, arguments)]) == 0


def soups_of(folder):
    document = json.loads((folder / "results.json").read_text())
    validate(document)
    assert all("soups" not in run for run in document["runs"][1:])
    return document["runs"][0]["soups"]


def averaged(files):
    states = [load_tensors(file) for file in files]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}


def logits_of(path, states, split, *, head=None, allow=()):
    """Return logits of a run's final model with other weights, labels and tasks: by loading, not by clmerge's swap."""
    run, _ = open_run(str(path), name="x", allow=allow)
    found = []
    for index, state in enumerate(states):
        run.enter(len(run.tasks) - 1)
        run.module.backbone.model.load_state_dict(state, strict=False)
        if head is not None:
            run.module.head.load_state_dict(head[index])
        norms = [part for part in run.module.modules() if isinstance(part, torch.nn.BatchNorm1d)]
        if norms:
            run.module.train()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            with torch.no_grad():
                for images in chain(run.images(0), run.images(1)):
                    run.module.backbone(images)
        run.module.eval()
        batches = list(run.data.eval_dataloader(split, [0, 1]))
        with torch.no_grad():
            found.append(torch.cat([run.module(images) for images, _, _ in batches]).double())
    labels, tasks = (torch.cat([batch[place] for batch in batches]) for place in (1, 2))
    return found, labels, tasks


def accuracy(logits, labels, tasks):
    right = logits.argmax(1) == labels
    return [float(right[tasks == task].double().mean()) for task in (0, 1)]


def test_soups_of_three_runs(runs, tmp_path, capsys):
    compare(*runs, "--soup", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    [soup] = soups_of(tmp_path / "out")
    files = [run / "model" / "weight_average.safetensors" for run in runs]
    singles, labels, _ = logits_of(runs[0], [load_tensors(file) for file in files], "val")
    scores = [float((one.argmax(1) == labels).double().mean()) for one in singles]
    assert soup["scores"] == pytest.approx(scores)
    assert soup["best"] == scores.index(max(scores))
    assert soup["runs"] == ["run0", "run1", "run2"]

    # The greedy recipe once more: best first, and in if the average is at least as good.
    greedy, best = [], -1.0
    for index in sorted(range(3), key=lambda index: -scores[index]):
        [logits], _, _ = logits_of(runs[0], [averaged([files[i] for i in [*greedy, index]])], "val")
        value = float((logits.argmax(1) == labels).double().mean())
        if value >= best:
            greedy, best = [*greedy, index], value
    assert soup["soups"]["greedy"]["members"] == sorted(greedy)
    assert soup["soups"]["greedy"]["score"] == pytest.approx(best)
    assert soup["soups"]["uniform"]["members"] == soup["soups"]["ensemble"]["members"] == [0, 1, 2]

    [uniform], own, places = logits_of(runs[0], [averaged(files)], "test")
    members, _, _ = logits_of(runs[0], [load_tensors(file) for file in files], "test")
    assert soup["soups"]["uniform"]["task_agnostic"] == pytest.approx(accuracy(uniform, own, places))
    mean = torch.stack(members).mean(0)
    assert soup["soups"]["ensemble"]["task_agnostic"] == pytest.approx(accuracy(mean, own, places))
    probabilities = torch.stack([one.softmax(1) for one in singles]).mean(0)
    truth = torch.eye(10, dtype=torch.float64)[labels]
    assert soup["terms"]["ensemble_error"] == pytest.approx(float((probabilities - truth).square().sum(1).mean()))
    assert soup["terms"]["images"] == len(labels)
    assert soup["terms"]["locality"] > 0
    for told in ("soups of 3 runs (run0, run1, run2)", "mean of the logits of all", "covariance", "locality"):
        assert told in printed

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert Results.from_dict(document["runs"][0]).to_dict() == document["runs"][0]
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Soups of 3 runs, weight_average" in page


def test_test_images_are_looked_at_once(runs, tmp_path, monkeypatch):
    from clmerge.runs.stored_run import StoredRun

    evaluate, passes = StoredRun.evaluate_again, []

    def counted(self, label, predictors, task, split="test", **options):
        passes.append((split, tuple(predictors)))
        return evaluate(self, label, predictors, task, split, **options)

    monkeypatch.setattr(StoredRun, "evaluate_again", counted)
    compare(*runs[:2], "--soup", "--out", tmp_path / "out")
    assert passes[-1] == ("test", ("uniform", "greedy", "ensemble"))
    assert [found for found in passes if "uniform" in found[1]] == passes[-1:]
    passes.clear()
    first = soups_of(tmp_path / "out")
    compare(*runs[:2], "--soup", "--out", tmp_path / "out")
    assert passes == []
    assert soups_of(tmp_path / "out") == first


@pytest.mark.parametrize("kind", ["LinearHead", "Normed"])
def test_heads_are_averaged_and_running_statistics_estimated(kind, tmp_path):
    allow = ["--allow", "support"] if kind == "Normed" else []
    backbone = "support.toy_backbone.Normed" if kind == "Normed" else None
    runs = make_runs(tmp_path, backbone=backbone, head="LinearHead", number=2)
    compare(*runs, "--soup", *allow, "--out", tmp_path / "out")
    [soup] = soups_of(tmp_path / "out")
    files, heads = ([run / "model" / f"{name}.safetensors" for run in runs] for name in ("weight_average", "head"))
    head = {**load_tensors(heads[0]), **{k: v for k, v in averaged(heads).items() if v.ndim}}
    kept = {k: v.to(load_tensors(heads[0])[k].dtype) for k, v in head.items()}
    [logits], labels, tasks = logits_of(runs[0], [averaged(files)], "test", head=[kept], allow=allow[1:])
    assert soup["soups"]["uniform"]["task_agnostic"] == pytest.approx(accuracy(logits, labels, tasks))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stream.val_fraction=0.3"], "expected the stream of"),
        (["--model.head=LinearHead"], "expected the head of"),
    ],
)
def test_runs_without_a_common_average_are_refused(arguments, told, runs, tmp_path, capsys):
    config = runs[0].parent / "config.yaml"
    assert main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "other"), *arguments]) == 0
    assert main(["compare", str(runs[0]), str(tmp_path / "other"), "--soup", "--out", str(tmp_path / "out")]) == 1
    assert told in " ".join(capsys.readouterr().err.split())


def test_requests_without_sense_are_refused(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(runs[0]), "--soup"])
    assert "two runs or more for --soup" in capsys.readouterr().err
    for arguments, told in (
        (["--mergers", "EMR"], "mergers of one model for --soup, got 'emr'"),
        (["--without", "0"], "expected --soup, which averages final models, or --without"),
    ):
        assert main(["compare", *map(str, runs[:2]), "--soup", *arguments, "--out", str(tmp_path / "out")]) == 1
        assert told in " ".join(capsys.readouterr().err.split())


def test_final_models_of_runs_are_merged_as_files(runs, tmp_path):
    files = [run / "model" / "weight_average.safetensors" for run in runs]
    out = tmp_path / "soup.safetensors"
    base = runs[0].parent / "clip" / "open_clip_model.safetensors"
    arguments = ["--base", base, "--models", *files, "--merger", "WeightAverage", "--out", out]
    assert main(["merge", *map(str, arguments)]) == 0
    found, expected = load_tensors(out), averaged(files)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
