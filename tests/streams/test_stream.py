import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision import transforms

from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.task_names import task_names, unique_names


@pytest.fixture(scope="module")
def stream():
    return ClassIncremental(SklearnDigits(), num_tasks=5)


def test_tasks_and_names(stream):
    assert stream.name == "SklearnDigits-5"
    assert [task.name for task in stream.tasks] == [
        "zero-one",
        "two-three",
        "four-five",
        "six-seven",
        "eight-nine",
    ]
    assert stream.class_names[:2] == ["zero", "one"]
    assert stream.tasks[2].classes == (4, 5)


def test_prompts_of_every_class(stream):
    assert stream.class_prompts[4] == ['a photo of the number: "four".']
    assert stream.templates_for(0) == ('a photo of the number: "{}".',)


def test_synonyms_give_more_prompts():
    class Synonyms(SklearnDigits):
        @property
        def prompt_names(self):
            return [(name, f"digit {name}") for name in self.class_names]

    prompts = ClassIncremental(Synonyms(templates=["a {}", "the {}"]), num_tasks=2).class_prompts
    assert prompts[1] == ["a one", "the one", "a digit one", "the digit one"]


def test_the_transform_given_is_the_one_applied(stream):
    plain = stream.dataset(0, "train")
    dark = stream.dataset(0, "train", transforms.Compose([transforms.ToTensor(), lambda image: image * 0]))
    bright = stream.dataset(0, "test", transforms.ToTensor())
    assert plain[0][0].mode == "RGB"
    assert float(dark[0][0].max()) == 0
    assert float(bright[0][0].max()) > 0
    assert dark[0][1] == plain[0][1] == plain.targets[0]


@pytest.mark.parametrize("task", [-1, 5])
def test_task_out_of_range(stream, task):
    with pytest.raises(ValueError, match=rf"task in 0\.\.4 of stream SklearnDigits-5, got {task}"):
        stream.dataset(task, "train")


def test_unknown_split(stream):
    with pytest.raises(ValueError, match=r"got 'valid'"):
        stream.dataset(0, "valid")


@given(st.lists(st.lists(st.text(max_size=30), min_size=1, max_size=12), min_size=1, max_size=8))
def test_task_names_are_short_unique_and_safe(class_names):
    names = task_names(class_names)
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert 0 < len(name) <= 60
        assert len(name.encode()) < 250
        assert all(unicodedata.category(letter)[0] in "LMN" or letter in "._-" for letter in name)
        assert not name.startswith(".")


def test_names_that_differ_in_case_only_are_told_apart():
    assert unique_names(["Dog", "dog", "dog"]) == ["Dog", "dog-2", "dog-3"]
    assert unique_names(["a-2", "a", "a"]) == ["a-2", "a", "a-3"]
    assert unique_names(["STRASSE", "straße", "ﬁn", "fin"]) == ["STRASSE", "straße-2", "ﬁn", "fin-2"]


class Twins(SklearnDigits):
    """A data set that calls two classes alike, as ImageNet does with cranes."""

    @property
    def class_names(self):
        return ["crane", "b", "crane", "crane-2", "e", "f", "g", "h", "i", "j"]


def test_classes_of_one_name_are_told_apart():
    stream = ClassIncremental(Twins(), num_tasks=5)
    assert stream.class_names[:4] == ["crane", "b", "crane-3", "crane-2"]
    assert stream.tasks[1].class_names == ("crane-3", "crane-2")
    assert stream.class_prompts[0] == stream.class_prompts[2], "prompts have the name of the data set"
