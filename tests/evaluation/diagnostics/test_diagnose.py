import json
from functools import partial

import pytest
import torch
from support.toy_backbone import ToyBackbone
from torchvision.transforms.functional import to_tensor

from clmerge.evaluation.diagnostics import diagnose, diagnose_vectors
from clmerge.models import LinearHead
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights import TaskVectorBank, apply_task_vector


def transform(image):
    return to_tensor(image)[:, 2:6, 2:6].expand(3, 4, 4)


def stream_of(num_tasks, val_fraction):
    data = StreamDataModule(16)
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks, val_fraction=val_fraction)
    data.setup_stream(stream, transform, transform)
    return data


def module_of(data):
    torch.manual_seed(0)
    module = ContinualClassifier(ToyBackbone(), LinearHead())
    module.begin_stream(10)
    for task in data.stream.tasks:
        module.begin_task(task.classes)
    return module


def bank_of(folder, base, num_tasks):
    bank = TaskVectorBank(folder)
    generator = torch.Generator().manual_seed(1)
    for task in range(num_tasks):
        bank.append(task, {name: torch.randn(w.shape, generator=generator) for name, w in base.items()})
    return bank


@pytest.mark.parametrize(("num_tasks", "val_fraction", "split"), [(2, 0.1, "val"), (2, 0.0, "test"), (1, 0.1, "val")])
def test_a_stream_is_diagnosed_in_one_call(tmp_path, num_tasks, val_fraction, split):
    data = stream_of(num_tasks, val_fraction)
    module = module_of(data)
    base = {name: module.get_parameter(name).detach().clone() for name in module.trained_names}
    bank = bank_of(tmp_path, base, num_tasks)
    told = []

    def run(seed):
        weights = partial(apply_task_vector, base)
        return diagnose(module, weights, bank, {"first": bank[0]}, data, num_images=12, seed=seed, progress=told.append)

    found = run(0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["tasks"] == [task.name for task in data.stream.tasks]
    assert found["models"]["split"] == split
    assert found["models"]["images"] == [12] * num_tasks
    assert found["models"]["models"]["first"]["representation_bias"][0] == 0.0
    assert found["vectors"] == (diagnose_vectors(bank) if num_tasks > 1 else None)
    assert told[0] == "diagnosing task vectors"
    assert run(0) == found
    # Other images are drawn by another seed, not always the first ones.
    assert run(1)["models"]["models"]["base"]["loss"] != found["models"]["models"]["base"]["loss"]
