import pytest
import torch

from clmerge.merging import TIES, GreedySoup, LayerScale, LiNeS, Pipeline, RandomDrop, TaskArithmetic
from clmerge.merging.finish.layers import block_indices

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


def automatic(reducer=None, sparsifier=None, tasks=range(4)):
    merger = Pipeline(reducer, sparsifier=sparsifier, finisher=LiNeS(alpha="auto", beta=0.8))
    for task in tasks:
        merger.update(VECTORS[task], task=task)
    return merger


def assert_close(merger, reducer, sparsifier=None, tasks=range(4)):
    """Compare with the formula: alpha = |sum|_1 / |merged|_1 / T in float64."""
    plain = Pipeline(reducer, sparsifier=sparsifier)
    for task in tasks:
        plain.update(VECTORS[task], task=task)
    merged = plain.compute()
    total = {name: sum(VECTORS[task][name].double() for task in tasks) for name in merged}
    norms = [sum(tensor.double().abs().sum().item() for tensor in vector.values()) for vector in (total, merged)]
    alpha = norms[0] / norms[1] / len(tasks)
    for name, tensor in merger.compute().items():
        rise = {"blocks.1.w": 0.4, "blocks.2.w": 0.8}.get(name, 0.0)
        torch.testing.assert_close(tensor.double(), merged[name].double() * (alpha + rise), rtol=1e-5, atol=1e-7)


NAMES = ["stem.w", "blocks.0.w", "blocks.1.w", "blocks.2.w"]
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = [{name: torch.randn(3, 4, generator=GENERATOR) for name in NAMES} for _ in range(4)]


@pytest.mark.parametrize("sparsifier", [None, RandomDrop(0.5)])
@pytest.mark.parametrize("reducer", [TaskArithmetic(0.3), TIES(0.5)])
def test_automatic_alpha_gives_the_merged_vector_the_norm_of_the_mean(reducer, sparsifier):
    for count in range(1, 5):
        assert_close(automatic(reducer, sparsifier, range(count)), reducer, sparsifier, range(count))


def test_automatic_alpha_survives_joining_saving_and_taking_out():
    reducer = TaskArithmetic(0.3)
    merger = automatic(reducer, tasks=(0, 1))
    merger.merge_state(automatic(reducer, tasks=(2, 3)))
    assert_close(merger, reducer)
    resumed = automatic(reducer, tasks=())
    resumed.load_state_dict(merger.state_dict())
    assert_close(resumed, reducer)
    resumed.downdate(VECTORS[3], task=3)
    assert_close(resumed, reducer, tasks=range(3))
    assert resumed.state_size({"w": (48,)}, 3) == 2 * 4 * 48
    zero = automatic(reducer, tasks=())
    zero.update({name: torch.zeros(2) for name in NAMES})
    assert not any(tensor.any() for tensor in zero.compute().values())


def test_automatic_alpha_takes_a_pipeline_that_does_not_score():
    with pytest.raises(ValueError, match="Pipeline"):
        LiNeS(alpha="auto").finish({"blocks.0.w": torch.ones(1), "blocks.1.w": torch.ones(1)})
    with pytest.raises(ValueError, match="a number or 'auto'"):
        LiNeS(alpha="norm")
    with pytest.raises(ValueError, match="set its alpha"):
        automatic(GreedySoup(), tasks=())
