import math

import pytest
import torch

from clmerge.merging import Agreement, CrossEntropy, Distillation, Entropy, FeatureMatch, Given, Outputs

TWO = torch.arange(2)


def outputs(probabilities):
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    return Outputs(logits, logits)


def given(**known):
    return Given(TWO, TWO, **known)


def test_agreement_keeps_the_images_whose_expert_is_to_be_trusted():
    expert, merged = outputs([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]), outputs([[0.8, 0.2], [0.1, 0.9], [0.05, 0.95]])
    loss = Agreement()(merged, given(expert=expert))
    assert float(loss) == pytest.approx(-(math.log(0.8) + math.log(0.95)) / 2, abs=1e-12)
    assert float(loss) == pytest.approx(0.137218, abs=1e-6)


def test_agreement_on_no_image_is_zero_with_a_zero_gradient():
    logits = torch.tensor([[0.0, 3.0]], requires_grad=True)
    loss = Agreement()(Outputs(logits, logits), given(expert=outputs([[0.6, 0.4]])))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == [[0, 0]]


def test_entropy_and_its_gradient_in_closed_form():
    # W0 = I, tau1 = e11, tau2 = 2 e22, x = (1, .5), coefficients (.3, .3)
    coefficients = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    logits = torch.stack([1 + coefficients[0], 0.5 * (1 + 2 * coefficients[1])])[None]
    loss = Entropy()(Outputs(logits, logits), given())
    loss.backward()
    assert loss.item() == pytest.approx(0.662847, abs=1e-6)
    assert coefficients.grad.tolist() == pytest.approx([-0.117502, 0.117502], abs=1e-6)


def test_heads_choose_the_classes_that_compete():
    logits = torch.tensor([[1.0, 2.0, 3.0, -torch.inf]])
    known = Given(torch.tensor([1]), torch.tensor([0, 1, 2]), labels=torch.tensor([1]))
    everything = Outputs(logits, logits)
    assert float(CrossEntropy()(everything, known)) == 0
    wanted = math.log(sum(math.exp(z) for z in (1, 2, 3))) - 2
    assert float(CrossEntropy(heads="seen")(everything, known)) == pytest.approx(wanted, abs=1e-6)
    assert float(Entropy()(everything, known)) == 0
    assert math.isfinite(Entropy(heads="seen")(everything, known))


def test_labels_are_class_ids_of_the_stream():
    logits = torch.zeros(1, 10)
    logits[0, 7] = 2.0
    known = Given(torch.tensor([3, 7]), torch.arange(10), labels=torch.tensor([7]))
    assert float(CrossEntropy()(Outputs(logits, logits), known)) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_distillation_is_least_at_the_experts_own_predictions():
    expert = outputs([[0.9, 0.1]])
    logits = expert.logits.clone().requires_grad_()
    at_expert = Distillation(temperature=3.0)(Outputs(logits, logits), given(expert=expert))
    at_expert.backward()
    assert logits.grad.abs().max() < 1e-12
    assert at_expert < Distillation(temperature=3.0)(outputs([[0.8, 0.2]]), given(expert=expert))


def test_feature_match_is_a_mean_of_differences_or_of_their_squares():
    model, expert = (Outputs(torch.zeros(1, 2), torch.tensor([row])) for row in ([1.0, 5.0], [2.0, 2.0]))
    assert float(FeatureMatch()(model, given(expert=expert))) == 2
    assert float(FeatureMatch(power=2)(model, given(expert=expert))) == 5


def test_half_precision_is_read_in_single():
    logits = torch.randn(4, 2, dtype=torch.bfloat16)
    assert Entropy()(Outputs(logits, logits), given()).dtype == torch.float32


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="heads"):
        Entropy(heads="all")
    with pytest.raises(ValueError, match="temperature above 0"):
        Distillation(temperature=0)
    with pytest.raises(ValueError, match="power"):
        FeatureMatch(power=3)
