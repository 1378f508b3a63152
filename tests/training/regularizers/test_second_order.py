import pytest
import torch
from support.losses import regularized_loss
from support.small_classifier import (
    SmallBackbone,
    batch,
    end,
    made_up_fisher,
    move,
    small_classifier,
    start,
    step_of,
    term,
    weights,
)
from support.tiny import tiny_clip
from torch.func import functional_call

from clmerge.models import IA3, Adapters, Full, LinearHead, Linearized, LinearizedLoRA, LoRA, OpenClip
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import IEL, ITA, current_weights
from clmerge.training.regularizers.regularizer import named


def train_on(module, tasks):
    """Run independent made-up tasks from the base; return their task vectors and Fisher informations, and the base."""
    base = weights(module)
    own = dict(module.named_parameters())
    seen = []
    for task in range(tasks):
        with torch.no_grad():
            for name, value in base.items():
                own[name].copy_(value)
        fisher = made_up_fisher(module, task)

        def at_the_base(fisher=fisher):
            for name, value in base.items():
                assert torch.equal(dict(module.named_parameters())[name], value)
            return fisher

        start(module, [task], at_the_base)
        theta = move(module, task)
        end(module, at_the_base)
        assert all(torch.equal(theta[n], w) for n, w in weights(module).items())
        seen.append(({n: theta[n] - base[n] for n in theta}, fisher))
    with torch.no_grad():
        for name, value in base.items():
            own[name].copy_(value)
    return base, seen


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_ita_weighs_the_task_vector_by_the_mean_fisher_information_of_earlier_tasks(tasks):
    module = small_classifier(ITA(0.2))
    base, seen = train_on(module, tasks)
    start(module, [3])
    now = move(module, 9)
    value, gradients = term(module)
    expected = 0.0
    for name, gradient in gradients.items():
        fisher = sum(one[name] for _, one in seen) / tasks
        tau = now[name] - base[name]
        expected += 0.1 * float((fisher * tau.square()).sum())
        torch.testing.assert_close(gradient, 0.2 * fisher * tau, rtol=1e-12, atol=1e-12)
    assert value == pytest.approx(expected, rel=1e-12)


def test_ita_has_no_term_in_the_first_task():
    module = small_classifier(ITA())
    start(module, [0])
    move(module, 1)
    assert term(module) == (0.0, {})


@pytest.mark.parametrize("tasks", [1, 2])
def test_iel_pulls_task_vectors_together_as_the_pairwise_form_says(tasks):
    """Up to what does not depend on tau_t, the term is T/2 times sum over k of |tau_t - tau_k|_F^2 / T^2."""
    module = small_classifier(IEL(0.7))
    base, seen = train_on(module, tasks)
    last = made_up_fisher(module, 7)
    start(module, [3], lambda: last)
    now = move(module, 9)
    _, gradients = term(module)
    total = tasks + 1
    taus = {name: (now[name] - base[name]).requires_grad_() for name in now}
    pairwise = torch.zeros(())
    for name, tau in taus.items():
        fisher = (sum(one[name] for _, one in seen) + last[name]) / total
        for past, _ in seen:
            pairwise = pairwise + (fisher * (tau - past[name]).square()).sum() / total**2
    wanted = torch.autograd.grad(0.7 * total / 2 * pairwise, list(taus.values()))
    for gradient, expected in zip(gradients.values(), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tasks", [0, 2])
def test_iel_computes_the_loss_with_the_composed_model(tasks):
    module = small_classifier(IEL(0.0))
    base, seen = train_on(module, tasks)
    start(module, [3], lambda: made_up_fisher(module, 7))
    now = move(module, 9)
    taus = [tau for tau, _ in seen] + [{n: now[n] - base[n] for n in now}]
    composed = {n: base[n] + sum(tau[n] for tau in taus) / len(taus) for n in now}
    images, labels = batch(), torch.full((6,), 3)
    loss, _ = regularized_loss(module, list(module.regularizers), images, labels)
    expected = module.loss(functional_call(module, composed, (images,)), labels).detach()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    own = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [own[n] for n in now])
    leaves = {n: value.requires_grad_() for n, value in composed.items()}
    wanted = torch.autograd.grad(module.loss(functional_call(module, leaves, (images,)), labels), list(leaves.values()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other / len(taus), rtol=1e-10, atol=1e-12)


def test_only_one_regularizer_chooses_the_weights_of_the_loss():
    module = small_classifier(IEL(1.0), IEL(1.0))
    start(module, [0], lambda: made_up_fisher(module, 7))
    with pytest.raises(ValueError, match="give IEL only once"):
        regularized_loss(module, list(module.regularizers), batch(), torch.zeros(6, dtype=torch.long))


def test_iel_in_the_first_task_counts_two_tasks_as_the_authors_do():
    module = small_classifier(IEL(1.0))
    fisher = made_up_fisher(module, 7)
    start(module, [0], lambda: fisher)
    base = weights(module)
    now = move(module, 9)
    value = module.regularizers[0].penalty(step_of(module))
    expected = sum(float((fisher[n] * (now[n] - base[n]).square()).sum()) for n in now) / 4
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)


def test_iel_trains_low_rank_factors_through_the_composed_model():
    """The gradient by a factor is that by the dense weights, pulled back by hand: dB = dW A^T, dA = B^T dW."""
    module = ContinualClassifier(
        SmallBackbone(),
        LinearHead(),
        loss_classes="seen",
        tuning=LoRA(rank=2, alpha=2.0, targets="0|2"),
        regularizers=[IEL(0.5)],
    )
    module.begin_stream(4)
    module.double()
    fisher = {name: torch.ones_like(value) for name, value in current_weights(module).items()}
    for task in range(2):
        start(module, [task], lambda: fisher)
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for name, parameter in module.backbone.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        if task == 0:
            end(module)
    dense = {name: value.detach().requires_grad_() for name, value in current_weights(module).items()}
    (iel,) = module.regularizers
    images, labels = batch(), torch.tensor([0, 1, 0, 1, 0, 1])
    loss, terms = regularized_loss(module, list(module.regularizers), images, labels)
    lora = module.backbone.model[0]
    a, b = lora.lora_A_weight, lora.lora_B_weight
    by_a, by_b = torch.autograd.grad(loss + terms["iel"], [a, b])

    plain = SmallBackbone().double()
    plain.load_state_dict({n: p for n, p in module.backbone.state_dict().items() if "lora_" not in n})
    base, past = (named(kept, dense) for kept in (iel.base, iel.past))
    composed = {n.removeprefix("backbone."): base[n] + (past[n] + w - base[n]) / 2 for n, w in dense.items()}
    features = functional_call(plain, composed, (images,))
    tau = {n: w - base[n] for n, w in dense.items()}
    term = 0.5 * sum((t * (t / 4 - past[n] / 2)).sum() for n, t in tau.items())
    (by_weight,) = torch.autograd.grad(
        module.loss(module.head(features), labels) + term, [dense["backbone.model.0.weight"]]
    )
    scale = lora.lora_scale
    torch.testing.assert_close(by_b, scale * by_weight @ a.detach().T)
    torch.testing.assert_close(by_a, scale * b.detach().T @ by_weight)


@pytest.mark.parametrize("tuning", [Full, LoRA, IA3, Adapters, Linearized, LinearizedLoRA])
def test_iel_of_one_task_is_the_task_itself_in_every_mode_of_tuning(tmp_path, tuning):
    torch.manual_seed(0)
    module = ContinualClassifier(OpenClip(tiny_clip(tmp_path)), LinearHead(), tuning=tuning(), regularizers=[IEL(0.0)])
    module.begin_stream(2)
    module.begin_task([0, 1])
    fisher = {name: torch.ones_like(value) for name, value in current_weights(module).items()}
    module.regularizers[0].begin_task(module, lambda: fisher)
    trained = [parameter for parameter in module.backbone.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    composed, plain = (
        regularized_loss(module, list(module.regularizers), images, labels)[0],
        module.loss(module(images), labels),
    )
    torch.testing.assert_close(composed, plain)
    for one, other in zip(*(torch.autograd.grad(loss, trained) for loss in (composed, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
