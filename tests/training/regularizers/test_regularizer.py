import pytest
import torch
from support.losses import regularized_loss
from support.small_classifier import (
    REGULARIZERS,
    SmallBackbone,
    batch,
    end,
    made_up_fisher,
    move,
    small_classifier,
    start,
    weights,
)
from support.toy_parametrized import Shifted

from clmerge.models import LinearHead
from clmerge.training.regularizers import EWC, L2, LwF


def test_terms_go_by_name_and_numbers_tell_two_of_a_kind_apart():
    module = small_classifier(L2(1.0), L2(2.0, to="base"), LwF())
    start(module, [0, 1])
    move(module, 1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    loss, terms = regularized_loss(module, list(module.regularizers), batch(), labels)
    assert set(terms) == {"l2", "l2_1", "lwf"}
    assert float(terms["l2_1"].detach()) == pytest.approx(2 * float(terms["l2"].detach()))
    assert torch.equal(loss, module.loss(module(batch()), labels))


@pytest.mark.parametrize("name", list(REGULARIZERS))
def test_what_is_remembered_is_saved_and_loaded_before_its_shape_is_known(name):
    module = small_classifier(REGULARIZERS[name](), head=LinearHead())
    for task in range(2):
        start(module, [task], lambda: made_up_fisher(module, 1))
        move(module, task)
        end(module, lambda: made_up_fisher(module, 2))
    twin = small_classifier(REGULARIZERS[name](), head=LinearHead(), seed=1)
    twin.resume_tasks([[0], [1]])
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    twin.load_state_dict(saved)
    for one in (module, twin):
        torch.manual_seed(5)
        start(one, [2], lambda one=one: made_up_fisher(one, 3))
        move(one, 9)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    (loss, terms), (other_loss, others) = (
        regularized_loss(one, list(one.regularizers), batch(), labels) for one in (module, twin)
    )
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(terms[key], others[key]) for key in terms)


@pytest.mark.parametrize("name", list(REGULARIZERS))
def test_what_is_remembered_is_neither_trained_nor_broadcast_nor_merged(name):
    module = small_classifier(REGULARIZERS[name](), backbone=SmallBackbone())
    start(module, [0], lambda: made_up_fisher(module, 1))
    kept = [key for key in module.state_dict() if key.startswith("regularizers.")]
    assert kept
    assert not any(name.startswith("regularizers.") for name, _ in module.named_buffers())
    assert not any(p.requires_grad for key, p in module.named_parameters() if key in kept)
    assert not set(kept) & set(module.trained_names)
    before = weights(module)
    module.float()
    assert all(p.dtype != torch.float64 for p in module.regularizers.parameters())
    assert set(before) == set(weights(module))


@pytest.mark.parametrize("name", list(REGULARIZERS))
@pytest.mark.parametrize("compiled", [False, True])
def test_terms_and_gradients_are_the_same_in_a_mode_that_trains_other_tensors(name, compiled):
    plain, other = (small_classifier(REGULARIZERS[name](), head=LinearHead()) for _ in range(2))
    net = other.backbone.model  # gradients are compared in its order of parameters
    other.backbone.model = torch.compile(net, backend="eager") if compiled else Shifted(net)
    found = []
    for one in (plain, other):
        torch.manual_seed(3)
        for task in range(3):
            start(one, [task], lambda one=one, task=task: made_up_fisher(plain, task))
            own = dict(one.named_parameters())
            where = {plain: "{}", other: "_orig_mod.{}" if compiled else "shift.{}"}[one]
            keys = [name if where != "shift.{}" else name.replace(".", "/") for name, _ in net.named_parameters()]
            tensors = [own["backbone.model." + where.format(key)] for key in keys]
            for i, tensor in enumerate(tensors):
                generator = torch.Generator().manual_seed(10 * task + i)
                with torch.no_grad():
                    tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64), alpha=0.3)
            if task < 2:
                end(one, lambda task=task: made_up_fisher(plain, task))
        loss, terms = regularized_loss(one, list(one.regularizers), batch(), torch.tensor([0, 1, 2, 0, 1, 2]))
        total = loss + sum(terms.values())
        found.append((total.detach(), torch.autograd.grad(total, tensors)))
    (value, gradients), (again, others) = found
    torch.testing.assert_close(value, again, rtol=1e-12, atol=0)
    for gradient, twin in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-12)


def test_a_foreign_trainer_needs_no_learner():
    """A module with regularizers trains in a project that never calls begin_task of them: nothing is remembered."""
    module = small_classifier(EWC(), LwF())
    module.begin_task([0, 1])
    module.double()
    _, terms = regularized_loss(module, list(module.regularizers), batch(), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert [float(term) for term in terms.values()] == [0.0, 0.0]
