import json

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.tiny import TINY_CLIP, tiny_clip

from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.merging import MagMax
from clmerge.models import OpenClip, Timm
from clmerge.weights import TaskVectorBank, fingerprint


def published(library, dtype, folder):
    """A base as it is published, and a backbone that loaded it for smaller images."""
    base = folder / "base.safetensors"
    if library == "timm":
        state = timm.create_model("test_vit", img_size=64).state_dict()
    else:
        large = json.loads(json.dumps(TINY_CLIP["model_cfg"]))
        large["vision_cfg"]["image_size"] = 16
        state = open_clip.CLIP(**large).state_dict()
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, base)
    if library == "timm":
        return base, Timm("test_vit", checkpoint=str(base), image_size=32), "pos_embed"
    return base, OpenClip(tiny_clip(folder / "clip"), pretrained=str(base)), "visual.positional_embedding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_run_at_another_image_size_is_merged_with_the_published_base(library, dtype, tmp_path):
    base, backbone, positions = published(library, dtype, tmp_path)
    theta = {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}
    tau = {name: torch.full_like(value, 0.25) for name, value in theta.items()}
    TaskVectorBank(tmp_path / "bank").append(0, tau, base=fingerprint(theta))
    job = CheckpointMerge(base, models=[tmp_path / "bank"], merger=MagMax(1.0), dtype="float32", strict=True)
    old, new = tuple(load_file(base)[positions].shape), tuple(backbone.model.state_dict()[positions].shape)
    assert f"resampled {positions} of the base from {old} to {new}" in job.describe()
    job.run(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(merged[name], tensor + 0.25), name
    assert verify(tmp_path / "out.safetensors")[0] == []


def merged(base, models, folder, **options):
    paths = [folder / f"{index}.safetensors" for index in range(len(models))]
    for path, state in zip([folder / "base.safetensors", *paths], [base, *models], strict=True):
        save_file(state, path)
    return CheckpointMerge(folder / "base.safetensors", models=paths, merger=MagMax(), **options)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("pos_embed", (1, 17, 4), (1, 7, 4)),  # no square grid
        ("pos_embed", (1, 4, 4, 4), (1, 2, 2, 4)),
        ("pos_embed", (1, 17, 4), (1, 5, 8)),
        ("positional_embedding", (77, 4), (32, 4)),  # of text
        ("embeddings.position_embedding.weight", (17, 4), (5, 4)),
        ("blocks.0.relative_position_bias_table", (49, 4), (9, 4)),
    ],
)
def test_positions_that_cannot_be_resampled_are_refused(name, old, new, theta, models, tmp_path):
    base, models = theta | {name: torch.ones(old)}, [model | {name: torch.ones(new)} for model in models]
    with pytest.raises(ValueError, match="expected positions of one image size") as error:
        merged(base, models, tmp_path)
    for part in (repr(name), str(old), str(new), "base.safetensors", "0.safetensors", f"--exclude {name}"):
        assert part in str(error.value)
    merged(base, models, tmp_path, exclude=[name]).run(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], base[name])


def test_models_of_several_image_sizes_are_refused(theta, models, tmp_path):
    sizes = [(1, 17, 4), (1, 5, 4), (1, 17, 4)]
    models = [model | {"pos_embed": torch.ones(size)} for model, size in zip(models, sizes, strict=True)]
    with pytest.raises(ValueError, match=r"1\.safetensors; name a base of that size"):
        merged(theta | {"pos_embed": torch.ones(1, 17, 4)}, models, tmp_path)
