import math

import pytest
import torch
from support.small_classifier import batch, move, small_classifier, start, step_of, term
from support.toy_backbone import ToyBackbone

from clmerge.models import LinearHead
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import LwF
from clmerge.training.regularizers.distillation import distillation


def test_distillation_is_the_formula_of_the_paper():
    """y'_c = y_c^(1/T) / sum_j y_j^(1/T), then minus sum over c of y'_c log yhat'_c, from probabilities, by hand."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for i in range(3):
        softened = []
        for logits in (ours[i], theirs[i]):
            p = [math.exp(z) / sum(math.exp(float(other)) for other in logits) for z in logits.tolist()]
            root = [value ** (1 / 2) for value in p]
            softened.append([value / sum(root) for value in root])
        total -= sum(t * math.log(o) for o, t in zip(*softened, strict=True))
    assert float(distillation(ours, theirs, 2.0)) == pytest.approx(total / 3, rel=1e-12)


def test_lwf_compares_the_old_classes_with_the_model_that_the_task_starts_from():
    module = small_classifier(LwF(0.3))
    start(module, [0, 2])
    move(module, 1)
    assert term(module) == (0.0, {})  # nothing is old in the first task
    before = module(batch())[:, [0, 2]].detach()
    start(module, [1, 3])
    value, gradients = term(module)
    soft = (before / 2).softmax(dim=1)
    assert value == pytest.approx(0.3 * float(-(soft * soft.log()).sum(dim=1).mean()), rel=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients.values())  # nothing has moved yet
    move(module, 2)
    with torch.no_grad():
        module.head.blocks[0].add_(0.5)  # old rows may be trained, too
    after = module(batch())[:, [0, 2]].detach()
    expected = 0.3 * float(-(soft * (after / 2).log_softmax(dim=1)).sum(dim=1).mean())
    value, gradients = term(module)
    assert value == pytest.approx(expected, rel=1e-12)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())


def test_the_teacher_is_in_evaluation_mode_with_its_own_running_statistics():
    torch.manual_seed(0)
    module = ContinualClassifier(ToyBackbone(), LinearHead(), regularizers=[LwF()])
    module.begin_stream(4)
    images = torch.randn(8, 3, 4, 4)
    start(module.double(), [0, 1])
    start(module, [2, 3])
    expected = module.eval()(images.double())
    module.train()
    module(images.double() * 3 + 1)  # moves the running statistics
    (lwf,) = module.regularizers
    assert torch.equal(lwf.taught(module, images.double()), expected)
    assert module.backbone.model[3].training
    assert not torch.equal(module.eval()(images.double()), expected)


def test_classes_that_come_again_in_another_domain_are_old():
    module = small_classifier(LwF())
    start(module, [0, 1])
    move(module, 1)
    start(module, [0, 1])
    move(module, 2)
    assert term(module)[0] > 0


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"temperature": 0.0}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        LwF(**options)


def test_a_teacher_costs_a_copy_of_weights_and_head():
    module = small_classifier(LwF())
    start(module, [0, 1])
    step_of(module)
    own = dict(module.named_parameters())
    numel = sum(own[n].numel() for n in module.trained_names) + module.head.blocks[0].numel()
    assert module.regularizers[0].nbytes == 8 * numel
