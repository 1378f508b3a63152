"""Runs of ``clmerge fit`` are merged with the base as its library publishes it."""

import pytest
import timm
import torch
from runs.test_learner import make_learner, run
from safetensors.torch import load_file, save_file
from support.tiny import tiny_clip

from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import TIES, MagMax
from clmerge.models import CosineHead, Timm


@pytest.fixture(scope="module", params=["open_clip", "timm"])
def trained(request, tmp_path_factory):
    """A base and a run that began with it."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        if request.param == "open_clip":
            base = folder / "clip" / "open_clip_model.safetensors"
            learner = make_learner(tiny_clip(folder / "clip"), [MagMax(0.5), TIES()], num_tasks=2)
        else:
            base = folder / "model.safetensors"
            save_file(timm.create_model("test_vit", img_size=32).state_dict(), base)  # with its classifier
            backbone = Timm("test_vit", checkpoint=str(base), image_size=32)
            learner = make_learner(None, [MagMax(0.5), TIES()], head=CosineHead(), backbone=backbone, num_tasks=2)
        run(learner, folder / "run")
    return base, folder / "run"


@pytest.mark.parametrize(("merger", "options"), [("magmax", ["MagMax", "--merger.scale=0.5"]), ("ties", ["TIES"])])
def test_a_run_is_merged_to_the_models_that_it_left(merger, options, trained, tmp_path, capsys):
    base, run = trained
    out = tmp_path / "m.safetensors"
    assert main(["merge", "--base", str(base), "--models", str(run), "--merger", *options, "--out", str(out)]) == 0
    found, expected = load_file(out), load_file(run / "model" / f"{merger}.safetensors")
    # What a file has besides is the published model's classifier, which no task vector touches.
    assert {name for name in found if name not in expected} <= {"head.weight", "head.bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert verify(out)[0] == []


def test_a_run_that_began_with_another_base_is_refused(trained, tmp_path, capsys):
    base, run = trained
    other = {name: tensor + 1 for name, tensor in load_file(base).items()}
    save_file(other, tmp_path / "other.safetensors")
    command = ["merge", "--base", str(tmp_path / "other.safetensors"), "--models", str(run), "--merger", "MagMax"]
    assert main([*command, "--out", str(tmp_path / "m.safetensors")]) == 1
    assert "name the checkpoint that the run began with" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_that_was_cast_for_training_is_recognised(dtype, theta, models, tmp_path):
    from clmerge.checkpoints.merge import CheckpointMerge
    from clmerge.weights import TaskVectorBank, fingerprint, task_vector

    cast = {f"backbone.model.{name}": tensor.to(dtype) for name, tensor in theta.items()}
    tau = {f"backbone.model.{name}": value for name, value in task_vector(models[0], theta).items()}
    TaskVectorBank(tmp_path / "bank").append(0, tau, base=fingerprint(cast))
    save_file(theta, tmp_path / "base.safetensors")
    job = CheckpointMerge(tmp_path / "base.safetensors", models=[tmp_path / "bank"], merger=MagMax())
    job.run(tmp_path / "out.safetensors")
    assert not torch.equal(load_file(tmp_path / "out.safetensors")["net.0.bias"], theta["net.0.bias"])
