import pytest
import torch
from torch import nn

from clmerge.deploy.calibration.operated import (
    FEATURES,
    Adapters,
    Operated,
    behind_blocks,
    blocks_of,
    from_tensors,
    split_state,
    to_tensors,
)
from clmerge.models import Classifier, LinearHead, OpenClip, Timm

BLOCK = "model.visual.transformer.resblocks.1"


def adapters(tasks, rank, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Adapters(
        torch.randn(tasks, rank, width, generator=generator), torch.randn(tasks, width, rank, generator=generator)
    )


def classifier(clip):
    torch.manual_seed(0)
    module = Classifier(OpenClip(clip), LinearHead(), loss_classes="seen")
    module.begin_stream(4)
    module.begin_task([0, 1, 2, 3])
    return module.eval().requires_grad_(False)


def test_zeros_above_change_nothing_to_the_bit():
    z = torch.randn(5, 3, 8)
    assert torch.equal(Adapters(torch.randn(2, 4, 8), torch.zeros(2, 8, 4))(z, torch.tensor([0, 1, 1, 0, 1])), z)


def test_every_image_has_the_matrices_of_its_task():
    one = adapters(3, 4, 8)
    tasks = torch.tensor([2, 0, 2, 1])
    for z in (torch.randn(4, 8), torch.randn(4, 5, 8)):
        expected = [x - (x @ one.down[t].T).clamp(min=0) @ one.up[t].T for x, t in zip(z, tasks, strict=True)]
        torch.testing.assert_close(one(z, tasks), torch.stack(expected))


def test_a_bias_of_the_same_form_is_taken_away_exactly():
    true = adapters(1, 4, 8)
    z = torch.randn(6, 8, dtype=torch.float64)
    bias = (z @ true.down[0].double().T).clamp(min=0) @ true.up[0].double().T  # z - z_expert
    found = true.double()(z, torch.zeros(6, dtype=torch.long))
    assert (found - (z - bias)).abs().mean() < 1e-14


@pytest.mark.parametrize("places", [(FEATURES,), (FEATURES, BLOCK)])
def test_logits_of_an_image_do_not_depend_on_the_others_of_its_batch(clip, places):
    module, images = classifier(clip), torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        centroids = module.backbone(images[:3])
    model = Operated(module, {place: adapters(3, 2, 8, seed) for seed, place in enumerate(places)}, centroids).eval()
    with torch.no_grad():
        together = model(images)
        chosen = model.chosen.tolist()
        alone = torch.cat([model(image[None]) for image in images])
        told = Operated(model.classifier, dict(zip(places, model.adapters, strict=True)))(images, torch.tensor(chosen))
    assert len({*chosen}) > 1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told, together)


def test_blocks_are_computed_with_their_adapters_and_let_go_of_them(clip):
    module = classifier(clip)
    images, tasks = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    one = adapters(2, 2, 8)
    with torch.no_grad():
        plain = module(images)
        found = Operated(module, {BLOCK: one})(images, tasks)
        with behind_blocks(module.backbone, [BLOCK], lambda place, z: one(z, tasks)):
            expected = module(images)
        again = module(images)
    assert torch.equal(found, expected)
    assert torch.equal(again, plain)
    assert not torch.allclose(found, plain)


def test_tensors_give_the_model_again(clip):
    module = classifier(clip)
    model = Operated(module, {FEATURES: adapters(2, 3, 8), BLOCK: adapters(2, 3, 8, 1)}, torch.randn(2, 8))
    tensors = to_tensors(dict(zip((FEATURES, BLOCK), model.adapters, strict=True)), model.centroids)
    own, found = split_state({"backbone.w": torch.zeros(1), **tensors})
    assert list(own) == ["backbone.w"]
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(from_tensors(module, found)(images), model(images))


def test_blocks_are_those_of_the_image_tower(clip):
    assert blocks_of(OpenClip(clip)) == [f"model.visual.transformer.resblocks.{index}" for index in range(2)]
    assert blocks_of(Timm("test_vit")) == [f"model.blocks.{index}" for index in range(6)]

    class Plain(nn.Module):
        encoder = ""

        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert blocks_of(Plain()) == []
