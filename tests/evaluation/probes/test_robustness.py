"""Probes of robustness, of what is out of distribution and of novel classes, on models whose answers are known."""

import itertools
import math

import numpy as np
import pytest
import torch

from clmerge.evaluation.probes import (
    CorruptionAccuracy,
    HeldOutAccuracy,
    NovelClassAccuracy,
    Occasion,
    PGDAccuracy,
    Seen,
    View,
)
from clmerge.evaluation.probes.novel_class_accuracy import clustering_accuracy
from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.transforms import Domains, HeldOut, Unchanged

OCCASION = Occasion(["a", "b"], [[0, 1], [2, 3]], 4, num_seen=2)
PLAIN = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def linear_view(images, labels, weight, bias, known=True):
    """A binary linear model over classes 0 and 1; class 2 has no logit yet, class 3 competes not."""

    def score(others):
        margin = others.double().flatten(1) @ weight.flatten() + bias
        none = torch.full_like(margin, -math.inf)
        return torch.stack([margin / 2, -margin / 2, none, none], dim=1)

    tasks = torch.zeros_like(labels)
    return View("attacked", images, labels, tasks, score(images), score, PLAIN)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_accuracy_of_a_linear_model_is_in_closed_form(norm):
    """An image is robust if and only if its margin is above eps times the dual norm of the weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(200, 3, 4, 4, generator=generator, dtype=torch.float64)
    bias = -float((images.flatten(1) @ weight.flatten()).median())
    margins = images.flatten(1) @ weight.flatten() + bias
    labels = (margins < 0).long()
    labels[:20] = 1 - labels[:20]  # and some are wrong without an attack
    dual = float(weight.abs().sum() if norm == "linf" else weight.norm())
    eps = float(margins.abs().median()) / dual
    expected = torch.where(labels == (margins < 0).long(), margins.abs() > eps * dual, False)
    rows = PGDAccuracy(norm, eps=eps).look(linear_view(images, labels, weight, bias))
    near = (margins.abs() - eps * dual).abs() < 0.02 * eps * dual  # 20 steps of l2 end a little before the border
    assert near.sum() < 10
    assert torch.equal(rows[~near, 0].bool(), expected[~near])
    assert 0.2 < float(rows[:, 0].mean()) < 0.7
    assert torch.equal(rows[:, 1].bool(), labels == (margins < 0).long())


def test_classes_that_a_head_does_not_know_are_wrong_and_not_attacked():
    weight = torch.ones(3, 2, 2, dtype=torch.float64)
    images = torch.full((2, 3, 2, 2), 0.5)
    rows = PGDAccuracy().look(linear_view(images, torch.tensor([0, 2]), weight, 0.0))
    assert rows.tolist() == [[1, 1], [0, 0]]
    alone = PGDAccuracy().look(linear_view(images[:1], torch.tensor([2]), weight, 0.0))
    assert alone.tolist() == [[0, 0]]


def test_an_attack_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    images, labels = torch.rand(40, 3, 4, 4, generator=generator), torch.arange(40) % 2
    probe = PGDAccuracy(eps=0.05, restarts=2)
    whole = probe.look(linear_view(images, labels, weight, 0.0))
    parts = [probe.look(linear_view(images[p], labels[p], weight, 0.0)) for p in torch.arange(40).split(7)]
    assert torch.equal(whole, torch.cat(parts))


def test_pgd_accuracy_is_by_task_beside_the_clean_one():
    rows = torch.tensor([[1.0, 1], [0, 1], [0, 0], [1, 1]])
    found = PGDAccuracy("l2").summary({"attacked": Seen(rows, torch.tensor([0, 0, 0, 1]))}, OCCASION)
    assert found.per_task == [pytest.approx(1 / 3), 1.0]
    assert found.value == pytest.approx(2 / 3)
    assert found.values == {"clean": pytest.approx((2 / 3 + 1) / 2)}
    assert found.n == [3, 1]
    assert (PGDAccuracy("l2").name, PGDAccuracy().name) == ("pgd_l2", "pgd_linf")


def test_attacked_images_are_a_seeded_draw():
    stream = ClassIncremental(SklearnDigits())
    drawn = [PGDAccuracy(num_images=10, seed=seed, tasks=[2]).parts(stream)["attacked"] for seed in (0, 0, 1)]
    assert [*drawn[0]] == [2]
    assert drawn[0][2] == drawn[1][2] != drawn[2][2]
    assert set(drawn[0][2].indices) < set(stream.dataset(2, "test").plan.indices)
    whole = PGDAccuracy(num_images=10_000).parts(stream)["attacked"]
    assert [len(plan.indices) for plan in whole.values()] == [len(stream.dataset(task, "test")) for task in range(5)]


def test_corruption_accuracy_is_the_mean_over_corruptions():
    probe = CorruptionAccuracy(["contrast", "jpeg"])
    tasks = torch.tensor([0, 0, 1])
    seen = {
        "contrast": Seen(torch.tensor([[1.0], [0.0], [1.0]]), tasks),
        "jpeg": Seen(torch.tensor([[1.0], [1.0], [0.0]]), tasks),
    }
    found = probe.summary(seen, OCCASION)
    assert found.values == {"contrast": 0.75, "jpeg": 0.5}
    assert found.per_task == [0.75, 0.5]
    assert found.value == 0.625
    assert found.n == [2, 1]
    first = probe.summary(seen, Occasion(["a", "b"], [[0, 1], [2, 3]], 4, num_seen=1))
    assert first.value == 0.75


def test_corruption_accuracy_looks_at_corrupted_test_images():
    stream = ClassIncremental(SklearnDigits())
    parts = CorruptionAccuracy(severity=5).parts(stream)
    assert len(parts) == 6
    for plans in parts.values():
        for task, plan in plans.items():
            assert plan.indices == stream.dataset(task, "test").plan.indices
            assert plan.targets == stream.dataset(task, "test").plan.targets
    one, other = (parts[kind][0].images.image(0) for kind in ("contrast", "brightness"))
    assert np.asarray(one).max() < np.asarray(other).max()


def test_held_out_accuracy_is_by_held_out_task():
    stream = ClassIncremental(SklearnDigits()).turned_into([HeldOut([3, 1])])
    probe = HeldOutAccuracy()
    probe.check(stream)
    parts = probe.parts(stream)
    assert [*parts] == ["six-seven", "two-three"]
    assert [[*plans] for plans in parts.values()] == [[-1], [-1]]
    none = torch.tensor([-1, -1])
    seen = {
        "six-seven": Seen(torch.tensor([[1.0], [0.0]]), none),
        "two-three": Seen(torch.tensor([[1.0], [1.0]]), none),
    }
    found = probe.summary(seen, OCCASION)
    assert (found.value, found.values, found.n) == (
        0.75,
        {"six-seven": 0.5, "two-three": 1.0},
        {"six-seven": 2, "two-three": 2},
    )
    unknown = probe.summary({"six-seven": Seen(torch.zeros(0, 1), none[:0])}, OCCASION)
    assert math.isnan(unknown.value)


@pytest.mark.parametrize("probe", [HeldOutAccuracy(), NovelClassAccuracy()])
def test_held_out_tasks_must_be_there(probe):
    with pytest.raises(ValueError, match="expected tasks that were taken out of the stream"):
        probe.check(ClassIncremental(SklearnDigits()))


def test_novel_classes_are_no_domains():
    stream = ClassIncremental(SklearnDigits()).turned_into([Domains([Unchanged(), Unchanged()]), HeldOut([1])])
    with pytest.raises(ValueError, match="expected classes of held-out tasks to be in no other task"):
        NovelClassAccuracy().check(stream)


def novel_rows(probe, scores, labels, part, tasks):
    images = torch.zeros(len(labels), 3, 1, 1)
    labels, tasks = torch.tensor(labels), torch.tensor(tasks)
    scores = torch.tensor(scores)
    return Seen(probe.look(View(part, images, labels, tasks, scores, lambda other: scores, PLAIN)).double(), tasks)


def test_novel_class_accuracy_is_the_harmonic_mean():
    """Three old images of which two are right, two novel ones of which one is: 2 * 2/3 * 1/2 / (7/6) = 4/7."""
    probe = NovelClassAccuracy()
    old = novel_rows(probe, [[5.0, 0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 5.0]], [0, 0, 1], "old", [0, 0, 0])
    novel = novel_rows(probe, [[0.0, 0, 5, 0], [5.0, 0, 0, 0]], [2, 3], "novel 0", [-1, -1])
    found = probe.summary({"old": old, "novel 0": novel}, OCCASION)
    assert found.values["old"] == pytest.approx(2 / 3)
    assert found.values["novel"] == 0.5
    assert found.value == pytest.approx(4 / 7)
    assert found.values["clustering"] == 1.0  # the two answers differ, whatever they say
    assert found.n == {"old": 3, "novel": 2}


def test_a_head_that_does_not_know_the_novel_classes_still_clusters_them():
    probe = NovelClassAccuracy()
    gone = -math.inf
    old = novel_rows(probe, [[5.0, 0, gone, gone]], [0], "old", [0])
    scores = [[9.0, 0, gone, gone], [9.1, 0, gone, gone], [0, 9.0, gone, gone], [0, 9.2, gone, gone]]
    novel = novel_rows(probe, scores, [2, 2, 3, 2], "novel 0", [-1] * 4)
    found = probe.summary({"old": old, "novel 0": novel}, OCCASION)
    assert found.values["old"] == 1.0
    assert math.isnan(found.values["novel"])
    assert math.isnan(found.value)
    assert found.values["clustering"] == 0.75


def test_clustering_accuracy_is_that_of_the_best_assignment():
    rng = np.random.default_rng(0)
    for _ in range(5):
        labels, clusters = rng.integers(4, size=30) + 5, rng.integers(4, size=30)
        best = max(
            np.mean([order[cluster] == label for cluster, label in zip(clusters, labels, strict=True)])
            for order in itertools.permutations(range(5, 9))
        )
        assert clustering_accuracy(labels, clusters) == pytest.approx(best)
    assert clustering_accuracy(np.array([1, 1, 2]), np.array([0, 1, 2])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDAccuracy(steps=0), "expected steps, restarts and num_images of 1 or more"),
        (lambda: PGDAccuracy(eps=-1.0), "eps of 0 or more"),
        (lambda: PGDAccuracy(tasks=[9]).check(ClassIncremental(SklearnDigits())), "expected tasks of PGDAccuracy"),
        (lambda: CorruptionAccuracy([]), "expected one corruption or more"),
        (lambda: CorruptionAccuracy(severity=7), "at a severity from 1 to 5"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
