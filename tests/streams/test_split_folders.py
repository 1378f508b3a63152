"""A tree that has splits is never read as classes, and classes are never read as splits."""

import pytest
from streams.tiny_layouts import save_image, write_tree

from clmerge.streams import ClassIncremental, DomainFolders, DomainIncremental, FileListSource, ImageFolderSource

CLASSES = ["cat", "dog"]


def sizes(source):
    return len(source.train()), len(source.val() or ()), len(source.test())


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("training", "Validation", "testing"),
        ("Training", "valid", "tst"),
    ],
)
@pytest.mark.parametrize("above", ["", "Animals"])
def test_usual_names_are_recognised(tmp_path, train, val, test, above):
    for number, name in ((4, train), (2, val), (3, test)):
        if name is not None:
            write_tree(tmp_path / above / name, CLASSES, number)
    (tmp_path / "__MACOSX").mkdir()
    source = ImageFolderSource(tmp_path, templates="generic")
    assert source.class_names == CLASSES
    assert sizes(source) == (8, 4 if val else 0, 6)
    stream = ClassIncremental(source, num_tasks=2)
    assert len(stream.dataset(0, "val")) == (2 if val else 1)


def test_classes_with_the_names_of_splits_are_classes(tmp_path):
    write_tree(tmp_path, ["bus", "train", "plane"], 5)
    assert ImageFolderSource(tmp_path).class_names == ["bus", "plane", "train"]
    write_tree(tmp_path, ["test tube", "train station"], 5)
    assert len(ImageFolderSource(tmp_path).class_names) == 5


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train/cat", "val/cat"], r"expected 'test' beside 'Train' .*test_folder \('Train' again to cut"),
        (["Test/cat", "other/cat"], r"expected 'train' beside 'Test' .*train_folder"),
        (
            ["Train/cat", "training/cat", "test/cat"],
            r"one folder of train images .*\['Train', 'training'\].*train_folder",
        ),
        (["train/cat", "val/cat", "dev/cat", "test/cat"], r"one folder of val images .*val_folder"),
        (["Train", "Test"], r"one folder per class in 'Train' .*images beside \['Test'\]"),
        (["train", "val", "cat"], r"one folder per class in 'train' .*images beside \['val'\]"),
        (["seg_train/cat", "seg_test/cat"], r"looks like splits: \['seg_train'\] and \['seg_test'\].*train_folder and"),
        (["Animals/cat", "Animals/dog"], r"'Animals' alone, which holds folders itself: set root to .*Animals"),
        (
            ["a/Train/cat", "a/Test/cat", "b/Train/cat", "b/Test/cat"],
            r"train and test folders in \['a', 'b'\].*DomainFolders",
        ),
    ],
)
def test_what_looks_like_splits_asks_for_an_option(tmp_path, folders, message):
    for folder in folders:
        save_image(tmp_path / folder / "image.png")
    with pytest.raises(RuntimeError, match=message) as raised:
        ImageFolderSource(tmp_path).train()
    if "one folder of" not in str(raised.value):
        assert str(raised.value).endswith("if all folders are classes, set train_folder and test_folder to '.'")


def test_the_option_is_taken(tmp_path):
    write_tree(tmp_path / "seg_train", CLASSES, 4)
    write_tree(tmp_path / "seg_test", CLASSES, 3)
    assert sizes(ImageFolderSource(tmp_path, train_folder="seg_train", test_folder="seg_test")) == (8, 0, 6)
    source = ImageFolderSource(tmp_path, train_folder="seg_train", test_folder="seg_train", test_fraction=0.25)
    assert sizes(source) == (6, 0, 2)
    everything = ImageFolderSource(tmp_path, train_folder=".", test_folder=".")
    assert everything.class_names == ["seg test", "seg train"]
    with_val = {"train_folder": "seg_train", "test_folder": "seg_test", "val_folder": "seg_test"}
    with pytest.raises(ValueError, match="different images in every split"):
        _ = ClassIncremental(ImageFolderSource(tmp_path, **with_val), num_tasks=2).tasks


def test_splits_never_share_an_image(tmp_path):
    write_tree(tmp_path / "train", CLASSES, 4)
    write_tree(tmp_path / "train" / "cat" / "test", CLASSES, 2)
    source = ImageFolderSource(tmp_path, train_folder="train", test_folder="train/cat/test")
    with pytest.raises(
        ValueError, match=r"got .*train/cat/test/cat/image_0\.png among the train .* and the test images"
    ):
        _ = ClassIncremental(source, num_tasks=2).tasks
    for part, names in (("train", "ab"), ("test", "bc")):
        (tmp_path / f"{part}.txt").write_text(
            "".join(f"{c}/{n}.png {i}\n" for i, c in enumerate(CLASSES) for n in names)
        )
    source = FileListSource(tmp_path, train_list="train.txt", test_list="test.txt")
    with pytest.raises(
        ValueError, match=r"got .*/b\.png among the val images of task (.) and the test images of task \1"
    ):
        _ = ClassIncremental(source, num_tasks=2).tasks


def test_splits_of_different_tasks_never_share_an_image(tmp_path):
    write_tree(tmp_path, CLASSES, 10)
    twice = [ImageFolderSource(tmp_path, seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match="different images in every split"):
        _ = DomainIncremental(twice, val_fraction=0.0).tasks


@pytest.mark.parametrize("split_first", [False, True])
def test_domains_with_splits_of_any_case(tmp_path, split_first):
    for part, number in (("Train", 4), ("Validation", 1), ("TEST", 2)):
        for domain in ("art", "photo"):
            write_tree(tmp_path / part / domain if split_first else tmp_path / domain / part, CLASSES, number)
    group = DomainFolders(tmp_path, domains=["photo", "art"], split_first=split_first)
    assert [sizes(source) for source in group.sources()] == [(8, 2, 4)] * 2
    assert all("photo" in path.parts for path in group.sources()[0].val().paths)
    if split_first:
        with pytest.raises(RuntimeError, match=r"domain 'photo' in .*set split_first=true"):
            DomainFolders(tmp_path, domains=["photo"]).sources()
    else:
        with pytest.raises(RuntimeError, match="set root to one of them"):
            DomainFolders(tmp_path, domains=["photo"], split_first=True).sources()
