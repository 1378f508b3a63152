import pytest
from streams.tiny_layouts import write_mnist, write_svhn

from clmerge.streams import SklearnDigits, TaskIncremental, TorchvisionSource


@pytest.fixture
def stream(tmp_path, monkeypatch):
    from streams.tiny_layouts import accept_any_checksum

    accept_any_checksum(monkeypatch)
    write_mnist(tmp_path)
    write_svhn(tmp_path)
    sources = [
        SklearnDigits(),
        TorchvisionSource("MNIST", root=tmp_path),
        TorchvisionSource("SVHN", root=tmp_path),
    ]
    return TaskIncremental(sources, name="numbers", max_val=50)


def test_labels_are_offset_by_data_set(stream):
    assert [task.classes for task in stream.tasks] == [
        tuple(range(10)),
        tuple(range(10, 20)),
        tuple(range(20, 30)),
    ]
    assert [task.name for task in stream.tasks] == ["SklearnDigits", "MNIST", "SVHN"]
    for task in stream.tasks:
        for split in ("train", "val", "test"):
            assert set(stream.dataset(task.index, split).targets) == set(task.classes)
    data = stream.dataset(1, "train")
    labels = [stream.sources[1].train().targets[i] for i in data.plan.indices]
    assert data.targets == [label + 10 for label in labels]


def test_a_name_in_two_data_sets_stays_two_classes(stream):
    names = stream.class_names
    assert names[3] == "three"
    assert (names[13], names[23]) == ("MNIST: 3", "SVHN: 3")
    assert len(set(names)) == 30
    assert stream.tasks[1].class_names[3] == "MNIST: 3"


def test_prompts_use_plain_names_and_each_set_has_its_own_templates(tmp_path):
    sources = [SklearnDigits(templates=["digit {}."]), SklearnDigits(templates=["{} here.", "{} there."])]
    stream = TaskIncremental(sources)
    assert stream.class_prompts[2] == ["digit two."]
    assert stream.class_prompts[12] == ["two here.", "two there."]
    assert stream.templates_for(12) == ("{} here.", "{} there.")


def test_bound_on_validation_images(stream):
    assert len(stream.dataset(0, "val")) == 50
    assert stream.name == "numbers"
