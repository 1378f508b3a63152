"""Whole runs of the learner in the low-rank and rescaling modes."""

import open_clip
import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import tiny_clip
from torch import nn

from clmerge import ContinualClassifier, Learner
from clmerge.merging import TALL, Fisher, MagMax, RegMean, TaskArithmetic
from clmerge.models import IA3, Adapters, LinearHead, LoRA, OpenClip, Timm, ZeroShotHead, add_adapters
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank, load_metadata, load_tensors
from clmerge.weights.parametrization import dense_weights, folded

pytestmark = pytest.mark.usefixtures("no_pictures")


def learner(backbone, tuning, mergers, **options):
    torch.manual_seed(0)
    module = ContinualClassifier(
        backbone,
        ZeroShotHead() if isinstance(backbone, OpenClip) else LinearHead(),
        tuning=tuning,
        loss_classes="current",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=2)
    return Learner(stream, module, mergers, StreamDataModule(64), statistics_images=8, **options)


def run(built, folder):
    def trainer(**given):
        return Trainer(accelerator="cpu", **{"max_epochs": 1, "limit_train_batches": 3} | given)

    return built.fit(RunFolder.create(folder), trainer=trainer)


@pytest.mark.parametrize(
    ("family", "tuning"), [("open_clip", LoRA(rank=2)), ("timm", LoRA(rank=2)), ("open_clip", IA3())], ids=repr
)
def test_the_final_models_are_dense_and_load_into_the_backbone_alone(tmp_path, family, tuning, capsys):
    backbone = OpenClip(tiny_clip(tmp_path / "clip")) if family == "open_clip" else Timm("test_vit", image_size=32)
    keys = set(backbone.model.state_dict())
    built = learner(backbone, tuning, [TaskArithmetic(scale=1.0), Fisher(), RegMean(), TALL()], start_policy="base")
    run(built, tmp_path / "run")
    assert repr(tuning) in capsys.readouterr().err, "what is trained is said"
    bank = TaskVectorBank(tmp_path / "run" / "bank")
    assert ("low_rank" in bank.metadata(0)) == isinstance(tuning, LoRA)
    total = {name: sum(tau[name] for tau in bank) for name in built.merge.base}
    assert all(tensor.any() for name, tensor in total.items() if name.endswith("weight"))
    for name, tensor in built.merge.merged_state("task_arithmetic").items():
        torch.testing.assert_close(tensor, built.merge.base[name] + total[name])
    images = torch.rand(2, 3, *((8, 8) if family == "open_clip" else (32, 32)))
    for name in built.merge.mergers:
        file = tmp_path / "run" / "model" / f"{name}.safetensors"
        assert load_metadata(file)["tuning"] == repr(tuning)
        saved = load_tensors(file)
        assert set(saved) == keys
        fresh = (
            open_clip.create_model(tiny_clip(tmp_path / "clip"))
            if family == "open_clip"
            else Timm("test_vit", image_size=32).model
        )
        fresh.load_state_dict(saved)
        with built.merge.merged(built.module, name), torch.no_grad():
            expected = built.module.eval().backbone(images)
        encode = fresh.eval().encode_image if family == "open_clip" else fresh.eval()
        with torch.no_grad():
            torch.testing.assert_close(encode(images), expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_dense_weights(tmp_path):
    """What is measured on an adapted model is what is measured on an ordinary one with the same weights."""

    def measured(tuning, weights=None):
        built = learner(OpenClip(tiny_clip(tmp_path / "clip")), tuning, [Fisher(), RegMean()], start_policy="base")
        module = built.module.eval()
        built.data.setup_stream(built.stream, module.backbone.train_transform, module.backbone.eval_transform)
        module.begin_stream(10, built.stream.class_prompts)
        module.begin_task(built.tasks[0].classes)
        module.trainer = type("Done", (), {"global_step": 1})()
        if weights is None:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if "lora_B" in name:
                        nn.init.normal_(parameter, std=0.3)
        else:
            module.load_state_dict(weights)
        built.merge.take_base(module)
        statistics = built._statistics(module)
        with folded(module):
            return statistics, {name: tensor.clone() for name, tensor in module.state_dict().items()}

    adapted, weights = measured(LoRA(rank=2))
    plain, _ = measured(None, weights)
    for kind in ("fisher", "gram"):
        assert adapted[kind]
        for name, tensor in adapted[kind].items():
            torch.testing.assert_close(tensor, plain[kind][name], rtol=1e-3, atol=1e-7)


def test_a_final_model_with_bottlenecks_loads_after_they_are_added(tmp_path):
    built = learner(OpenClip(tiny_clip(tmp_path / "clip")), Adapters(width=2), [MagMax()])
    run(built, tmp_path / "run")
    fresh = open_clip.create_model(tiny_clip(tmp_path / "clip"))
    add_adapters(fresh.visual, width=2)
    fresh.load_state_dict(load_tensors(tmp_path / "run" / "model" / "magmax.safetensors"))
    saved = dense_weights(fresh, [name.removeprefix("backbone.model.") for name in built.merge.base])
    assert all(torch.equal(t, saved[n.removeprefix("backbone.model.")]) for n, t in built.merge.merged_state().items())
