import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from support.toy_backbone import ToyBackbone
from torch.utils.data import DataLoader, TensorDataset

from clmerge.deploy.predictors import Merged, PerTask, Predictor
from clmerge.evaluation.evaluate import accuracy_on, evaluate
from clmerge.evaluation.evaluator import Evaluator
from clmerge.models import CosineHead, LinearHead
from clmerge.streams.samplers import ShardSampler
from clmerge.training.module import ContinualClassifier

CLASSES = [(0, 3), (1, 2)]


class Data(LightningDataModule):
    """Images of two tasks, one after the other; served in shards like those of the stream's data module."""

    def __init__(self, num=31):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(num, 3, 4, 4, generator=generator)
        self.tasks = torch.arange(num) * len(CLASSES) // num
        self.labels = torch.tensor(CLASSES)[self.tasks, torch.arange(num) % 2]

    def test_dataloader(self):
        images = TensorDataset(self.images, self.labels, self.tasks)
        size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(images, batch_size=7, sampler=ShardSampler(images, num_replicas=size, rank=rank))


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = ContinualClassifier(ToyBackbone(), LinearHead())
    module.begin_stream(4)
    for classes in CLASSES:
        module.begin_task(classes)
    module.backbone.model[2].running_mean.add_(0.3)
    return module


@pytest.fixture
def weights(module):
    """Weights of three models that predict differently; one brings its running statistics along."""
    found = {}
    for i, name in enumerate(["magmax", "ties_density0.1", "a.b.c"]):
        generator = torch.Generator().manual_seed(i)
        found[name] = {
            key: value + torch.randn(value.shape, generator=generator)
            for key, value in module.state_dict().items()
            if key in module.trained_names
        }
    found["a.b.c"]["backbone.model.2.running_mean"] = torch.full((6,), 0.7)
    return found


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(module, weights, data=None, **options):
    predictors = {name: found if isinstance(found, Predictor) else Merged(found) for name, found in weights.items()}
    return evaluate(trainer(), module, predictors, data or Data(), task_classes=CLASSES, num_classes=4, **options)


def logits_of(module, state):
    twin = ContinualClassifier(ToyBackbone(), LinearHead())
    twin.begin_stream(4)
    twin.load_state_dict(module.state_dict())
    twin.load_state_dict(state or {}, strict=False)
    return twin.eval()(Data().images)


def expected_row(module, state):
    """Load the weights and count by hand."""
    data, logits = Data(), logits_of(module, state)
    row = {"task_agnostic": [], "task_aware": []}
    for task, classes in enumerate(CLASSES):
        own, labels = logits[data.tasks == task], data.labels[data.tasks == task]
        row["task_agnostic"].append(float((own.argmax(dim=1) == labels).double().mean()))
        among = torch.tensor(classes)[own[:, list(classes)].argmax(dim=1)]
        row["task_aware"].append(float((among == labels).double().mean()))
    return row


def test_one_pass_gives_what_loading_each_model_gives(module, weights):
    rows = run(module, {**weights, "expert": None})
    assert list(rows) == ["magmax", "ties_density0.1", "a.b.c", "expert"]
    for name, state in {**weights, "expert": None}.items():
        assert rows[name] == expected_row(module, state), name
    assert len({str(row) for row in rows.values()}) == 4, "the models differ"


def test_one_pass_gives_what_separate_passes_give(module, weights):
    rows = run(module, weights)
    for name, state in weights.items():
        assert run(module, {name: state}) == {name: rows[name]}


def test_views_answer_the_images_of_their_own_tasks(module, weights):
    """Batches of seven cross the border between the tasks; what needs the task has no task-agnostic accuracy."""
    views = [weights["magmax"], weights["a.b.c"]]
    asked = []

    def view(task):
        asked.append(task)
        assert torch.equal(module.backbone.model[1].weight, own), "made while the module has its own weights"
        return views[task]

    own = module.backbone.model[1].weight.detach().clone()
    rows = run(module, {"emr": PerTask(view, [0, 1]), "half": PerTask(view, [1]), "magmax": views[0]})
    expected = [expected_row(module, state)["task_aware"][task] for task, state in enumerate(views)]
    assert rows["emr"]["task_aware"] == expected
    assert all(math.isnan(value) for name in ("emr", "half") for value in rows[name]["task_agnostic"])
    assert math.isnan(rows["half"]["task_aware"][0])
    assert rows["half"]["task_aware"][1] == expected[1]
    assert rows["magmax"] == expected_row(module, views[0])
    assert sorted(asked) == [0, 1, 1], "a view is made once, when its task comes up"


def expected_answers(logits, setting, tasks=(0, 1)):
    """Count by hand which class is taken for which; classes in the order in which they arrive."""
    data, order = Data(), [c for classes in CLASSES for c in classes]
    table = torch.zeros(4, 4, dtype=torch.int64)
    for row, label, task in zip(logits, data.labels.tolist(), data.tasks.tolist(), strict=True):
        competing = list(range(4)) if setting == "task_agnostic" else list(CLASSES[task])
        taken = competing[int(row[competing].argmax())]
        table[order.index(label), order.index(taken)] += task in tasks
    return table.tolist()


def test_answers_are_counted_by_class_in_the_same_pass(module, weights):
    rows = run(module, {**weights, "expert": None}, confusion=True)
    assert {name: {**row, "confusion": 0} for name, row in rows.items()} == {
        name: {**row, "confusion": 0} for name, row in run(module, {**weights, "expert": None}).items()
    }
    for name, state in {**weights, "expert": None}.items():
        for setting, found in rows[name]["confusion"].items():
            expected = expected_answers(logits_of(module, state), setting)
            assert found.matrix().tolist() == expected, (name, setting)
            assert (found.images, found.right) == ([sum(r) for r in expected], [expected[i][i] for i in range(4)])


def test_answers_of_a_model_that_needs_the_task_are_those_with_the_task(module, weights):
    views = [weights["magmax"], weights["a.b.c"]]
    rows = run(
        module, {"emr": PerTask(views.__getitem__, [0, 1]), "half": PerTask(views.__getitem__, [1])}, confusion=True
    )
    first, second = (expected_answers(logits_of(module, views[t]), "task_aware", tasks=[t]) for t in (0, 1))
    assert list(rows["emr"]["confusion"]) == list(rows["half"]["confusion"]) == ["task_aware"]
    both = (torch.tensor(first) + torch.tensor(second)).tolist()
    assert rows["emr"]["confusion"]["task_aware"].matrix().tolist() == both
    assert rows["half"]["confusion"]["task_aware"].matrix().tolist() == second, "no answer to what it does not know"


def test_every_image_is_encoded_once_per_model(module, weights):
    seen = []
    module.backbone.model[1].register_forward_hook(lambda part, given, out: seen.append(len(out)))
    run(module, weights)
    assert sum(seen) == 3 * 31


def test_the_module_is_the_same_afterwards(module, weights):
    module.train()
    module.backbone.model[3].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    trained = [p.requires_grad for p in module.parameters()]
    run(module, weights)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == trained
    assert all(not p.is_inference() for p in module.parameters())


@pytest.mark.parametrize("part", ["whole", "layer"])
def test_compiled_modules_are_evaluated_with_the_given_weights(module, weights, part):
    rows = run(module, weights)
    model = module.backbone.model
    if part == "whole":
        module.backbone.model = torch.compile(model, backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
    assert any("_orig_mod" in name for name, _ in module.named_parameters())
    torch.compiler.set_stance("force_eager")
    try:
        assert run(module, weights) == rows
    finally:
        torch.compiler.set_stance("default")


def test_weights_of_another_architecture_are_refused(module):
    with pytest.raises(RuntimeError, match=r"'backbone\.model\.9\.weight'.*as model 'ties' has it, got none"):
        run(module, {"ties": {"backbone.model.9.weight": torch.zeros(2)}})
    with pytest.raises(RuntimeError, match=r"of shape \(2,\).*as model 'ties' has it, got shape \(6,\)"):
        run(module, {"ties": {"backbone.model.1.bias": torch.zeros(2)}})


def test_an_evaluator_that_has_not_run_has_no_rows(module):
    with pytest.raises(RuntimeError, match=r"call trainer\.test first"):
        Evaluator(module, {"expert": Merged()}, CLASSES, 4).rows()


def test_accuracy_on_counts_right_images_in_evaluation_mode(module):
    data = Data()
    with torch.no_grad():
        expected = (module.eval()(data.images).argmax(dim=1) == data.labels).double().mean()
    module.train()
    module.backbone.model[3].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert accuracy_on(module, data.test_dataloader()) == float(expected)
    assert 0 < expected < 1
    assert module.training
    assert not module.backbone.model[3].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_accuracy_on_no_images_is_refused(module):
    with pytest.raises(ValueError, match="expected images"):
        accuracy_on(module, [])


def figures(**options):
    """What a module is told about the images: rows, accuracy, and prototypes before and after a run."""
    torch.manual_seed(0)
    module, data, runner = ContinualClassifier(ToyBackbone(), CosineHead()), Data(), trainer(**options)
    module.begin_stream(4)
    module.begin_task(range(4), data.test_dataloader())
    rows = evaluate(runner, module, {"expert": Merged()}, data, task_classes=CLASSES, num_classes=4, confusion=True)
    answers = rows["expert"].pop("confusion")
    rows["expert"]["answers"] = {setting: found.to_dict() for setting, found in answers.items()}
    accuracy = accuracy_on(module, data.test_dataloader())
    again = ContinualClassifier(module.backbone, CosineHead())
    again.begin_stream(4)
    again.begin_task(range(4), data.test_dataloader())
    difference = (again.head.blocks[0] - module.head.blocks[0]).detach().abs().max()
    return {"rows": rows, "accuracy": accuracy, "difference": float(difference)}, runner.global_rank


SCRIPT = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
from evaluation.test_evaluate import figures

found, rank = figures(strategy="ddp", devices=2)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_figures_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected, _ = figures()
    assert 0 < expected["accuracy"] < 1
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["rows"] == expected["rows"]
        assert found["accuracy"] == expected["accuracy"]
        assert found["difference"] < 1e-6, "every process has a share of the images, and their common means"
