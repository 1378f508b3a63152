import pytest
import torch

from clmerge.merging import LayerScale, LiNeS
from clmerge.merging.layers import block_indices

CLIP = [f"visual.transformer.resblocks.{index}.ln_1.bias" for index in range(12)]
OUTSIDE = ["visual.conv1.weight", "visual.ln_post.weight", "visual.proj"]


def coefficients(finisher, names):
    return [tensor.item() for tensor in finisher.finish({name: torch.tensor(1.0) for name in names}).values()]


def test_lines_rises_from_alpha_to_alpha_plus_beta():
    found = coefficients(LiNeS(alpha=0.2, beta=1.1), [*OUTSIDE, *CLIP])
    assert found == pytest.approx([0.2] * 3 + [0.2 + 0.1 * index for index in range(12)])


def test_towers_have_their_own_depth():
    names = ["blocks.0.w", "blocks.1.w", "blocks.2.w", "text.blocks.0.w", "text.blocks.1.w"]
    assert coefficients(LiNeS(alpha=1.0, beta=2.0), names) == [1.0, 2.0, 3.0, 1.0, 3.0]


def test_depth_can_be_given_where_only_shallow_blocks_are_merged():
    assert coefficients(LiNeS(alpha=0.0, beta=1.0, num_blocks=5), ["blocks.1.w", "blocks.2.w"]) == [0.25, 0.5]
    with pytest.raises(ValueError, match="set num_blocks"):
        coefficients(LiNeS(num_blocks=2), ["blocks.2.w"])
    with pytest.raises(ValueError, match="set num_blocks"):
        coefficients(LiNeS(), ["blocks.0.w"])


def test_layer_scale_takes_one_coefficient_per_block():
    names = ["stem.w", "h.0.w", "h.1.w", "h.1.b"]
    assert coefficients(LayerScale([2.0, 3.0], default=5.0), names) == [5.0, 2.0, 3.0, 3.0]
    with pytest.raises(ValueError, match=r"each of the 2 blocks .*, got 3"):
        coefficients(LayerScale([1.0, 2.0, 3.0]), names)


@pytest.mark.parametrize(
    "name",
    [
        "visual.transformer.resblocks.7.attn.in_proj_weight",
        "blocks.7.mlp.fc1.weight",
        "vision_model.encoder.layers.7.self_attn.k_proj.bias",
        "bert.encoder.layer.7.output.dense.weight",
        "transformer.h.7.ln_1.weight",
    ],
)
def test_blocks_of_the_usual_libraries_are_found(name):
    assert block_indices([name, "head.3.weight"]) == {name: 7}


def test_other_names_of_blocks_and_none_at_all():
    names = ["stages.0.1.w", "stages.1.0.w"]
    assert coefficients(LiNeS(alpha=0.0, beta=1.0, block=r"stages\.(\d+)\."), names) == [0.0, 1.0]
    with pytest.raises(ValueError, match="numbered blocks"):
        coefficients(LiNeS(), names)


@pytest.mark.parametrize(("block", "message"), [(r"blocks\.\d+", "got 0"), ("(", "a regular expression")])
def test_patterns_without_an_index_are_refused(block, message):
    for finisher in (LiNeS, lambda **arguments: LayerScale([1.0], **arguments)):
        with pytest.raises(ValueError, match=message):
            finisher(block=block)
