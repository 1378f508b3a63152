"""Probes of unlearning against hand-computed numbers."""

import math

import pytest
import torch

from clmerge.evaluation.probes import TEST, ForgetControl, MembershipInference, Occasion, Seen, View
from clmerge.evaluation.probes.membership import MEMBERS, OTHERS, area_under_curve
from clmerge.models.pixels import normalisation
from clmerge.results.probe_table import probe_text
from clmerge.results.results import Results
from clmerge.streams import ClassIncremental, SklearnDigits

OCCASION = Occasion(["a", "b", "c"], [[0], [1], [2]], 3, num_seen=2)


def view(scores, labels):
    scores, labels = torch.tensor(scores), torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 1, 1)
    return View(TEST, images, labels, labels, scores, lambda other: scores, normalisation(None))


def seen(values, tasks):
    return Seen(torch.tensor(values, dtype=torch.float64).unsqueeze(1), torch.tensor(tasks))


def test_forget_control_tells_the_tasks_apart():
    probe = ForgetControl(tasks=[1])
    rows = probe.look(view([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]], [0, 1, 1, 2]))
    assert rows.flatten().tolist() == [1, 1, 0, 1]
    found = probe.summary({TEST: Seen(rows, torch.tensor([0, 1, 1, 2]))}, OCCASION)
    assert found.value == 0.5
    assert found.values == {"control": 1.0, "unseen": 1.0}
    assert found.per_task == [1.0, 0.5, 1.0]
    assert found.n == {"value": 2, "control": 1, "unseen": 1}


def test_forget_control_is_undefined_before_the_task_is_learned():
    found = ForgetControl(tasks=[2]).summary({TEST: seen([1, 0, 1], [0, 1, 2])}, OCCASION)
    assert math.isnan(found.value)
    assert found.values == {"control": 0.5, "unseen": 1.0}


def test_the_interval_of_forget_control_is_over_the_images_to_forget():
    results = Results(["a", "b", "c"], classes=[["a"], ["b"], ["c"]])
    results.add_row("magmax", [1.0, 0.5, 1.0], [1.0, 0.5, 1.0])
    probe = ForgetControl(tasks=[1])
    found = probe.summary({TEST: seen([1, 1, 0, 1], [0, 1, 1, 2])}, OCCASION)
    results.add_probe("magmax", probe.name, found, **probe.described())
    assert "50.0 [9.5, 90.5]" in probe_text(results)  # one of two images


def test_area_under_curve_equals_all_pairs():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randint(6, (count,), generator=generator).double() for count in (40, 23))
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert area_under_curve(positive, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    assert math.isnan(area_under_curve(positive, negative[:0]))


def test_membership_is_the_mean_over_the_tasks_learned():
    probe = MembershipInference()
    rows = probe.look(view([[math.log(3), 0.0, -math.inf]], [0]))
    assert float(rows) == pytest.approx(math.log(0.75))
    members, others = seen([-1.0, -3.0, 0.0], [0, 0, 2]), seen([-1.0, -2.0, -1.0], [0, 0, 2])
    found = probe.summary({MEMBERS: members, OTHERS: others}, OCCASION)
    assert found.per_task[0] == 1.5 / 4
    assert math.isnan(found.per_task[1])
    assert found.per_task[2] == 1.0
    assert found.value == 1.5 / 4  # task c is not learned yet
    assert found.n == [4, 0, 2]


def test_membership_draws_the_same_images_of_both_splits_by_task():
    stream = ClassIncremental(SklearnDigits())
    parts = MembershipInference(tasks=[1], images=10).parts(stream)
    assert {name: list(part) for name, part in parts.items()} == {MEMBERS: [1], OTHERS: [1]}
    members, others = parts[MEMBERS][1], parts[OTHERS][1]
    assert len(members.indices) == len(members.targets) == len(others.indices) == 10
    assert {*members.indices} <= {*stream.dataset(1, "train").plan.indices}
    assert {*members.targets} <= {2, 3}
    assert MembershipInference(tasks=[1], images=10).parts(stream)[MEMBERS][1].indices == members.indices
    assert len(MembershipInference().parts(stream)[OTHERS][4].indices) == len(stream.dataset(4, "test"))


def test_probes_of_unlearning_refuse_what_is_not_there():
    stream = ClassIncremental(SklearnDigits())
    with pytest.raises(ValueError, match="expected tasks to forget, got none"):
        ForgetControl(tasks=[])
    with pytest.raises(ValueError, match=r"expected tasks of ForgetControl to be in 0\.\.4"):
        ForgetControl(tasks=[7]).check(stream)
    with pytest.raises(ValueError, match=r"expected tasks of MembershipInference to be in 0\.\.4"):
        MembershipInference(tasks=[-1]).check(stream)
    with pytest.raises(ValueError, match="expected images of 1 or more, got 0"):
        MembershipInference(images=0)
