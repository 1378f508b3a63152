import pytest
import torch
from support.small_classifier import move, small_classifier, start, term, weights

from clmerge.training.regularizers import L2


@pytest.mark.parametrize("to", ["previous", "base"])
def test_the_term_is_half_the_squared_distance_to_the_anchor(to):
    module = small_classifier(L2(0.5, to=to))
    start(module, [0, 1])
    base = weights(module)
    assert term(module)[0] == 0.0
    previous = move(module, 1)
    start(module, [2, 3])
    now = move(module, 2)
    anchor = base if to == "base" else previous
    value, gradients = term(module)
    assert value == pytest.approx(0.25 * sum(float((now[n] - anchor[n]).square().sum()) for n in now), rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, 0.5 * (now[name] - anchor[name]), rtol=1e-12, atol=1e-12)


def test_previous_is_where_the_task_starts_whatever_the_start_policy():
    module = small_classifier(L2(1.0))
    start(module, [0, 1])
    move(module, 1)
    move(module, 2)  # a start policy puts other weights in
    start(module, [2, 3])
    assert term(module)[0] == 0.0


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"strength": float("nan")}, {"strength": 1.0, "to": "merged"}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        L2(**options)


def test_it_counts_its_bytes():
    module = small_classifier(L2(1.0))
    start(module, [0, 1])
    assert module.regularizers[0].nbytes == 8 * sum(w.numel() for w in weights(module).values())
