import pickle
import sys

import pytest
from streams.tiny_layouts import hugging_face_split, png, write_tree

from clmerge.streams import ClassIncremental, HuggingFaceSource
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.identity import stream_identity

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def saved(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return str(path)


def test_a_saved_folder_with_splits(tmp_path):
    path = saved(
        tmp_path / "pets",
        train=hugging_face_split(6),
        validation=hugging_face_split(4, first=50),
        test=hugging_face_split(2, first=90),
    )
    source = HuggingFaceSource(path)
    assert (source.name, source.class_names) == ("pets", ["cat", "sea lion"])
    assert source.train().targets == [0, 1] * 3
    assert source.val().image(3).getpixel((0, 0)) == (53, 53, 0)
    assert source.test().image(1).mode == "RGB"
    assert pickle.loads(pickle.dumps(source.train())).image(5).getpixel((0, 0)) == (5, 5, 0)
    stream = ClassIncremental(source, num_tasks=2)
    assert [len(stream.dataset(1, split)) for split in ("train", "val", "test")] == [3, 2, 1]


def test_one_split_is_cut(tmp_path):
    hugging_face_split(20).save_to_disk(tmp_path / "one")
    source = HuggingFaceSource(str(tmp_path / "one"), test_fraction=0.3)
    assert (len(source.train()), len(source.test()), source.val()) == (14, 6, None)
    stream = ClassIncremental(source, num_tasks=2)  # which finds that no image is in two splits
    shades = {stream.dataset(0, split).image(0).getpixel((0, 0))[0] for split in ("train", "val", "test")}
    assert len(shades) == 3


def test_identity_is_that_of_the_content(tmp_path):
    found = [
        stream_identity(ClassIncremental(HuggingFaceSource(saved(tmp_path / name, **splits)), num_tasks=2))
        for name, splits in {
            "a": {"train": hugging_face_split(6), "test": hugging_face_split(2, first=90)},
            "b": {"train": hugging_face_split(6), "test": hugging_face_split(2, first=90)},
            "c": {"train": hugging_face_split(6), "test": hugging_face_split(2, first=91)},
        }.items()
    ]
    assert found[0] == found[1] != found[2]


def test_parquet_files(tmp_path):
    hugging_face_split(10).to_parquet(tmp_path / "all.parquet")
    source = HuggingFaceSource(str(tmp_path / "all.parquet"))
    assert source.class_names == ["cat", "sea lion"]
    assert source.train().image(0).mode == "RGB"
    (tmp_path / "data").mkdir()
    for name, count in (("train", 4), ("test", 2)):
        hugging_face_split(count).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    source = HuggingFaceSource(str(tmp_path / "data"))
    assert (len(source.train()), len(source.test())) == (4, 2)


def test_a_folder_of_images(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write_tree(tmp_path / "photos" / split, ["ant", "bee"], count)
    source = HuggingFaceSource(str(tmp_path / "photos"))
    assert source.class_names == ["ant", "bee"]
    assert (len(source.train()), len(source.test())) == (6, 4)
    assert source.train().image(0).size == (8, 8)
    (tmp_path / "photos" / "test" / "ant" / "image_0.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"row 0 of the test split of .*photos, got .*image_0\.png"):
        source.test().image(0)


def test_columns_by_name(tmp_path):
    both = hugging_face_split(4, columns=("photo", "fine")).add_column("coarse", ["x", "x", "y", "y"])
    path = saved(tmp_path / "two", train=both, test=both)
    assert HuggingFaceSource(path).class_names == ["cat", "sea lion"]
    assert HuggingFaceSource(path, label_column="coarse").train().targets == [0, 0, 1, 1]
    with pytest.raises(
        RuntimeError, match=r"a column 'colour' in .*two, found photo \(Image\), fine \(ClassLabel\), c"
    ):
        HuggingFaceSource(path, label_column="colour").train()
    with pytest.raises(RuntimeError, match=r"expected images in column 'fine' of .*, got ClassLabel"):
        HuggingFaceSource(path, image_column="fine").train()


def test_numbers_and_words_as_labels(tmp_path):
    path = saved(tmp_path / "plain", train=hugging_face_split(4, names=()), test=hugging_face_split(4, names=()))
    assert HuggingFaceSource(path).class_names == ["0", "1"]


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (("train", "validation"), {}, r"a test split of .*, found \['train', 'validation'\]: name .* with test_split"),
        (("a", "b"), {}, "a training and a test split of .*: name two different ones"),
        (("train", "dev", "valid", "test"), {}, r"one val split of .*, found \['dev', 'valid'\]: name it with val_spl"),
        (("train", "test"), {"test_split": "tets"}, r"a split 'tets' of .*, as test_split says, found \['train', "),
    ],
)
def test_splits_that_are_not_there(tmp_path, splits, options, message):
    path = saved(tmp_path / "data", **{name: hugging_face_split(2) for name in splits})
    with pytest.raises(RuntimeError, match=message):
        HuggingFaceSource(path, **options).train()


def test_the_validation_split_may_be_the_test_split(tmp_path):
    path = saved(tmp_path / "data", train=hugging_face_split(4), validation=hugging_face_split(2, first=9))
    source = HuggingFaceSource(path, test_split="validation")
    assert (len(source.test()), source.val()) == (2, None)


def test_missing_labels_and_images(tmp_path):
    features = hugging_face_split(1).features
    data = {"image": [{"bytes": png(0), "path": None}, None], "label": [0, -1]}
    path = saved(
        tmp_path / "hidden", train=hugging_face_split(2), test=datasets.Dataset.from_dict(data, features=features)
    )
    with pytest.raises(
        RuntimeError, match=r"one of 2 classes in 'label', got -1 in row 1 of the test split .* without"
    ):
        HuggingFaceSource(path).test()
    data["label"] = [0, 1]
    path = saved(
        tmp_path / "empty", train=hugging_face_split(2), test=datasets.Dataset.from_dict(data, features=features)
    )
    with pytest.raises(UnreadableImageError, match=r"row 1 of the test split of .*, got an empty cell"):
        HuggingFaceSource(path).test().image(1)


def test_nothing_there_and_nothing_readable(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"at .*/none, found none; if it is a name .* set download=true"):
        HuggingFaceSource(str(tmp_path / "none")).train()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RuntimeError, match=r"got a \.txt file; \.parquet and \.arrow files can be read"):
        HuggingFaceSource(str(tmp_path / "notes.txt")).train()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"data set of Hugging Face's datasets in .*bad\.parquet, got"):
        HuggingFaceSource(str(tmp_path / "bad.parquet")).train()
    with pytest.raises(ValueError, match="test_fraction"):
        HuggingFaceSource("x", test_fraction=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "3.6.0")
        with pytest.raises(
            RuntimeError, match=r"version 4 or newer .* got 3\.6\.0: pip install -U 'clmerge\[datasets\]'"
        ):
            HuggingFaceSource(str(tmp_path)).train()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"the package datasets .* pip install 'clmerge\[datasets\]'"):
        HuggingFaceSource(str(tmp_path)).train()


def test_the_hub_is_asked_only_where_a_user_says_so(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=hugging_face_split(2), test=hugging_face_split(2, first=9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HuggingFaceSource("someone/pets", subset="small", download=True)
    assert (source.name, len(source.train()), asked) == ("pets", 2, [("someone/pets", "small")])
