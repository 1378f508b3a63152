import json

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.records import without_times
from support.tiny import toy_loader
from torch import nn
from torch.nn import functional

from clmerge import ContinualClassifier, Learner
from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax, TaskArithmetic
from clmerge.models import LinearHead, Linearized, OpenClip, Partial, TangentModule, Timm
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank, load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")


def trained(backbone):
    return [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]


def test_the_image_tower_of_clip_is_linearized(clip):
    plain, backbone = OpenClip(clip), OpenClip(clip)
    names = Linearized().prepare(backbone)
    assert isinstance(backbone.model.visual, TangentModule)
    assert names == [name for name, _ in plain.model.named_parameters() if name.startswith("visual.")]
    assert trained(backbone) == [f"model.visual.tangent.{name.removeprefix('visual.')}" for name in names]
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(backbone(images), plain(images))
    torch.testing.assert_close(backbone.encode_text(["a cat"]), plain.encode_text(["a cat"]))


@pytest.mark.parametrize("settings", [{"scope": "attention"}, {"scope": ["blocks.0.*"]}, {"last_blocks": 1}])
def test_a_part_is_linearized(settings):
    expected = Partial(**{"scope": None} | settings).prepare(Timm("test_vit", image_size=32))
    backbone = Timm("test_vit", image_size=32)
    assert Linearized(**settings).prepare(backbone) == expected
    assert trained(backbone) == [f"model.tangent.{name}" for name in expected]


def test_what_is_not_part_of_the_encoder_is_refused(clip):
    with pytest.raises(ValueError, match=r"within the image encoder 'visual'.*'token_embedding\.weight'"):
        Linearized(scope=["token_embedding.weight", "visual.*"]).prepare(OpenClip(clip))


def test_settings_reach_the_module(clip):
    backbone = OpenClip(clip)
    Linearized(decay_to="zero", evaluate="nonlinear", checkpointing=True).prepare(backbone)
    module = backbone.model.visual
    assert (module.decay_to, module.evaluate) == ("zero", "nonlinear")
    assert "forward" in vars(module.base.transformer.resblocks[0])


def make_learner(backbone, tuning, mergers, head=None, **options):
    torch.manual_seed(0)
    module = ContinualClassifier(
        backbone,
        head,
        tuning=tuning,
        loss_classes="current" if head else "all",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=3, val_fraction=0.1)
    return Learner(stream, module, mergers, StreamDataModule(64), **options)


def build_trainer(**given):
    options = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"} | given
    return Trainer(**options)


def run(learner, folder):
    return learner.fit(RunFolder.create(folder), trainer=build_trainer)


@pytest.mark.parametrize("start_policy", ["base", "previous", "merged"])
def test_a_run_merges_and_evaluates_in_the_tangent_space(clip, tmp_path, start_policy):
    """The row of a merged model is the accuracy of: features of theta_0, plus the sum of the tasks' increments."""
    mergers = [TaskArithmetic(scale=0.5), TIES(), MagMax()]
    learner = make_learner(OpenClip(clip), Linearized(), mergers, start_policy=start_policy)
    results = run(learner, tmp_path / "run")
    base, encoder = OpenClip(clip), learner.module.backbone.model.visual.eval()
    bank = list(TaskVectorBank(tmp_path / "run" / "bank"))
    correct, total = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for images, labels, tasks in learner.data.eval_dataloader("test"):
            start = base(images)
            features = start.clone()
            for tau in bank:
                encoder.tangent.load_state_dict({n.removeprefix("backbone.model.visual."): t for n, t in tau.items()})
                features += 0.5 * (encoder(images) - start)
            hit = learner.module.head(features).argmax(dim=1) == labels
            correct.index_add_(0, tasks, hit.float())
            total.index_add_(0, tasks, torch.ones(len(labels)))
    expected = (correct / total).tolist()
    assert results.matrix("task_arithmetic")[-1] == pytest.approx(expected, abs=0.01)
    saved = load_tensors(tmp_path / "run" / "model" / "task_arithmetic.safetensors")
    base.model.load_state_dict(saved)  # an ordinary model of that architecture: theta_0 + tau
    merged = learner.merge.merged_state("task_arithmetic")
    assert all(torch.equal(saved[n.removeprefix("backbone.model.")], t) for n, t in merged.items())


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    """A timm model with a head that grows; stopped in the second task."""

    def learner():
        torch.manual_seed(0)
        return make_learner(Timm("test_vit", image_size=32), Linearized(last_blocks=1), [MagMax()], LinearHead())

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.epoch_offset + trainer.current_epoch == 3:
                raise RuntimeError("stopped")

    def stopping(**given):
        return build_trainer(**given | {"callbacks": [*given["callbacks"], Stop()]})

    whole = run(learner(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        learner().fit(RunFolder.create(tmp_path / "run"), trainer=stopping)
    resumed = learner().fit(RunFolder.open(tmp_path / "run"), trainer=build_trainer)
    ours, theirs = (json.loads(json.dumps(without_times(r.to_dict()))) for r in (resumed, whole))
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs
    for file in ("magmax", "head"):
        again, once = (load_tensors(tmp_path / name / "model" / f"{file}.safetensors") for name in ("run", "whole"))
        assert all(torch.equal(again[key], tensor) for key, tensor in once.items())


class Foreign(LightningModule):
    """A module that has never heard of merging, with a tangent model in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = TangentModule(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(**options):
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_callback_merges_tangents_in_a_foreign_project():
    module, merge = Foreign(), MergeCallback(TaskArithmetic(scale=1.0), start_policy="base")
    start = module.net(torch.eye(4))
    increments = []
    for task in range(2):
        quiet(callbacks=[merge]).fit(module, toy_loader(task))
        increments.append(module.net(torch.eye(4)) - start)
    assert set(merge.base) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    with merge.merged(module):
        torch.testing.assert_close(module.net(torch.eye(4)), start + sum(increments))
    predictions = torch.cat(quiet(callbacks=[merge]).predict(module, toy_loader(0)))
    images = torch.cat([x for x, _ in toy_loader(0)])
    with merge.merged(module):
        torch.testing.assert_close(predictions, module.net(images).detach())
