import pytest
import torch
from support.small_classifier import batch, move, small_classifier, start, step_of, term

from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import MeanTeacher


def at(monkeypatch, step):
    monkeypatch.setattr(ContinualClassifier, "global_step", property(lambda self: step))


def test_the_teacher_is_a_moving_average_that_moves_once_a_step(monkeypatch):
    module = small_classifier(MeanTeacher(2.0, decay=0.75))
    start(module, [0, 1, 2, 3])
    at(monkeypatch, 0)
    assert term(module)[0] == 0  # the teacher begins as the model
    average = {name: tensor.detach().clone() for name, tensor in module.named_parameters() if "teacher" not in name}
    for taken in (1, 2, 3):
        move(module, taken)
        at(monkeypatch, taken)
        for name, tensor in module.named_parameters():
            if name in average:
                average[name] = 0.75 * average[name] + 0.25 * tensor.detach()
        ours = module(batch()).detach().softmax(1)
        theirs = torch.func.functional_call(module, average, (batch(),)).detach().softmax(1)
        expected = 2.0 * float((ours - theirs).square().sum() / ours.numel())
        for _ in range(2):  # the second pass of one step, as with SAM
            assert term(module)[0] == pytest.approx(expected, rel=1e-9)


def test_a_resumed_step_moves_the_teacher_as_the_one_that_was_not_killed(monkeypatch):
    module, resumed = (small_classifier(MeanTeacher(decay=0.5)) for _ in range(2))
    for one in (module, resumed):
        start(one, [0, 1, 2, 3])
        move(one, 1)
    at(monkeypatch, 4)
    term(module)
    resumed.load_state_dict(module.state_dict())
    for one in (module, resumed):
        move(one, 2)
    at(monkeypatch, 5)
    (value, gradients), (again, others) = (term(one) for one in (module, resumed))
    assert value == again > 0
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_gradients_leave_the_teacher_alone(monkeypatch):
    module = small_classifier(MeanTeacher())
    start(module, [0, 1, 2, 3])
    move(module, 1)
    module.regularizers[0].penalty(step_of(module)).backward()
    assert module.regularizers[0].teacher.grad is None
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.backbone.parameters())


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"decay": 1.0}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        MeanTeacher(**options)
