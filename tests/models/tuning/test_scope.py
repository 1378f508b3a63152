import pytest
from support.tiny import tiny_clip
from torch import nn

from clmerge.models import Full, OpenClip, Partial, Timm


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return OpenClip(tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def vit():
    return Timm("test_vit", image_size=32)


def trained(backbone):
    return [name for name, p in backbone.model.named_parameters() if p.requires_grad]


def test_full_trains_what_the_backbone_offers(clip, vit):
    assert Full().prepare(clip) == trained(clip) == [n for n, _ in clip.model.named_parameters() if "visual." in n]
    assert Full().prepare(vit) == [n for n, _ in vit.model.named_parameters()]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("attention", {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}),
        ("mlp", {"mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}),
        ("layernorm", {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"}),
        (
            "bias",
            {"attn.in_proj_bias", "attn.out_proj.bias", "ln_1.bias", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"},
        ),
    ],
)
def test_named_scopes_of_clip_are_in_the_image_tower(clip, scope, expected):
    names = Partial(scope).prepare(clip)
    assert names == trained(clip)
    assert all(name.startswith("visual.") for name in names)
    block = "visual.transformer.resblocks.1."
    assert {name.removeprefix(block) for name in names if name.startswith(block)} == expected


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("attention", {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"}),
        ("mlp", {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}),
        ("layernorm", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}),
    ],
)
def test_named_scopes_of_timm(vit, scope, expected):
    names = Partial(scope).prepare(vit)
    assert expected == {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}


def test_scopes_are_united_and_the_last_blocks_cut_them(vit):
    depth = len(vit.model.blocks)
    both = Partial(["mlp", "blocks.0.norm1.*"]).prepare(vit)
    assert {"blocks.0.mlp.fc1.weight", "blocks.0.norm1.bias"} <= set(both)
    assert "blocks.0.attn.qkv.weight" not in both
    last = Partial(last_blocks=1).prepare(vit)
    assert last
    assert all(name.startswith(f"blocks.{depth - 1}.") for name in last)
    assert Partial("bias", last_blocks=1).prepare(vit) == [name for name in last if name.endswith("bias")]
    assert set(Partial("layernorm").prepare(vit)) > {"norm.weight", "norm.bias"}


def test_another_tuning_starts_afresh(clip):
    Partial("bias").prepare(clip)
    assert len(Full().prepare(clip)) > 20


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (lambda: Partial(), "expected a scope .*or last_blocks, got neither"),
        (lambda: Partial("attentoin").prepare, "got 'attentoin'; did you mean 'attention'"),
        (lambda: Partial("mlp", last_blocks=0), "last_blocks of 1 or more, got 0"),
        (lambda: Partial(["visuall.*"]).prepare, r"'visuall\.\*'.*'visual\.\*'"),
        (lambda: Partial([]).prepare, "expected parameters to train"),
        (lambda: Partial("attention", last_blocks=9).prepare, "at most 2, the blocks of the backbone, got 9"),
        (lambda: Partial("visual.proj", last_blocks=1).prepare, "expected parameters to train in scope 'visual.proj'"),
    ],
)
def test_what_trains_nothing_is_refused(clip, tuning, message):
    with pytest.raises(ValueError, match=message):
        tuning()(clip)


def test_a_scope_that_a_network_does_not_have_is_refused():
    backbone = Timm("test_vit", image_size=32)
    backbone.model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="parameters in scope 'attention', got Sequential"):
        Partial("attention").prepare(backbone)


def test_a_tuning_says_what_it_is():
    assert repr(Partial("mlp", last_blocks=2)) == "Partial(scope='mlp', last_blocks=2)"
    assert repr(Full()) == "Full()"
