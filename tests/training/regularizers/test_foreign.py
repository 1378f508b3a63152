"""Classifiers of other architectures teach the one in training, which can then be merged."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import transforms

from clmerge.cli import main
from clmerge.models import Backbone, LinearHead, OpenClip, Timm
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.streams import SklearnDigits
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import Distillation, LossStep, Teacher
from clmerge.weights import TaskVectorBank, load_tensors


class Flat(Backbone):
    """A linear layer on images of one size, with its own normalisation."""

    def __init__(self, side, mean, std, features):
        super().__init__()
        self.feature_dim = features
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, features), nn.Tanh())
        steps = [transforms.Resize((side, side)), transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)]
        self.eval_transform = self.train_transform = transforms.Compose(steps)

    def forward(self, images):
        return self.model(images)


def student(*regularizers, loss_classes="current"):
    torch.manual_seed(0)
    backbone = Flat(8, 0.2, 0.5, 5)
    return ContinualClassifier(backbone, LinearHead(), loss_classes=loss_classes, regularizers=list(regularizers))


def head_file(path, rows, width, *, bias=True, prefix="head.", seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{prefix}weight": torch.randn(rows, width, generator=generator)}
    if bias:
        tensors[f"{prefix}bias"] = torch.randn(rows, generator=generator)
    save_file(tensors, path)
    return tensors


def plain(colours):
    """Images of one colour each, which any resizing leaves as they are."""
    return [Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)) for value in colours]


def test_the_term_is_the_cross_entropy_with_the_mean_of_what_the_teachers_see(tmp_path):
    torch.manual_seed(1)
    teachers = [Flat(12, 0.5, 0.25, 7), Flat(8, 0.2, 0.5, 3)]
    heads = [
        head_file(tmp_path / "a.safetensors", 4, 7),
        head_file(tmp_path / "b.safetensors", 3, 3, bias=False, prefix="", seed=1),
    ]
    orders = [[0, 1, 2, 3], [3, 0, 2]]
    term = Distillation(
        [
            Teacher(teachers[0], str(tmp_path / "a.safetensors")),
            Teacher(teachers[1], str(tmp_path / "b.safetensors"), orders[1]),
        ],
        strength=0.3,
        temperature=3.0,
    )
    module = student(term)
    module.begin_stream(5 - 1)
    module.begin_task([0, 1, 3])
    images = plain([10, 200, 90])
    seen = torch.stack([module.backbone.eval_transform(image) for image in images])
    features = module.backbone(seen)
    logits = module.head(features)
    value = term.penalty(LossStep(module, seen, features, logits))
    told = []
    for teacher, head, order in zip(teachers, heads, orders, strict=True):
        own = torch.stack([teacher.eval_transform(image) for image in images])
        weight, bias = head.get("head.weight", head.get("weight")), head.get("head.bias")
        found = functional.linear(teacher(own), weight, bias)
        told.append((found[:, [order.index(0), order.index(3)]] / 3.0).softmax(1))  # class 1 is not known to both
    log = (logits[:, [0, 3]] / 3.0).log_softmax(1)
    expected = -0.3 * 9.0 * float(((told[0] + told[1]) / 2 * log).sum(1).mean().detach())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())
    assert next(module.backbone.parameters()).grad.abs().max() > 0
    assert not list(term.parameters())
    module.begin_task([1])
    assert float(term.penalty(LossStep(module, seen, features, logits))) == 0.0


def test_what_does_not_fit_is_said(tmp_path):
    file = str(tmp_path / "a.safetensors")
    head_file(file, 4, 7)
    with pytest.raises(ValueError, match="expected teachers"):
        Distillation([])
    with pytest.raises(ValueError, match="positive temperature"):
        Distillation([Teacher(Flat(8, 0.5, 0.5, 7), file)], temperature=0.0)
    for teacher, message in [
        (Teacher(Flat(8, 0.5, 0.5, 6), file), "linear classifier of 6 features in .*got none"),
        (Teacher(Flat(8, 0.5, 0.5, 7), file), r"each of the 4 rows of a teacher, got \[0, 1, 2\]"),
        (Teacher(Flat(8, 0.5, 0.5, 7), file, [0, 1, 2, 3]), r"3 classes for each of the 4 rows"),
        (Teacher(Flat(8, 0.5, 0.5, 7)), "expected the file of a linear classifier as `head`"),
    ]:
        with pytest.raises(ValueError, match=message):
            student(Distillation([teacher])).begin_stream(3)


def test_a_clip_teaches_by_its_own_text():
    nano = OpenClip("nano")
    term = Distillation([Teacher(OpenClip("nano"))], temperature=1.0)
    module = ContinualClassifier(nano, loss_classes="all", regularizers=[term])
    module.begin_stream(2, [['a photo of the number: "two".'], ['a photo of the number: "six".']])
    seen = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        features = nano(seen)
        logits = module.head(features)
        value = term.penalty(LossStep(module, seen, features, logits))
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert float(value) == pytest.approx(float(entropy), rel=1e-4)  # it says what the student says


CONFIG = """
mergers: [MetaGPT]
model:
  backbone: OpenClip
  optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-3}}}}
  regularizers:
  - class_path: Distillation
    init_args:
      strength: 20.0
      teachers:
      - backbone: {{class_path: Timm, init_args: {{name: test_vit, image_size: 32, checkpoint: {file}}}}}
        head: {file}
stream:
  class_path: ClassIncremental
  init_args: {{num_tasks: 2, source: {{class_path: SklearnDigits, init_args: {{test_fraction: 0.3}}}}}}
learner: {{start_policy: base}}
data: {{batch_size: 64}}
trainer: {{max_epochs: 3, accelerator: cpu, limit_val_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


@pytest.mark.slow
def test_a_foreign_classifier_becomes_a_vector_of_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    torch.manual_seed(0)
    foreign, source = Timm("test_vit", image_size=32).eval(), SklearnDigits(test_fraction=0.3)
    images, labels = zip(*[source.train()[index] for index in range(len(source.train()))], strict=True)
    with torch.no_grad():
        features = foreign(torch.stack([foreign.eval_transform(image.convert("RGB")) for image in images]))
    # Digits are told as the next one of their task, so that what is learned is the teacher and not the labels.
    shifted = torch.tensor([label // 5 * 5 + (label + 1) % 5 for label in labels])
    wanted = 8.0 * functional.one_hot(shifted, 10).double()
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    solved = torch.linalg.solve(inputs.T @ inputs + 1e-2 * torch.eye(inputs.shape[1]), inputs.T @ wanted).float()
    file = tmp_path / "foreign.safetensors"
    head = {"head.weight": solved[:-1].T.contiguous(), "head.bias": solved[-1].contiguous()}
    save_file({k: v.contiguous() for k, v in foreign.model.state_dict().items()} | head, file)
    (tmp_path / "config.yaml").write_text(CONFIG.format(file=file))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(run)]) == 0
    names = load_tensors(run / "state" / "task_001" / "module.safetensors")
    assert not [name for name in names if not name.startswith(("backbone.", "head."))]

    results = Results.from_dict(RunFolder.open(run, writes=False).manifest.results)
    assert results.matrix("zero_shot", "task_aware").max() > 0.8
    assert results.matrix("expert", "task_aware").diagonal().max() < 0.3
    assert TaskVectorBank(run / "bank").tasks == [0, 1]
    model = OpenClip("nano").model
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, base)
    words = ["--merger", "MetaGPT", "--out", str(out)]
    assert main(["merge", "--base", str(base), "--models", str(run), *words]) == 0
    assert out.exists()
    capsys.readouterr()
