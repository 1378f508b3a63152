import pytest
import torch

from clmerge.merging import IsoC, MagMax, Matrices, Pipeline

SHAPES = {
    "positional_embedding": (9, 4),
    "attn.in_proj_weight": (12, 4),
    "attn.in_proj_bias": (12,),
    "attn.out_proj.weight": (4, 4),
    "conv1.weight": (4, 3, 2, 2),
    "visual.proj": (4, 6),
    "nothing": (0, 4),
}


def test_two_dimensions_make_a_matrix():
    found = [name for name, shape in SHAPES.items() if Matrices().count(name, shape)]
    assert found == ["positional_embedding", "attn.in_proj_weight", "attn.out_proj.weight", "visual.proj"]


def test_patterns_choose_and_the_choice_is_listed():
    merger = IsoC(include=["attn.*", "visual.*"], exclude=["*.out_proj.*"], split_qkv=True)
    assert merger.matrices(SHAPES) == ["attn.in_proj_weight: 3 x (4, 4)", "visual.proj: (4, 6)"]
    assert IsoC().matrices({"attn.in_proj_weight": (12, 4)}) == ["attn.in_proj_weight: (12, 4)"]


def test_blocks_of_one_kind_share_a_line_and_rules_without_matrices_have_none():
    blocks = {f"blocks.{index}.mlp.0.weight": (8, 4) for index in range(12)}
    shapes = blocks | {"blocks.3.attn.qkv.weight": (12, 4), "layer1x.weight": (2, 2)}
    wanted = ["blocks.*.mlp.*.weight: (8, 4), 12 times", "blocks.*.attn.qkv.weight: (12, 4)", "layer1x.weight: (2, 2)"]
    assert IsoC().matrices(shapes) == wanted
    assert Pipeline(IsoC()).matrices(shapes) == wanted
    assert MagMax().matrices(shapes) == []


def test_only_fused_shapes_are_split():
    matrices = Matrices(split_qkv=True)
    assert matrices.count("blocks.0.attn.qkv.weight", (12, 4)) == 3
    assert matrices.count("blocks.0.attn.qkv.weight", (8, 4)) == 1
    assert matrices.count("fc.weight", (12, 4)) == 1


@pytest.mark.parametrize("pattern", ["attn.in_prj_weight", "*.in_proj_bias"])
def test_a_pattern_that_matches_no_matrix_is_refused_before_anything_changes(pattern):
    merger = IsoC(exclude=[pattern])
    with pytest.raises(ValueError, match="in_proj_weight"):
        merger.update({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    assert merger.num_tasks == 0


def test_patterns_need_the_whole_model():
    assert IsoC().scope == "parameter"
    assert IsoC(exclude=["*_embedding"]).scope == "model"
