"""Answers by class against matrices that were counted by hand."""

import json
import math

import numpy as np
import pytest
import torch
from made_up import make_results

from clmerge.results.confusion import MOST_CLASSES, Confusion, summed
from clmerge.results.metrics import TaskAccuracy
from clmerge.results.metrics.confusion import ConfusionCounts
from clmerge.results.results import Results, to_document, validate

TASKS = [(0, 3), (1, 2)]  # classes arrive in the order 0, 3, 1, 2
NAN, INF = math.nan, math.inf
# label, task, logits of classes 0..3
BATCH = [
    (0, 0, [9, 1, 1, 1]),  # right
    (0, 0, [1, 9, 1, 2]),  # taken for 1; among the task's own for 3
    (3, 0, [5, 1, 1, 5]),  # a tie: the lowest id, 0
    (3, 0, [1, 1, 9, 8]),  # taken for 2; with the task known right
    (1, 1, [1, 9, 1, 1]),  # right
    (1, 1, [1, NAN, 1, 1]),  # no class wins
    (2, 1, [9, -INF, -INF, 1]),  # taken for 0; of the task's own none wins
    (2, 1, [9, 2, 1, 1]),  # taken for 0; with the task known for 1
]
# Rows and columns by class id; the last column is "none".
AGNOSTIC = [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [2, 0, 0, 0, 0], [1, 0, 1, 0, 0]]
AWARE = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]


def batch():
    labels, tasks, logits = zip(*BATCH, strict=True)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), torch.tensor(tasks)


def test_counts_are_those_of_the_hand():
    counts = ConfusionCounts(4, TASKS)
    for part in zip(*(values.split(3) for values in batch()), strict=True):
        counts.update(*part)
    assert counts.compute().tolist() == [AGNOSTIC, AWARE]
    accuracy = TaskAccuracy(2, 4, TASKS)
    accuracy.update(*batch())
    for reading, table in zip(("task_agnostic", "task_aware"), (AGNOSTIC, AWARE), strict=True):
        right = [sum(table[c][c] for c in classes) / sum(sum(table[c]) for c in classes) for classes in TASKS]
        assert accuracy.compute()[reading].tolist() == right


def test_classes_are_in_the_order_in_which_they_arrive():
    found = Confusion.of_counts(np.array(AGNOSTIC), [0, 3, 1, 2])
    assert found.images == [2, 2, 2, 2]
    assert found.right == [1, 0, 1, 0]
    assert found.wrong == [(0, 2, 1), (1, 0, 1), (1, 3, 1), (2, None, 1), (3, 0, 2)]
    assert found.matrix().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0], [2, 0, 0, 0]]
    assert found.accuracies == [0.5, 0.0, 0.5, 0.0]
    assert found.worst(3) == [1, 3, 0]
    assert found.pairs(2) == [(3, 0, 2), (0, 2, 1)]
    assert found.most_confused(2) == [0, 3], "four wrong answers are about class 0, three about class 2"
    assert Confusion.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    both = summed([found, found])
    assert both.matrix().tolist() == (2 * found.matrix()).tolist()
    assert both.wrong[3] == (2, None, 2)


def test_a_class_of_no_task_counts_as_none():
    found = Confusion.of_counts(np.array([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]), [1, 0])
    assert found.wrong == [(0, 1, 5), (0, None, 15), (1, 0, 2), (1, None, 7)]
    assert found.images == [26, 10]


def test_of_very_many_classes_pairs_are_not_counted():
    size = MOST_CLASSES + 1
    counts = ConfusionCounts(size, [range(size)])
    logits = torch.zeros(3, size)
    logits[0, 7] = logits[1, 8] = 1.0
    logits[2] = -INF
    counts.update(logits, torch.tensor([7, 7, 8]), torch.tensor([0, 0, 0]))
    assert counts.compute().numel() == 4 * size
    found = Confusion.of_counts(counts.compute()[1].numpy(), range(size))
    assert (found.images[7], found.right[7], found.images[8], found.right[8]) == (2, 1, 1, 0)
    assert found.wrong is None
    assert (found.pairs(3), found.worst(1)) == ([], [8])
    with pytest.raises(ValueError, match="expected pairs of classes, got 2001 classes"):
        found.matrix()


def with_answers(**options):
    results = make_results(2, **options)
    answers = Confusion([3, 2, 0, 1], [1, 2, 0, 0], [(0, 1, 1), (0, None, 1), (3, 0, 1)])
    for model in ("magmax", "expert", "zero_shot"):
        results.set_confusion(model, {"task_agnostic": answers, "task_aware": answers})
    return results


def test_answers_are_in_the_document_and_old_documents_stay_valid():
    results = with_answers()
    document = json.loads(json.dumps(to_document([results])))
    validate(document)
    found = document["runs"][0]["models"]["magmax"]["confusion"]
    assert found["task_aware"] == {
        "images": [3, 2, 0, 1],
        "right": [1, 2, 0, 0],
        "wrong": [[0, 1, 1], [0, None, 1], [3, 0, 1]],
    }
    again = Results.from_dict(document["runs"][0])
    assert again.to_dict() == document["runs"][0]
    assert again.confusion("magmax") == results.confusion("magmax")
    assert again.confusion("ties_density0.1") is None
    for model in document["runs"][0]["models"].values():
        model.pop("confusion", None)
    validate(document)
    assert Results.from_dict(document["runs"][0]).confusion("magmax") is None


def test_answers_are_those_of_the_last_task_and_follow_their_model():
    results = with_answers()
    assert results.until(2).confusion("magmax") is not None
    assert results.until(1).confusion("magmax") is None
    assert results.renamed({"magmax": "mine"}).confusion("mine") is not None
    assert make_results(2).joined(results).confusion("expert") is not None
    with pytest.raises(ValueError, match="expected answers for 4 classes, got 1 for 'magmax'"):
        results.set_confusion("magmax", {"task_aware": Confusion([1], [1], [])})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", [3, 2, 0, 2]),
        ("images", [3, 2, 0]),
        ("right", [1, 2, 0, -1]),
        ("wrong", [[0, 4, 2], [3, 0, 1]]),
        ("wrong", [[0, 0, 2], [3, 0, 1]]),
        ("wrong", [[0, 1, 1], [0, 1, 1], [3, 0, 1]]),
        ("wrong", [[0, 1, 2], [None, 0, 1]]),
        ("wrong", [[0, 1, 2], [3, 0, 1], [1, 0, 0]]),
        ("wrong", [[0, 1], [3, 0, 1]]),
        ("wrong", {}),
    ],
)
def test_answers_that_contradict_themselves_are_refused(key, value):
    document = json.loads(json.dumps(to_document([with_answers()])))
    document["runs"][0]["models"]["magmax"]["confusion"]["task_aware"][key] = value
    with pytest.raises(ValueError, match=r"expected runs\[0\]\.models\.magmax\.confusion\.task_aware\."):
        validate(document)
