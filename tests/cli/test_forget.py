"""``clmerge forget`` on a small run of independent experts."""

import json

import pytest
import torch
from support.tiny import tiny_clip

from clmerge.checkpoints.ledger import versions
from clmerge.cli import main
from clmerge.cli.open_run import open_run
from clmerge.merging import TIES, ExtSub, Fisher, WeightAverage
from clmerge.results.model_facts import ModelFacts
from clmerge.runs.comparison.refold import Refold
from clmerge.runs.unlearning.choice import best
from clmerge.runs.unlearning.directions import deficiency, large_part, minus, moved, random_like, total
from clmerge.runs.unlearning.forget import difference
from clmerge.runs.unlearning.request import named_tasks
from clmerge.weights import load_metadata, load_tensors

CONFIG = """
name: to-forget
mergers: [WeightAverage, TIES]
model: {backbone: {class_path: OpenClip, init_args: {name: CLIP}}, loss_classes: all,
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 3, source: {class_path: SklearnDigits,
  init_args: {test_fraction: 0.1}}}}
learner: {start_policy: START, statistics_images: 8}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 4, limit_val_batches: 1, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""


def trained(folder, start):
    (folder / "config.yaml").write_text(CONFIG.replace("CLIP", tiny_clip(folder)).replace("START", start))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("forget"), "base")


def forget(folder, out, capsys, *options):
    capsys.readouterr()
    assert main(["forget", str(folder), "--out", str(out), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "statement.json").read_text())
    return found


def refused(folder, tmp_path, capsys, *options):
    capsys.readouterr()
    assert main(["forget", str(folder), "--out", str(tmp_path / "refused"), *options]) == 1
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err


def weights_of(folder, mergers, tasks):
    run, _ = open_run(str(folder), name="run")
    refold = Refold(run, mergers)
    for task in tasks:
        refold.fold(task)
    return {name: refold.merge.merged_state(name) for name in mergers}


def test_what_is_written_never_saw_the_task(folder, tmp_path, capsys):
    names = ["WeightAverage", "TIES", "Fisher", "EMR"]
    found = forget(folder, tmp_path / "out", capsys, "--tasks", "1", "--mergers", *names)
    models = found["models"]
    assert list(models) == ["weight_average", "ties", "fisher", "emr"]
    expected = weights_of(folder, {"weight_average": WeightAverage(), "ties": TIES(), "fisher": Fisher()}, [0, 2])
    for name, weights in expected.items():
        written = load_tensors(tmp_path / "out" / f"{name}.safetensors")
        for key, tensor in weights.items():
            gap = (written[key.removeprefix("backbone.model.")] - tensor).abs().max()
            assert gap <= (0 if name == "ties" else 1e-6)
    for name in ("weight_average", "fisher"):
        assert "subtracted" in models[name]["how"]
        assert models[name]["difference"]["relative"] < 1e-5
    for name in ("ties", "emr"):
        assert "merged anew" in models[name]["how"]
        assert models[name]["difference"] == {"max_abs": 0.0, "relative": 0.0, "bitwise": True}
        assert models[name]["after"] == models[name]["never"]
    assert models["ties"]["privacy_leak"]["after"] == 0


def test_a_run_that_never_saw_the_task_has_the_same_models(folder, tmp_path, capsys, monkeypatch):
    """Independent experts: to the bit where the rule is merged anew, to rounding where the task is subtracted."""
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    options = ["--config", str(folder.parent / "config.yaml"), "--transforms=[{class_path: support.shorter.Shorter}]"]
    assert main(["fit", *options, "--run_dir", str(tmp_path / "never")]) == 0
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    found = forget(folder, tmp_path / "out", capsys, "--tasks", "2")
    for name in ("ties", "weight_average"):
        never = load_tensors(tmp_path / "never" / "model" / f"{name}.safetensors")
        written = load_tensors(tmp_path / "out" / f"{name}.safetensors")
        assert never.keys() == written.keys()
        gap = max(float((never[key] - tensor).abs().max()) for key, tensor in written.items())
        assert gap == 0 if name == "ties" else gap < 1e-6
    assert found["models"]["ties"]["difference"]["bitwise"]


def test_the_statement_says_what_was_removed(folder, tmp_path, capsys):
    found = forget(folder, tmp_path / "out", capsys, "--tasks", "1")
    run, _ = open_run(str(folder), name="run")
    (task,) = found["tasks"]
    assert task["index"] == 1
    assert task["name"] == run.tasks[1].name
    assert task["vector_sha256"] == run.bank.metadata(1)["sha256"]
    assert found["base"] == run.bank.base
    assert found["versions"] == versions()
    assert found["method"] == "downdate"
    assert found["settings"] == {}
    assert len(found["remarks"]) == 1  # independent experts, a text head
    metadata = load_metadata(tmp_path / "out" / "ties.safetensors")
    assert json.loads(metadata["clmerge.forgotten"]).items() <= found.items()
    facts = ModelFacts.from_metadata(metadata, "ties")
    assert facts is not None
    assert facts.model == "ties"
    assert [each["name"] for each in facts.tasks] == [run.tasks[0].name, run.tasks[2].name]
    before = found["models"]["ties"]["before"]
    images = [len(run.stream.dataset(each, "test")) for each in range(3)]
    assert before["n"] == {"forget": images[1], "control": images[0] + images[2]}
    matrix = run.results.matrix("ties", run.evaluation)[-1].tolist()
    assert before["per_task"] == pytest.approx(matrix)
    assert before["forget"] == pytest.approx(matrix[1])
    assert before["control"] == pytest.approx((matrix[0] + matrix[2]) / 2)
    assert 0 <= before["probes"]["membership_inference"]["value"] <= 1


def test_negation_is_chosen_on_validation_images_and_keeps_the_control(folder, tmp_path, capsys):
    found = forget(
        folder, tmp_path / "out", capsys, "--tasks", "2", "--method", "negate", "--mergers", "WeightAverage",
        "--coefficients", "0:1:0.25",
    )  # fmt: skip
    one = found["models"]["weight_average"]
    tried = one["validation"]["tried"]
    assert [each["value"] for each in tried] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert one["validation"]["least_control"] == pytest.approx(0.95 * tried[0]["control"])
    allowed = [each for each in tried if each["control"] >= one["validation"]["least_control"]]
    chosen = min(allowed, key=lambda each: each["forget"])
    assert one["chosen"] == {"coefficient": chosen["value"]}
    run, _ = open_run(str(folder), name="run")
    written = load_tensors(tmp_path / "out" / "weight_average.safetensors")
    for name, base in run.base.items():
        taus = [run.bank[task][name] for task in range(3)]
        expected = base + sum(taus) / 3 - chosen["value"] * taus[2]
        assert torch.allclose(written[name.removeprefix("backbone.model.")], expected, atol=1e-6)
    assert found["settings"] == {"coefficients": [0.0, 0.25, 0.5, 0.75, 1.0], "at_least": 0.95}


@pytest.mark.parametrize("method", ["ext_sub", "ethos", "random_vector"])
def test_a_given_coefficient_is_taken(method, folder, tmp_path, capsys):
    options = ["--tasks", "2", "--method", method, "--coefficients", "0.5", "--mergers", "WeightAverage"]
    found = forget(folder, tmp_path / "out", capsys, *options)
    assert found["models"]["weight_average"]["chosen"] == {"coefficient": 0.5}
    assert "validation" not in found["models"]["weight_average"]
    run, _ = open_run(str(folder), name="run")
    merged = total([run.bank[task] for task in range(3)])
    merged = {name: tensor / 3 for name, tensor in merged.items()}
    own = [run.bank[2]]
    direction = {
        "ext_sub": lambda: deficiency(merged, own),
        "ethos": lambda: large_part(run.base, merged, own),
        "random_vector": lambda: random_like(own[0], seed=0),
    }[method]()
    written = load_tensors(tmp_path / "out" / "weight_average.safetensors")
    for name, tensor in minus(merged, 0.5, direction).items():
        expected = run.base[name] + tensor
        assert torch.allclose(written[name.removeprefix("backbone.model.")], expected, atol=1e-5)


def test_gradient_ascent_and_relearning(folder, tmp_path, capsys):
    options = ["--tasks", "2", "--method", "gradient_ascent", "--steps", "3", "--at-least", "0", "--relearn", "4"]
    found = forget(folder, tmp_path / "out", capsys, *options, "--mergers", "WeightAverage")
    one = found["models"]["weight_average"]
    assert [each["value"] for each in one["validation"]["tried"]] == [0, 1, 2, 3]
    assert one["chosen"]["steps"] in range(4)
    assert one["relearning_steps"].keys() == {"before", "after", "never"}
    assert all(steps is None or 0 <= steps <= 50 for steps in one["relearning_steps"].values())


def test_requests_in_a_sequence(folder, tmp_path, capsys):
    options = ["--tasks", "2", "0", "--method", "ssu", "--steps", "2", "--mergers", "WeightAverage"]
    found = forget(folder, tmp_path / "out", capsys, *options)
    one = found["models"]["weight_average"]
    run, _ = open_run(str(folder), name="run")
    assert [each["task"] for each in one["requests"]] == [run.tasks[2].name, run.tasks[0].name]
    assert all(each["coefficient"] == 1.0 for each in one["requests"])
    last = one["requests"][-1]
    assert {key: last[key] for key in one["after"]} == one["after"]
    assert len(one["requests"][0]["per_task"]) == 3
    assert not one["difference"]["bitwise"]
    again = forget(folder, tmp_path / "again", capsys, *options)
    assert again == found  # the same images, labels and steps
    plain = forget(folder, tmp_path / "plain", capsys, *options, "--random-labels", "0")
    assert plain["settings"]["random_labels"] == 0
    assert plain["models"]["weight_average"]["difference"] != one["difference"]


def test_a_run_in_sequence_says_so_and_only_its_last_movement_is_subtracted(tmp_path, capsys):
    run_folder = trained(tmp_path, "previous")
    found = forget(run_folder, tmp_path / "out", capsys, "--tasks", "0", "--mergers", "MagMax")
    assert "start_policy=previous" in found["remarks"][0]
    run, _ = open_run(str(run_folder), name="run")
    first, second = run.bank[0], run.bank[1]
    assert all(torch.equal(tensor, second[name] - first[name]) for name, tensor in moved(run, 1).items())
    assert all(torch.equal(tensor, first[name]) for name, tensor in moved(run, 0).items())


def test_what_cannot_be_forgotten_is_refused(folder, tmp_path, capsys):
    assert "did you mean" in refused(folder, tmp_path, capsys, "--tasks", "zero-one-tw")
    assert "expected a task that is left" in refused(folder, tmp_path, capsys, "--tasks", "0", "1", "2")
    assert "twice" in refused(folder, tmp_path, capsys, "--tasks", "0", "0")
    options = ["--tasks", "0", "--coefficients", "1"]
    assert "expected no --coefficients for downdate" in refused(folder, tmp_path, capsys, *options)
    options = ["--tasks", "0", "--method", "negate"]
    assert "one set of weights" in refused(folder, tmp_path, capsys, *options, "--mergers", "EMR")
    assert "expected --steps for gradient_ascent" in refused(folder, tmp_path, capsys, *options, "--steps", "3")
    assert "share from 0 to 1" in refused(folder, tmp_path, capsys, *options, "--at-least", "2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert main(["forget", str(folder), "--tasks", "0", "--out", str(tmp_path / "full")]) == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]


def test_a_killed_forget_leaves_nothing_and_starts_anew(folder, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise OSError("expected room on the disk")

    with monkeypatch.context() as patch:
        patch.setattr("clmerge.runs.unlearning.statement.write_json_atomic", stop)  # the models are written by then
        assert main(["forget", str(folder), "--tasks", "0", "--out", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert forget(folder, tmp_path / "out", capsys, "--tasks", "0")["tasks"][0]["index"] == 0


def test_the_table_is_printed(folder, tmp_path, capsys):
    assert main(["forget", str(folder), "--tasks", "1", "--mergers", "TIES", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "ties after" in text
    assert "equals the merge without them to the bit" in text


def test_the_best_point_keeps_the_control():
    points = {0.0: (0.9, 0.8), 0.5: (0.4, 0.77), 0.75: (0.4, 0.8), 1.0: (0.1, 0.7)}
    assert best(points, 0.95).value == 0.5  # the first of equals
    assert best(points, 1.0).value == 0.75
    assert best(points, 0.8).value == 1.0
    assert best({0.0: (0.9, 0.8), 1.0: (0.1, 0.7)}, 0.95).value == 0.0


def test_directions_against_float64():
    generator = torch.Generator().manual_seed(0)
    merged, tau = ({"w": torch.randn(4, 3, generator=generator, dtype=torch.float64)} for _ in range(2))
    unit = torch.nn.functional.normalize
    shared = unit(unit(merged["w"], dim=1) + unit(tau["w"], dim=1), dim=1)
    expected = tau["w"] - (tau["w"] * shared).sum(dim=1, keepdim=True) * shared
    assert torch.allclose(deficiency(merged, [tau])["w"], expected)
    rule = ExtSub(strength=0.3)
    for vector in (merged, tau):
        rule.update(vector)
    assert torch.allclose(minus(merged, 0.3, deficiency(merged, [tau]))["w"], rule.compute()["w"])
    base = {"w": torch.randn(4, 3, generator=generator, dtype=torch.float64)}
    u, _, vh = torch.linalg.svd(base["w"] + merged["w"], full_matrices=False)
    coordinates = u.T @ tau["w"] @ vh.T
    small = coordinates * (coordinates.abs() < 0.03 * coordinates.abs().max())
    assert torch.allclose(large_part(base, merged, [tau])["w"], tau["w"] - u @ small @ vh, atol=1e-6)
    noise = random_like(tau, seed=3)
    assert float(noise["w"].norm()) == pytest.approx(float(tau["w"].norm()))
    assert torch.equal(noise["w"], random_like(tau, seed=3)["w"])
    assert not torch.equal(noise["w"], random_like(tau, seed=4)["w"])
    assert random_like({"b": torch.zeros(2)}, seed=0)["b"].tolist() == [0.0, 0.0]


def test_difference():
    found = difference({"w": torch.tensor([1.0, 2.5])}, {"w": torch.tensor([1.0, 2.0])})
    assert found == {"max_abs": 0.5, "relative": 0.25, "bitwise": False}
    assert difference({"w": torch.zeros(1)}, {"w": torch.zeros(1)}) == {
        "max_abs": 0.0,
        "relative": 0.0,
        "bitwise": True,
    }


def test_tasks_are_named_or_counted():
    assert named_tasks(["a", "1"], ["1", "0"]) == [1, 0]
    with pytest.raises(
        ValueError, match=r"one of the tasks 0 \(cats\), 1 \(dogs\) to forget, got 'dog'; did you mean 'dogs'"
    ):
        named_tasks(["cats", "dogs"], ["dog"])
