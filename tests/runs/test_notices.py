from types import SimpleNamespace

import pytest

from clmerge.models import OpenClip, Timm
from clmerge.runs.notices import notices

LEARNS = SimpleNamespace(open_vocabulary=False)
PLAIN = SimpleNamespace(backbone=SimpleNamespace(starts_random=""), head=LEARNS, loss_classes="current")


def stream(tasks, *, kind="class-incremental", without=()):
    """Tasks of class names; ``without`` are (task, split, name) that have no image."""
    names = sorted({name for task in tasks for name in task})
    ids = {name: index for index, name in enumerate(names)}

    def dataset(task, split):
        return SimpleNamespace(targets=[ids[name] for name in tasks[task] if (task, split, name) not in without])

    found = [
        SimpleNamespace(index=t, name=f"t{t}", classes=tuple(sorted(ids[n] for n in task)), class_names=tuple(task))
        for t, task in enumerate(tasks)
    ]
    return SimpleNamespace(kind=kind, tasks=found, class_names=names, dataset=dataset)


def test_an_ordinary_run_says_nothing():
    assert notices(PLAIN, stream([["a", "b"], ["c", "d"]])) == []
    assert notices(PLAIN, stream([["a", "b"], ["a", "b"]], kind="domain-incremental")) == []


def test_plain_prompts_are_said_of_a_text_head_alone():
    plain = stream([["a", "b"]])
    plain.plain_sources = ["pets", "cars"]
    text = SimpleNamespace(**vars(PLAIN) | {"head": SimpleNamespace(open_vocabulary=True)})
    (line,) = notices(text, plain)
    assert "'a photo of a {}.'" in line
    assert "'pets', 'cars': set templates of the source" in line
    assert notices(PLAIN, plain) == []


def test_random_weights_are_said_with_what_to_set():
    class Own(SimpleNamespace):
        pass

    module = SimpleNamespace(backbone=Own(starts_random="set this"), head=LEARNS, loss_classes="current")
    assert notices(module, stream([["a", "b"]])) == [
        "Own starts from random weights, not from pretrained ones: set this"
    ]


def test_backbones_know_whether_they_start_from_random_weights():
    assert "pretrained=true" in Timm("test_vit").starts_random
    assert OpenClip("nano").starts_random == ""


def test_domains_with_other_classes_and_names_of_another_case_are_said():
    lines = notices(PLAIN, stream([["dog", "cat"], ["Dog", "cat"]], kind="domain-incremental"))
    assert lines == [
        "names that differ in writing only are different classes: 'Dog' and 'dog'",
        "the domains have different classes: 'Dog' (in 1 of 2), 'dog' (in 1 of 2)",
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_said(split):
    lines = notices(PLAIN, stream([["a", "b"], ["c", "d"]], without={(1, split, "d")}))
    assert lines == [f"task t1 has no {split} images of 'd'"]


def test_tasks_of_one_class_learn_nothing_from_their_own_classes_alone():
    alone = stream([["a", "b"], ["c"]])
    assert len(notices(PLAIN, alone)) == 1
    assert "t1; use --model.loss_classes=seen or all" in notices(PLAIN, alone)[0]
    seen = SimpleNamespace(backbone=PLAIN.backbone, head=LEARNS, loss_classes="seen")
    assert notices(seen, alone) == []
