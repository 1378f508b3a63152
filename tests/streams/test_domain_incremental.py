import pickle

import pytest
from streams.tiny_layouts import write_domain_lists, write_tree

from clmerge.streams import DomainIncremental, DomainLists, ImageFolderSource


def tree(root, name, classes, templates="generic"):
    for part in ("train", "test"):
        write_tree(root / name / part, classes, 4)
    return ImageFolderSource(root / name, templates=templates)


def test_classes_are_shared_by_name(tmp_path):
    sources = [tree(tmp_path, "real", ["ant", "cat"]), tree(tmp_path, "sketch", ["cat", "dog_house"])]
    stream = DomainIncremental(sources, val_fraction=0.25)
    assert stream.class_names == ["ant", "cat", "dog house"]
    assert [task.name for task in stream.tasks] == ["real", "sketch"]
    assert [task.classes for task in stream.tasks] == [(0, 1), (1, 2)]
    assert stream.tasks[1].class_names == ("cat", "dog house")
    assert set(stream.dataset(1, "test").targets) == {1, 2}
    data = stream.dataset(1, "train")
    for index in range(len(data)):
        folder = sources[1].train().paths[data.plan.indices[index]].parent.name
        assert stream.class_names[data[index][1]] == folder.replace("_", " ")


def test_classes_of_a_task_are_those_with_training_images(tmp_path):
    write_tree(tmp_path / "real" / "train", ["ant"], 4)
    write_tree(tmp_path / "real" / "test", ["ant", "bee"], 4)
    stream = DomainIncremental([ImageFolderSource(tmp_path / "real")])
    assert stream.tasks[0].classes == (0,)
    assert set(stream.dataset(0, "test").targets) == {0, 1}


def test_prompts_come_from_the_first_domain_with_the_class(tmp_path):
    sources = [tree(tmp_path, "a", ["ant"], ["first {}"]), tree(tmp_path, "b", ["ant", "bee"], ["second {}"])]
    assert DomainIncremental(sources).class_prompts == [["first ant"], ["second bee"]]


def test_group_of_domains(tmp_path):
    write_domain_lists(tmp_path, ["real", "clipart"])
    stream = DomainIncremental(DomainLists(tmp_path, domains=["real", "clipart"]), name="DomainNet")
    assert stream.name == "DomainNet"
    assert [task.name for task in stream.tasks] == ["real", "clipart"]
    assert len(stream.class_prompts[0]) == 80
    assert [len(stream.dataset(0, split)) for split in ("train", "val", "test")] == [6, 2, 8]
    assert pickle.loads(pickle.dumps(stream)).tasks == stream.tasks


def test_one_domain_twice_gets_two_names(tmp_path):
    source = tree(tmp_path, "real", ["ant"])
    assert [task.name for task in DomainIncremental([source, source]).tasks] == ["real", "real-2"]


def test_no_sources_or_no_images(tmp_path):
    with pytest.raises(ValueError, match="at least one data source, got none"):
        DomainIncremental([])
    write_tree(tmp_path / "real", ["ant"], 1)
    with pytest.raises(ValueError, match="expected train and test images in real"):
        _ = DomainIncremental([ImageFolderSource(tmp_path / "real")]).tasks


def test_class_names_that_collide_in_one_domain(tmp_path):
    stream = DomainIncremental([tree(tmp_path, "real", ["sea_turtle", "sea turtle"])])
    with pytest.raises(ValueError, match="expected different class names in real"):
        _ = stream.tasks
