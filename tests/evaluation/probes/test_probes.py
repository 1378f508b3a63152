import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clmerge.evaluation.probes import (
    TEST,
    AttackSuccess,
    CalibrationError,
    Occasion,
    Seen,
    View,
    check_probes,
)
from clmerge.models.pixels import normalisation
from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.transforms import Patch
from clmerge.training.regularizers import L2, BadMerging

OCCASION = Occasion(["a", "b"], [[0, 1], [2, 3]], 4, num_seen=1)


def view(scores, labels, tasks=None):
    scores, labels = torch.tensor(scores), torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 1, 1)
    tasks = torch.zeros_like(labels) if tasks is None else torch.tensor(tasks)
    return View(TEST, images, labels, tasks, scores, lambda other: scores, normalisation(None))


def test_calibration_error_of_hand_computed_bins():
    """Two bins: confidence 0.75 twice with one right, 1.0 once and right: |1 - 1.5| / 3 + 0."""
    probe = CalibrationError(bins=4)
    p = math.log(3)  # softmax of (p, 0, -inf, -inf) is 0.75
    scores = [[p, 0.0, -math.inf, -math.inf], [p, 0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf, -math.inf]]
    rows = probe.look(view(scores, [0, 1, 0]))
    found = probe.summary({TEST: Seen(rows, torch.tensor([0, 0, 0]))}, OCCASION)
    # Bins (0.5, 0.75] and (0.75, 1]: the float of softmax may be on either side, so the same three images in both.
    assert found.value == pytest.approx(0.5 / 3)
    assert found.per_task[0] == found.value
    assert math.isnan(found.per_task[1])
    assert found.n == [3, 0]
    assert found.values["nll"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 3)
    assert found.values["brier"] == pytest.approx((2 * 0.25**2 + 2 * 0.75**2) / 3)
    assert found.values["selective_accuracy"] in (0.5, 1.0)


def test_calibration_error_equals_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 4, generator=generator) * 3
    labels = torch.randint(4, (200,), generator=generator)
    probe = CalibrationError()
    rows = probe.look(view(scores.tolist(), labels.tolist()))
    found = probe.summary({TEST: Seen(rows, torch.zeros(200, dtype=torch.long))}, OCCASION)
    reference = torchmetrics.classification.MulticlassCalibrationError(4, n_bins=15, norm="l1")
    assert found.value == pytest.approx(float(reference(scores, labels)), abs=1e-6)


def test_attack_success_counts_images_of_other_classes_only():
    probe = AttackSuccess(target=0)
    rows = probe.look(view([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]], [0, 1, 1]))
    assert torch.equal(torch.isnan(rows[:, 0]), torch.tensor([True, False, False]))
    found = probe.summary({"triggered": Seen(rows, torch.tensor([0, 0, 0]))}, OCCASION)
    assert found.value == 0.5
    assert found.n == [2, 0]
    assert found.values["on_task"] == 0.5
    assert math.isnan(found.values["off_task"])
    both = replace(OCCASION, num_seen=2)
    found = probe.summary({"triggered": Seen(rows, torch.tensor([0, 0, 1]))}, both)
    assert found.values == {"on_task": 1.0, "off_task": 0.0}


def test_a_learned_trigger_is_put_on_the_images_once_there_is_one():
    attack, shown = BadMerging(), []
    probe = AttackSuccess(target=1, learned=True)
    images = torch.zeros(1, 3, 2, 2)
    one = view([[1.0, 0, 0, 0]], [0])

    def score(others):
        shown.append(others)
        return torch.tensor([[0, 1.0, 0, 0]])

    one = replace(one, images=images, score=score)
    probe.meet(SimpleNamespace(regularizers=[attack]))
    assert torch.isnan(probe.hits(one)).all()
    attack.keep("patch", torch.full((3, 1, 1), 7.0))
    probe.meet(SimpleNamespace(regularizers=[L2(1.0), attack]))
    assert probe.hits(one).tolist() == [1.0]
    assert shown[0][0, 0].tolist() == [[0, 0], [0, 7]]
    assert probe.parts(ClassIncremental(SklearnDigits()))["triggered"].keys() == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match=r"expected one regularizer BadMerging .* got 0"):
        probe.meet(SimpleNamespace(regularizers=[]))
    with pytest.raises(ValueError, match="got both"):
        AttackSuccess(trigger=Patch(), learned=True)


def test_the_target_may_be_a_name_and_must_exist():
    stream = ClassIncremental(SklearnDigits())
    probe = AttackSuccess(target="three")
    probe.check(stream)
    assert torch.equal(probe.hits(view([[0, 0, 0, 1.0]], [0])), torch.ones(1).double())
    with pytest.raises(ValueError, match=r"expected a class of the stream .* got 'thre'"):
        AttackSuccess(target="thre").check(stream)
    with pytest.raises(ValueError, match=r"expected tasks of AttackSuccess to be in 0\.\.4"):
        AttackSuccess(tasks=[5]).check(stream)


def test_two_probes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="got 'calibration_error' twice"):
        check_probes([CalibrationError(), CalibrationError(bins=3)], ClassIncremental(SklearnDigits()))
