import pytest
import torch
from support.small_classifier import end, move, small_classifier, start, term, weights

from clmerge.training.regularizers import WeightWatermark
from clmerge.weights.secrets import Secret, marked_vector

NAME = "backbone.model.0.weight"


def matrix_of(bits, numel):
    return torch.stack([Secret("mine", bits).read(unit) for unit in torch.eye(numel, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("of", ["task_vector", "weights"])
def test_the_term_is_the_mean_cross_entropy_of_the_bits(of):
    module = small_classifier(WeightWatermark("mine", "*model.0.weight", bits=8, strength=0.3, of=of))
    start(module, [0, 1])
    base = weights(module)[NAME]
    now = move(module, 1)[NAME]
    value, gradients = term(module)
    vector = (now - base if of == "task_vector" else now).reshape(-1)
    matrix, bits = matrix_of(8, vector.numel()), Secret("mine", 8).message.double()
    logits = matrix @ vector
    expected = -(bits * logits.sigmoid().log() + (1 - bits) * (1 - logits.sigmoid()).log()).mean()
    assert value == pytest.approx(0.3 * float(expected), rel=1e-9)
    gradient = 0.3 / 8 * matrix.T @ (logits.sigmoid() - bits)
    torch.testing.assert_close(gradients[NAME].reshape(-1), gradient, rtol=1e-9, atol=1e-12)
    assert all(not other.any() for name, other in gradients.items() if name != NAME)


@pytest.mark.parametrize("of", ["task_vector", "weights", "rounding"])
def test_descent_along_the_term_writes_the_message(of):
    module = small_classifier(WeightWatermark("mine", "*model.0.weight", bits=4, strength=1.0, of=of))
    start(module, [0, 1])
    optimizer = torch.optim.Adam([dict(module.named_parameters())[NAME]], lr=1e-3)
    base = weights(module)
    for _ in range(400):
        optimizer.zero_grad()
        _, gradients = term(module)
        dict(module.named_parameters())[NAME].grad = gradients[NAME].clone()
        optimizer.step()
    assert Secret("mine", 4).right(marked_vector(weights(module), base, "*model.0.weight", of)) == 4


def test_only_the_named_tasks_mark_and_theta_0_stays_that_of_the_first():
    module = small_classifier(WeightWatermark("mine", "*model.0.weight", bits=8, strength=1.0, tasks=[1]))
    start(module, [0, 1])
    move(module, 1)
    assert term(module)[0] == 0.0
    end(module)
    start(module, [2, 3])
    assert term(module)[0] > 0.0
    again = small_classifier(WeightWatermark("mine", "*model.0.weight", bits=8, strength=1.0, tasks=[1]))
    again.load_state_dict(module.state_dict(), strict=False)
    assert int(again.regularizers[0].num_past) == 1
    assert torch.equal(again.regularizers[0].base, module.regularizers[0].base)


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"bits": 0}, {"of": "bias"}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        WeightWatermark("mine", "*", **options)


def test_a_pattern_that_matches_nothing_is_refused_before_training():
    module = small_classifier(WeightWatermark("mine", "*no_such_weight"))
    with pytest.raises(ValueError, match="expected a pattern of a trained weight's name"):
        start(module, [0, 1])
