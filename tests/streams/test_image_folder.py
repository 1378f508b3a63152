import pytest
from streams.tiny_layouts import save_image, write_tree

from clmerge.streams import ImageFolderSource


def test_tree_with_train_and_test(tmp_path):
    write_tree(tmp_path / "train", ["big_dog", "cat"], 3)
    write_tree(tmp_path / "test", ["big_dog", "cat"], 2)
    source = ImageFolderSource(tmp_path, templates="generic")
    assert source.class_names == ["big dog", "cat"]
    assert source.train().targets == [0, 0, 0, 1, 1, 1]
    assert len(source.test()) == 4
    image, target = source.test()[3]
    assert (image.mode, target) == ("RGB", 1)


def test_other_folder_names(tmp_path):
    write_tree(tmp_path / "train", ["a", "b"], 1)
    write_tree(tmp_path / "val", ["a", "b"], 2)
    assert len(ImageFolderSource(tmp_path, test_folder="val").test()) == 4
    with pytest.raises(RuntimeError, match=r"expected 'test' beside 'train' .*found \['train', 'val'\]: .*test_folder"):
        ImageFolderSource(tmp_path).train()
    with pytest.raises(RuntimeError, match=r"folder 'Test' in .*, as test_folder says, found \['train', 'val'\]"):
        ImageFolderSource(tmp_path, test_folder="Test").train()


def test_one_tree_is_cut_by_seed(tmp_path):
    write_tree(tmp_path, ["a", "b"], 10)
    source = ImageFolderSource(tmp_path, test_fraction=0.3)
    train, test = source.train(), source.test()
    assert len(train) == 14
    assert sorted(test.targets) == [0] * 3 + [1] * 3
    assert not set(train.paths) & set(test.paths)
    assert ImageFolderSource(tmp_path, test_fraction=0.3).test().paths == test.paths
    assert ImageFolderSource(tmp_path, test_fraction=0.3, seed=1).test().paths != test.paths


def test_cub_numbers_are_dropped_only_where_all_folders_have_one(tmp_path):
    write_tree(tmp_path / "cub", ["001.Black_footed_Albatross", "002.Laysan_Albatross"], 2)
    assert ImageFolderSource(tmp_path / "cub").class_names == ["Black footed Albatross", "Laysan Albatross"]
    write_tree(tmp_path / "other", ["001.first", "second"], 2)
    assert ImageFolderSource(tmp_path / "other").class_names == ["001.first", "second"]


def test_class_name_file_renames_and_leaves_the_ids_alone(tmp_path):
    write_tree(tmp_path, ["n01", "n02"], 5)
    (tmp_path / "README.txt").write_text("ImageNet-R\n\nn01 zebra\nn02 African_chameleon\nn99 unused\n")
    source = ImageFolderSource(tmp_path, class_name_file="README.txt")
    assert source.class_names == ["zebra", "African chameleon"]
    assert source.train().targets == ImageFolderSource(tmp_path).train().targets
    by_name = ImageFolderSource(tmp_path, class_name_file="README.txt", sort_by="name")
    assert by_name.class_names == ["African chameleon", "zebra"]
    first = {p.parent.name for p, t in zip(by_name.train().paths, by_name.train().targets, strict=True) if t == 0}
    assert first == {"n02"}
    (tmp_path / "README.txt").write_text("n01 zebra\n")
    with pytest.raises(RuntimeError, match=r"a name for every class folder .*'n02'"):
        _ = ImageFolderSource(tmp_path, class_name_file="README.txt").class_names


def test_class_name_file_of_other_tools(tmp_path):
    write_tree(tmp_path, ["big dog", "n02"], 5)
    names = tmp_path / "names.txt"
    names.write_text("big dog\tщит\r\nn02\tмиф\r\n", encoding="utf-8-sig")
    assert ImageFolderSource(tmp_path, class_name_file="names.txt").class_names == ["щит", "миф"]
    names.write_text("big dog\tone\nn02\tcat\nbig dog\ttwo\n")
    with pytest.raises(RuntimeError, match=r"one name for class folder 'big dog' in .*names\.txt, got 'one' and 'two'"):
        _ = ImageFolderSource(tmp_path, class_name_file="names.txt").class_names
    names.write_bytes("big dog\tщит".encode("utf-16"))
    with pytest.raises(RuntimeError, match=r"in UTF-8 at .*names\.txt"):
        _ = ImageFolderSource(tmp_path, class_name_file="names.txt").class_names


def test_class_absent_from_one_split(tmp_path):
    write_tree(tmp_path / "train", ["a", "b"], 2)
    write_tree(tmp_path / "test", ["b", "c"], 2)
    source = ImageFolderSource(tmp_path)
    assert source.class_names == ["a", "b", "c"]
    assert set(source.train().targets) == {0, 1}
    assert set(source.test().targets) == {1, 2}


def test_name_selects_the_templates(tmp_path):
    assert ImageFolderSource(tmp_path / "imagenet-r").name == "imagenet-r"
    assert len(ImageFolderSource(tmp_path / "imagenet-r").templates) == 80
    assert len(ImageFolderSource(tmp_path, name="RESISC45").templates) == 18


def test_only_images_are_taken(tmp_path):
    write_tree(tmp_path, ["a"], 2)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    save_image(tmp_path / "a" / "deeper" / "one.JPEG")
    (tmp_path / "a" / "._image_0.png").write_bytes(b"\0\5\x16\7")  # AppleDouble
    save_image(tmp_path / "a" / ".thumbnails" / "image_0.png")
    save_image(tmp_path / "__MACOSX" / "a" / "image_0.png")
    (tmp_path / "a" / "folder.png").mkdir()
    source = ImageFolderSource(tmp_path)
    assert len(source.train()) + len(source.test()) == 3
    assert source.class_names == ["a"]


def test_missing_or_empty_tree(tmp_path):
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(
        RuntimeError, match=r"folder tree at .*nowhere .*found no such folder; the nearest .*/somewhere$"
    ):
        ImageFolderSource(tmp_path / "nowhere").train()
    (tmp_path / "somewhere").rmdir()
    with pytest.raises(RuntimeError, match="one folder per class"):
        ImageFolderSource(tmp_path).train()
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError, match="expected images in"):
        ImageFolderSource(tmp_path).train()
    with pytest.raises(ValueError, match="test_fraction"):
        ImageFolderSource(tmp_path, test_fraction=0)
