import argparse
import gzip
import json
import os

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny import TINY_CLIP, tiny_clip
from torch import nn

from clmerge.checkpoints import open_checkpoint
from clmerge.models import Backbone, OpenClip, Timm
from clmerge.models.backbone import NANO
from clmerge.weights import TaskVectorBank

PROMPTS = ["a photo of a cat.", "a drawing"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def other_weights(tmp_path):
    """Weights of the tiny architecture that no folder brings, and the file they are in."""
    name = tiny_clip(tmp_path / "other", seed=7)
    return open_clip.create_model(name).state_dict(), tmp_path / "other" / "open_clip_model.safetensors"


@pytest.fixture
def builtin_tiny(monkeypatch):
    """The tiny architecture under a plain model name, like those that come with open_clip."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", TINY_CLIP["model_cfg"])
    return "ViT-tiny"


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", refuse)


def images(size, num=2):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def picture(size=(64, 48)):
    return Image.effect_noise(size, 80).convert("RGB")


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# open_clip ---------------------------------------------------------------------------------------------


def test_a_local_folder_gives_the_features_of_open_clip(tiny):
    backbone = OpenClip(tiny).eval()
    reference = open_clip.create_model(tiny).eval()
    assert torch.equal(backbone(images(8)), reference.encode_image(images(8)))
    assert backbone.feature_dim == 8


def test_the_embedded_nano_is_the_default_and_gives_the_features_of_open_clip():
    backbone = OpenClip().eval()
    reference = open_clip.create_model(f"local-dir:{NANO}").eval()
    assert torch.equal(backbone(images(28)), reference.encode_image(images(28)))
    assert backbone(images(28)).shape == (2, backbone.feature_dim)
    assert backbone.logit_scale() == pytest.approx(float(reference.logit_scale.detach().exp()))
    weight = open_clip.build_zero_shot_classifier(
        reference,
        open_clip.SimpleTokenizer(NANO / "bpe_simple_vocab.txt.gz", context_length=reference.context_length),
        ["cat"],
        [str],
    )
    text = nn.functional.normalize(backbone.encode_text(["cat"]), dim=-1)
    torch.testing.assert_close(text, weight.T)


def test_saved_weights_load_strictly_into_the_model_of_open_clip(tiny, tmp_path):
    saved = OpenClip(tiny).model.state_dict()
    save_file(saved, tmp_path / "saved.safetensors")
    model = open_clip.CLIP(**TINY_CLIP["model_cfg"])
    model.load_state_dict(load_file(tmp_path / "saved.safetensors"), strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in saved.items())


def test_the_folders_own_vocabulary_is_used(tiny, tmp_path):
    backbone = OpenClip(tiny).eval()
    folder = tiny.removeprefix("local-dir:")
    tokenize = open_clip.SimpleTokenizer(f"{folder}/bpe_simple_vocab.txt.gz", context_length=32)
    assert int(tokenize(PROMPTS).max()) == 513  # bytes, whole or at a word's end, and two marks
    reference = open_clip.create_model(tiny).eval()
    assert torch.equal(backbone.encode_text(PROMPTS), reference.encode_text(tokenize(PROMPTS)))
    assert backbone.encode_text(PROMPTS).shape == (2, 8)


def test_a_folder_without_a_vocabulary_uses_that_of_open_clip(tmp_path):
    name = tiny_clip(tmp_path)
    config = json.loads(json.dumps(TINY_CLIP))
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49408
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "bpe_simple_vocab.txt.gz").unlink()
    backbone = OpenClip(name).eval()
    tokens = open_clip.SimpleTokenizer(context_length=32)(PROMPTS)
    assert torch.equal(backbone.encode_text(PROMPTS), backbone.model.encode_text(tokens))


def test_a_folder_whose_tokenizer_brings_code_is_refused(tmp_path):
    name = tiny_clip(tmp_path)
    config = json.loads(json.dumps(TINY_CLIP))
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "own", "tokenizer_kwargs": {"trust_remote_code": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code for its tokenizer; nothing was run"):
        OpenClip(name)


def test_text_is_encoded_without_a_gradient(tiny):
    backbone = OpenClip(tiny)
    assert not backbone.encode_text(PROMPTS).requires_grad
    assert backbone(images(8)).requires_grad


@pytest.mark.parametrize(
    ("name", "tag"),
    [("ViT-B-16", "openai"), ("ViT-B-32", "OpenAI"), ("RN50", "openai"), ("ViT-L-14", "metaclip_fullcc")],
)
def test_weights_trained_with_quickgelu_are_refused_elsewhere_before_loading(no_loading, name, tag):
    with pytest.raises(ValueError, match=f"QuickGELU for pretrained='{tag}'.*use '{name}-quickgelu'"):
        OpenClip(name, pretrained=tag)


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k")])
def test_weights_under_the_right_activation_are_not_refused(no_loading, name, tag):
    with pytest.raises(AssertionError, match="a model was built"):
        OpenClip(name, pretrained=tag)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("ViT-B16-quickgelu", "ViT-B-16-quickgelu"), ("nanoo", "nano"), ("hub:ViT-B-16", "ViT-B-16")],
)
def test_an_unknown_name_names_the_nearest(no_loading, name, nearest):
    with pytest.raises(ValueError, match=f"got '{name}'; nearest: .*{nearest}"):
        OpenClip(name)


def test_a_folder_without_its_prefix_is_recognised(no_loading, tmp_path):
    with pytest.raises(ValueError, match=f"write 'local-dir:{tmp_path}'"):
        OpenClip(str(tmp_path))


def test_an_unknown_tag_names_the_known_ones(no_loading):
    with pytest.raises(ValueError, match=r"tag of ViT-B-32 .*got 'opnai'; tags: openai, .*laion2b_e16"):
        OpenClip("ViT-B-32", pretrained="opnai")


def test_a_tag_beside_a_folder_is_refused_instead_of_ignored(no_loading, tiny):
    for name in ("nano", tiny):
        with pytest.raises(ValueError, match=r"brings its own weights, got 'openai'"):
            OpenClip(name, pretrained="openai")


def test_a_checkpoint_file_is_loaded_under_a_plain_name(builtin_tiny, other_weights):
    state, file = other_weights
    found = OpenClip(builtin_tiny, pretrained=str(file)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_checkpoint_file_replaces_the_weights_of_a_folder(tiny, other_weights):
    state, file = other_weights
    assert not torch.equal(OpenClip(tiny).model.state_dict()["visual.proj"], state["visual.proj"])
    found = OpenClip(tiny, pretrained=str(file)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["folder", "plain"])
def test_a_checkpoint_of_another_model_is_named(tiny, builtin_tiny, tmp_path, name):
    save_file({"visual.proj": torch.zeros(3, 3)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"expected the weights of .* in .*bad\.safetensors, got: .*Missing key"):
        OpenClip(tiny if name == "folder" else builtin_tiny, pretrained=str(tmp_path / "bad.safetensors"))


def test_a_damaged_checkpoint_is_named(tiny, other_weights):
    _, file = other_weights
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"whole safetensors file, got .*open_clip_model\.safetensors: "):
        OpenClip(tiny, pretrained=str(file))


def test_a_pickle_is_refused_unopened(tiny, tmp_path):
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"a state dict in .*bomb\.pt, "):
        OpenClip(tiny, pretrained=str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    name = tiny_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the weights of 'local-dir:"):
        OpenClip(name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nothing")):
        OpenClip(f"local-dir:{tmp_path / 'nothing'}")


def test_an_image_tower_of_timm_says_its_feature_dim(tmp_path):
    config = json.loads(json.dumps(TINY_CLIP))
    config["model_cfg"]["vision_cfg"] = {
        "timm_model_name": "test_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with gzip.open(tmp_path / "bpe_simple_vocab.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2")
    model = open_clip.create_model("local-dir:" + str(tmp_path))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    backbone = OpenClip(f"local-dir:{tmp_path}")
    state = backbone.state_dict()
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in model.state_dict().items())
    assert backbone.training
    assert backbone.feature_dim == 8 == backbone(images(32)).shape[1]


# timm ---------------------------------------------------------------------------------------------


def test_timm_gives_the_features_of_timm():
    backbone = Timm("test_vit", image_size=32).eval()
    reference = timm.create_model("test_vit", img_size=32, num_classes=0).eval()
    reference.load_state_dict(backbone.model.state_dict())
    assert torch.equal(backbone(images(32)), reference(images(32)))
    assert backbone(images(32)).shape == (2, backbone.feature_dim) == (2, 64)


def test_the_models_own_image_size_is_the_default():
    assert Timm("test_vit.r160_in1k").eval_transform(picture()).shape == (3, 160, 160)


def test_a_convolutional_model_takes_an_image_size_too():
    backbone = Timm("test_resnet", image_size=32)
    assert backbone.eval_transform(picture()).shape == (3, 32, 32)
    assert backbone(images(32)).shape[1] == backbone.feature_dim


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_model_of_a_folder_takes_an_image_size_too(tmp_path, name):
    model = timm.create_model(name, num_classes=0)
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for checkpoint in (None, str(tmp_path / "model.safetensors")):
        backbone = Timm(f"local-dir:{tmp_path}", pretrained=checkpoint is None, checkpoint=checkpoint, image_size=32)
        assert backbone.eval_transform(picture()).shape == (3, 32, 32)
        assert backbone(images(32)).shape[1] == backbone.feature_dim
        first = next(name for name in model.state_dict() if name.endswith("weight"))
        assert torch.equal(backbone.model.state_dict()[first], model.state_dict()[first])


def test_feature_dim_is_that_of_the_features_where_a_model_projects_again():
    backbone = Timm("mobilenetv3_small_050", image_size=32).eval()
    assert backbone.model.num_features != backbone(images(32)).shape[1] == backbone.feature_dim


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_checkpoint_is_loaded_and_its_classifier_left_out(tmp_path, kind):
    whole = timm.create_model("test_vit", img_size=32).eval()
    file = tmp_path / f"weights.{kind}"
    save_file(whole.state_dict(), file) if kind == "safetensors" else torch.save(whole.state_dict(), file)
    backbone = Timm("test_vit", checkpoint=str(file), image_size=32).eval()
    expected = whole.forward_head(whole.forward_features(images(32)), pre_logits=True)
    assert torch.equal(backbone(images(32)), expected)


def test_a_checkpoint_that_lacks_weights_is_named(tmp_path):
    state = timm.create_model("test_vit", img_size=32, num_classes=0).state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"'test_vit' in .*short\.safetensors, got: .*norm\.weight"):
        Timm("test_vit", checkpoint=str(tmp_path / "short.safetensors"), image_size=32)


def test_a_pickled_timm_checkpoint_is_refused_unopened(tmp_path):
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"a state dict in .*bomb\.pth, "):
        Timm("test_vit", checkpoint=str(tmp_path / "bomb.pth"), image_size=32)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "test_vitt"}, "expected a model of timm, got 'test_vitt'; nearest: .*test_vit"),
        ({"name": "test_vit.r161_in1k"}, r"'test_vit\.r161_in1k' in timm, got: Invalid pretrained tag"),
        ({"name": "test_vit", "checkpoint": "nowhere.pth"}, "expected a checkpoint file, got 'nowhere.pth'"),
        ({"name": "test_vit", "checkpoint": "a.pth", "pretrained": True}, "or a checkpoint, got both"),
    ],
)
def test_what_timm_does_not_know_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Timm(**options)


def test_positions_are_resampled_as_timm_does(tmp_path):
    file = tmp_path / "large.pt"
    torch.save(timm.create_model("test_vit", img_size=64).state_dict(), file)
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}, "num_classes": 0}
    expected = timm.create_model("test_vit", img_size=32, **given).state_dict()
    backbone = Timm("test_vit", checkpoint=str(file), image_size=32)
    found = backbone.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["pos_embed"].shape[1] < torch.load(file)["pos_embed"].shape[1]
    assert backbone.eval_transform(picture()).shape == (3, 32, 32)


def test_positions_are_resampled_as_open_clip_does(tiny, builtin_tiny, tmp_path, monkeypatch):
    large = json.loads(json.dumps(TINY_CLIP["model_cfg"]))
    large["vision_cfg"]["image_size"], large["text_cfg"]["context_length"] = 16, 48
    file = tmp_path / "large.pt"
    torch.save(open_clip.CLIP(**large).state_dict(), file)
    expected = open_clip.CLIP(**TINY_CLIP["model_cfg"])
    open_clip.load_checkpoint(expected, str(file))
    for name in (tiny, builtin_tiny):
        found = OpenClip(name, pretrained=str(file)).model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def training_script(state, **more):
    """What a training script leaves: two sets of weights in names of wrappers, and things that are no weights."""
    wrapped = {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in state.items()}
    averaged = {f"module.{name}": tensor + 1 for name, tensor in wrapped.items()}
    return {"args": argparse.Namespace(lr=0.1), "state_dict": wrapped, "state_dict_ema": averaged} | more


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_training_checkpoints_are_read_as_merge_reads_them(library, tiny, tmp_path):
    own = timm.create_model("test_vit", img_size=32) if library == "timm" else open_clip.create_model(tiny)
    file = str(tmp_path / "last.pth.tar")
    torch.save(training_script(own.state_dict()), file)
    for weights, shift in ((None, 1), ("state_dict_ema", 1), ("state_dict", 0)):
        if library == "timm":
            backbone = Timm("test_vit", checkpoint=file, image_size=32, weights=weights)
        else:
            backbone = OpenClip(tiny, pretrained=file, weights=weights)
        opened = open_checkpoint(file, weights)
        for name, tensor in backbone.model.state_dict().items():
            torch.testing.assert_close(tensor, own.state_dict()[name] + shift)
            assert torch.equal(tensor, opened[name])
        assert f"under 'state_dict{'_ema' if shift else ''}' (there are also" in backbone.read


def test_a_lightning_checkpoint_is_loaded(tiny, tmp_path):
    own = open_clip.create_model(tiny).state_dict()
    inside = {f"model.{name}": tensor + 1 for name, tensor in own.items()} | {"head.weight": torch.zeros(2)}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": inside}, tmp_path / "last.ckpt")
    found = OpenClip(tiny, pretrained=str(tmp_path / "last.ckpt")).model.state_dict()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in own.items())


@pytest.mark.parametrize(("weights", "message"), [("teacher", "'teacher'; there are"), ("ema", "'ema'; there are")])
def test_weights_that_a_file_does_not_hold_are_named(weights, message, tiny, tmp_path):
    torch.save(training_script(open_clip.create_model(tiny).state_dict()), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=message):
        OpenClip(tiny, pretrained=str(tmp_path / "last.pt"), weights=weights)


def test_weights_without_a_file_or_of_one_set_are_refused(tiny, other_weights):
    with pytest.raises(ValueError, match="expected a checkpoint file to read weights='ema' of"):
        OpenClip(tiny, weights="ema")
    with pytest.raises(ValueError, match="expected a checkpoint file to read weights='ema' of"):
        Timm("test_vit", weights="ema")
    with pytest.raises(ValueError, match="holds weights 'ema', got"):
        OpenClip(tiny, pretrained=str(other_weights[1]), weights="ema")


def test_a_task_vector_is_no_checkpoint(tiny, tmp_path):
    TaskVectorBank(tmp_path).append(0, open_clip.create_model(tiny).state_dict())
    with pytest.raises(ValueError, match="expected weights, got the task vector"):
        OpenClip(tiny, pretrained=str(tmp_path / "task_000.safetensors"))


def test_building_from_a_checkpoint_leaves_random_numbers_to_what_comes_next(tmp_path):
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "model.safetensors")
    drawn = []
    for checkpoint in (None, str(tmp_path / "model.safetensors")):
        torch.manual_seed(0)
        Timm("test_vit", checkpoint=checkpoint, image_size=32)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_timm_has_no_text_tower_and_says_what_to_use():
    with pytest.raises(TypeError, match="got Timm; use OpenClip, or a LinearHead or CosineHead"):
        Timm("test_vit", image_size=32).encode_text(PROMPTS)


# Both ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("open_clip", 8), ("timm", 32)])
def test_train_transforms_vary_and_eval_transforms_do_not(tiny, kind, size):
    backbone = OpenClip(tiny) if kind == "open_clip" else Timm("test_vit", image_size=32)
    image = picture()
    for transform in (backbone.train_transform, backbone.eval_transform):
        assert transform(image).shape == (3, size, size)
        assert transform(image).dtype == torch.float32
    assert torch.equal(backbone.eval_transform(image), backbone.eval_transform(image))
    assert len({tuple(backbone.train_transform(image).flatten().tolist()) for _ in range(8)}) > 1


def test_clip_takes_images_of_another_size(tiny, caplog):
    own, larger = OpenClip(tiny), OpenClip(tiny, image_size=16)
    assert larger.eval_transform(picture()).shape == (3, 16, 16)
    assert larger(torch.zeros(2, 3, 16, 16)).shape == own(torch.zeros(2, 3, 8, 8)).shape
    before, after = own.model.state_dict(), larger.model.state_dict()
    changed = {name for name, tensor in before.items() if tensor.shape != after[name].shape}
    assert changed == {"visual.positional_embedding"}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name not in changed)
    assert caplog.text == ""
    same = OpenClip(tiny, image_size=8).model.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in before.items())


def test_the_embedded_clip_takes_images_of_another_size():
    backbone = OpenClip("nano", image_size=56)  # whose weights are in half precision
    assert backbone(torch.zeros(1, 3, 56, 56)).isfinite().all()


def test_timm_training_images_are_not_flipped_or_recoloured():
    backbone = Timm("test_vit", image_size=32)
    ramp = Image.linear_gradient("L").rotate(90).resize((64, 64)).convert("RGB")  # dark on one side
    flat = Image.new("RGB", (64, 64), (200, 120, 40))
    rise = backbone.eval_transform(ramp)[0].diff(dim=1).sum().sign()
    for _ in range(10):
        assert backbone.train_transform(ramp)[0].diff(dim=1).sum().sign() == rise
        torch.testing.assert_close(backbone.train_transform(flat), backbone.eval_transform(flat))


def test_backbones_are_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Backbone()
