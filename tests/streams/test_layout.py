import pytest
from streams.tiny_layouts import write_npz

from clmerge.streams import NpzSource, SklearnDigits
from clmerge.streams.layout import ValidationCut, split_plan


def test_labels_become_global_class_ids():
    source = SklearnDigits()
    train = [i for i, target in enumerate(source.train().targets) if target in (3, 8)]
    test = [i for i, target in enumerate(source.test().targets) if target in (3, 8)]
    splits = ValidationCut(0.5, None, 0).splits(source, train=train, test=test, to_global={3: 30, 8: 80})
    for name, images in (("train", source.train()), ("val", source.train()), ("test", source.test())):
        plan = splits[name]
        assert plan.images is images
        assert plan.targets == tuple({3: 30, 8: 80}[images.targets[i]] for i in plan.indices)
    assert sorted(splits["train"].indices + splits["val"].indices) == train
    assert splits["test"].indices == tuple(test)


def test_official_validation_images_of_the_tasks_classes(tmp_path):
    write_npz(tmp_path / "tiny.npz", val=True)
    source = NpzSource(tmp_path / "tiny.npz")
    splits = ValidationCut(0.5, None, 0).splits(source, train=[0, 3], test=[0], to_global={0: 7})
    assert splits["train"].indices == (0, 3)
    assert splits["val"].indices == (0, 3, 6, 9)
    assert set(splits["val"].targets) == {7}


def test_label_outside_the_task():
    with pytest.raises(KeyError):
        split_plan(SklearnDigits().train(), range(20), {0: 0})
