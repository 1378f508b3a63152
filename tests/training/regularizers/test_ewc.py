import pytest
import torch
from support.small_classifier import batch, end, made_up_fisher, move, small_classifier, start, term, weights
from torch import nn

from clmerge.statistics.collectors import diagonal_fisher
from clmerge.training.regularizers import EWC


def train_on(module, tasks):
    """Run made-up tasks; return every task's final weights and Fisher information."""
    seen = []
    for task in range(tasks):
        start(module, [task])
        theta, fisher = move(module, task), made_up_fisher(module, task)
        if task == 1:
            fisher["backbone.model.0.weight"].zero_()
        if task == 2:
            fisher["backbone.model.0.bias"].zero_()
        end(module, lambda fisher=fisher: fisher)
        seen.append((theta, fisher))
    return seen


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_it_is_the_sum_of_one_quadratic_per_task(tasks):
    module = small_classifier(EWC(3.0))
    seen = train_on(module, tasks)
    start(module, [3])
    now = move(module, 9)
    value, gradients = term(module)
    expected = sum(float((fisher[n] * (now[n] - theta[n]).square()).sum()) for theta, fisher in seen for n in now)
    assert value == pytest.approx(1.5 * expected, rel=1e-10)
    for name, gradient in gradients.items():
        wanted = 3.0 * sum(fisher[name] * (now[name] - theta[name]) for theta, fisher in seen)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_online_it_is_one_quadratic_around_the_last_task(decay):
    module = small_classifier(EWC(2.0, decay=decay))
    seen = train_on(module, 3)
    now = move(module, 9)
    value, gradients = term(module)
    last = seen[-1][0]
    for name, gradient in gradients.items():
        fisher = sum(decay ** (2 - k) * one[name] for k, (_, one) in enumerate(seen))
        torch.testing.assert_close(gradient, 2.0 * fisher * (now[name] - last[name]), rtol=1e-10, atol=1e-10)
    assert value > 0


def test_a_task_whose_fisher_information_is_zero_everywhere_leaves_no_nan():
    module = small_classifier(EWC(1.0))
    start(module, [0])
    for seed in (1, 2):
        move(module, seed)
        end(module, lambda: {name: torch.zeros_like(value) for name, value in weights(module).items()})
    move(module, 3)
    assert term(module)[0] == 0.0


def test_the_state_does_not_grow_with_the_tasks():
    module = small_classifier(EWC())
    sizes = []
    for task in range(3):
        start(module, [task])
        end(module, lambda: made_up_fisher(module, 1))
        sizes.append(module.regularizers[0].nbytes)
    assert sizes == [16 * sum(w.numel() for w in weights(module).values()) + 8] * 3


def test_no_term_before_a_task_has_ended():
    module = small_classifier(EWC())
    start(module, [0])
    move(module, 1)
    assert term(module) == (0.0, {})


def test_the_collector_gives_the_fisher_information_of_a_softmax():
    """Two classes, one input x, logits w x: F = p (1 - p) x^2 for each row, by hand."""
    layer = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3], [-0.2]]))
    x = batch(5)[:, :1]
    p = torch.softmax(x @ layer.weight.T, dim=1)[:, 0]
    expected = (p * (1 - p) * x[:, 0].square()).mean()
    found = diagonal_fisher(layer, [x])["weight"]
    torch.testing.assert_close(found, expected.detach().expand(2, 1))


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"decay": 1.5}, {"decay": -0.1}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        EWC(**options)
