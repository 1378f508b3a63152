import pytest
from streams.tiny_layouts import save_image, write_domain_lists

from clmerge.streams import FileListSource


def source_in(root):
    return FileListSource(root, train_list="real_train.txt", test_list="real_test.txt", name="DomainNet")


def test_domainnet_layout(tmp_path):
    write_domain_lists(tmp_path, ["real"])
    source = source_in(tmp_path)
    assert source.class_names == ["sea turtle", "zigzag"]
    assert source.train().targets == [0] * 4 + [1] * 4
    assert source.test()[7][0].mode == "RGB"
    assert len(source.templates) == 80


def test_labels_that_do_not_occur_are_left_out(tmp_path):
    write_domain_lists(tmp_path, ["real"])
    for name in ("real_train.txt", "real_test.txt"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(" 1\n", " 300\n"))
    source = source_in(tmp_path)
    assert source.class_names == ["sea turtle", "zigzag"]
    assert set(source.test().targets) == {0, 1}


def test_lists_missing_or_malformed(tmp_path):
    with pytest.raises(RuntimeError, match=r"'PATH LABEL' at .*real_train\.txt, found no such file"):
        source_in(tmp_path).train()
    write_domain_lists(tmp_path, ["real"])
    (tmp_path / "real_test.txt").write_text("real/zigzag/1.jpg 1\n\nreal/zigzag/2.jpg one\n")
    with pytest.raises(RuntimeError, match=r"line 2 of .*real_test\.txt, got 'real/zigzag/2\.jpg one'"):
        source_in(tmp_path).train()


def test_one_label_in_two_folders(tmp_path):
    write_domain_lists(tmp_path, ["real"])
    save_image(tmp_path / "real" / "other" / "1.jpg")
    with (tmp_path / "real_test.txt").open("a") as file:
        file.write("real/other/1.jpg 0\n")
    with pytest.raises(RuntimeError, match="label 0 in one folder name, got 'sea_turtle' and 'other'"):
        _ = source_in(tmp_path).class_names


def test_a_list_of_validation_images(tmp_path):
    write_domain_lists(tmp_path, ["real"])
    lines = (tmp_path / "real_test.txt").read_text().splitlines()
    (tmp_path / "val.txt").write_text(lines.pop() + "\n")
    (tmp_path / "real_test.txt").write_text("\n".join(lines))
    source = FileListSource(tmp_path, train_list="real_train.txt", test_list="real_test.txt", val_list="val.txt")
    assert source_in(tmp_path).val() is None
    assert source.val().targets == [1]
    assert source.val().paths[0] not in source.test().paths
