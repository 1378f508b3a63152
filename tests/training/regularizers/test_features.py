import pytest
import torch
from support.small_classifier import batch, move, small_classifier, start, term

from clmerge.training.regularizers import FeatureDistance


@pytest.mark.parametrize("to", ["previous", "base"])
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_the_term_is_the_mean_distance_to_the_features_of_the_earlier_model(to, distance):
    module = small_classifier(FeatureDistance(2.0, to=to, distance=distance))
    start(module, [0, 1])
    old = {"base": module.backbone(batch()).detach()}
    assert term(module)[0] == pytest.approx(0.0, abs=1e-12)
    move(module, 1)
    old["previous"] = module.backbone(batch()).detach()
    start(module, [2, 3])
    move(module, 2)
    now = module.backbone(batch()).detach()
    total = 0.0
    for f, g in zip(now, old[to], strict=True):
        if distance == "squared":
            total += float(((f - g) ** 2).sum())
        else:
            total += 2.0 * (1 - float((f @ g) / (f.norm() * g.norm())))
    value, gradients = term(module)
    assert value == pytest.approx(total / 6, rel=1e-10)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"to": "merged"}, {"distance": "euclid"}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        FeatureDistance(**{"strength": 1.0, **options})


def test_gradients_do_not_reach_the_teacher():
    module = small_classifier(FeatureDistance(1.0))
    start(module, [0, 1])
    move(module, 1)
    (one,) = module.regularizers
    assert not one.teacher.requires_grad
    assert not one.taught(module, batch(), features=True).requires_grad
    assert torch.is_grad_enabled()
