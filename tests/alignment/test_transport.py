import copy
import re

import pytest
import torch
from support.networks import network
from support.swap_toy import toy
from torch import nn
from torch.nn import functional

from clmerge.alignment import (
    Auto,
    GradientSignMask,
    Identity,
    Permuted,
    Procrustes,
    Swap,
    Transport,
    WeightMatching,
    barrier,
    spec_of,
)
from clmerge.alignment.reparametrization import random_reparametrization


def swap_of(source, target, names, *, images=(), gradients=None, readers=None):
    return Swap(
        source,
        target,
        lambda: spec_of(source, readers=readers),
        tuple(names),
        lambda count: images,
        gradients or (lambda task, count: []),
    )


@pytest.fixture(scope="module")
def turned():
    return toy(pretraining=10, tuning=8)


def toy_swap(toy):
    def gradients(task, count):
        for row in range(20):
            loss = functional.cross_entropy(toy.new(toy.train[0][row : row + 1]), toy.train[1][row : row + 1])
            found = torch.autograd.grad(loss, list(toy.new.parameters()))
            yield dict(zip(toy.tau, found, strict=True))

    images = toy.train[0].split(64)
    return swap_of(toy.old, toy.new, toy.tau, images=images, gradients=gradients)


def carried(toy, transport):
    transport.prepare(toy_swap(toy))
    return transport.transport(toy.tau, 0)


def check_toy(toy):
    assert toy.accuracy() < 0.2
    assert toy.accuracy(carried(toy, Identity())) < 0.4
    assert toy.accuracy(carried(toy, Permuted())) > 0.6
    assert toy.oracle > 0.95


def test_a_task_reaches_another_release_by_permutation(turned):
    check_toy(turned)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [(0, 1), (2, 3)])
def test_a_task_reaches_another_release_after_long_pretraining(seeds):
    check_toy(toy(seeds))


def test_the_choice_goes_by_the_barrier(turned):
    choice = Auto()
    moved = carried(turned, choice)
    assert isinstance(choice.chosen, Permuted)
    assert re.fullmatch(r"matching lowers the barrier from 0\.\d+ to 0\.\d+", choice.why)
    expected = carried(turned, Permuted())
    assert all(torch.equal(moved[name], expected[name]) for name in moved)
    near = copy.deepcopy(turned)
    near.new = copy.deepcopy(near.old)
    choice = Auto()
    assert all(torch.equal(tensor, near.tau[name]) for name, tensor in carried(near, choice).items())
    assert isinstance(choice.chosen, Identity)
    assert choice.why == "the barrier between the bases is 0.000"


def test_bases_that_stay_far_from_each_other_are_told():
    torch.manual_seed(1)
    one, two = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
    choice = Auto()
    images = [torch.randn(200, 6, dtype=torch.float64)]
    choice.prepare(swap_of(one, two, one.state_dict(), images=images))
    assert choice.barriers["before"] > choice.barriers["after"] > 0.5
    assert choice.why.endswith("far from 0: expect little, and compare with fine-tuning on a few images")
    own, theirs = one.state_dict(), two.state_dict()
    assert choice.barriers["before"] == barrier(two, theirs, own, images)
    moved = choice.aligned.apply({name: own[name] for name in choice.aligned.spec.moved_names})
    assert choice.barriers["after"] == barrier(two, theirs, {**own, **moved}, images)


def test_other_widths_are_for_rotations():
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 3)).double() for n in (8, 12))
    swap = swap_of(one, two, one.state_dict(), images=[torch.randn(40, 6, dtype=torch.float64)])
    for transport in (Identity(), Permuted()):
        with pytest.raises(ValueError, match=r"'0.weight' of shape \(8, 6\) in the new base for \w+, got \(12, 6\)"):
            transport.prepare(swap)
    choice = Auto()
    choice.prepare(swap)
    assert isinstance(choice.chosen, Procrustes)
    moved = choice.transport({name: torch.ones_like(tensor) for name, tensor in one.state_dict().items()}, 0)
    assert {name: tensor.shape for name, tensor in moved.items()} == {k: v.shape for k, v in two.state_dict().items()}


def test_a_permuted_base_gets_exactly_the_permuted_expert():
    module, images = network("open_clip")
    hidden = random_reparametrization(spec_of(module), torch.Generator().manual_seed(1))
    new = copy.deepcopy(module)
    new.load_state_dict(hidden.apply(module.state_dict()))
    torch.manual_seed(0)
    tau = {name: 0.1 * torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    transport = Permuted()
    transport.prepare(swap_of(module, new, tau))
    moved = transport.transport(tau, 0)
    expected = hidden.apply({name: module.state_dict()[name] + tau[name] for name in tau})
    assert all(torch.equal(new.state_dict()[name] + moved[name], expected[name]) for name in tau)
    del images


def test_readers_of_the_features_follow():
    features, images = network("timm features")
    spec = spec_of(features, readers=[])
    hidden = random_reparametrization(spec, torch.Generator().manual_seed(1))
    new = copy.deepcopy(features)
    new.load_state_dict(hidden.apply(features.state_dict()))
    transport = Permuted()
    transport.prepare(swap_of(features, new, features.state_dict(), readers=[]))
    head = torch.randn(4, 192, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(features(images) @ head.T, new(images) @ transport.features(head).T, atol=1e-10)
    rotating = Procrustes()
    many = torch.randn(400, 3, 32, 32, dtype=torch.float64)
    rotating.prepare(swap_of(features, new, features.state_dict(), images=many.split(100)))
    with torch.no_grad():
        assert torch.allclose(features(images) @ head.T, new(images) @ rotating.features(head).T, atol=1e-6)
    assert torch.equal(Identity().features(head), head)


@pytest.mark.parametrize("vote", ["mean", "majority"])
def test_a_masked_vector_never_points_uphill(turned, vote):
    transport = GradientSignMask(vote=vote, before=Permuted())
    moved = carried(turned, transport)
    total = None
    for gradient in toy_swap(turned).gradients(0, 2):
        told = {k: v.sign() if vote == "majority" else v for k, v in gradient.items()}
        total = told if total is None else {k: total[k] + v for k, v in told.items()}
    inner = sum(float((total[name] * tensor).sum()) for name, tensor in moved.items())
    assert inner < 0
    downhill = {name: -tensor for name, tensor in total.items()}
    kept = GradientSignMask(vote=vote)
    kept.prepare(toy_swap(turned))
    assert all(torch.equal(tensor, downhill[name]) for name, tensor in kept.transport(downhill, 0).items())


def test_barriers():
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).double() for _ in range(2))
    images = torch.randn(60, 4, dtype=torch.float64)
    own, theirs = net.state_dict(), other.state_dict()
    assert barrier(net, own, own, [images]) == 0.0
    middle = copy.deepcopy(net)
    middle.load_state_dict({name: (own[name] + theirs[name]) / 2 for name in own})
    mean = (net(images) + other(images)) / 2
    expected = float((middle(images) - mean).detach().norm() / mean.detach().norm())
    assert barrier(net, own, theirs, images.split(7)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="expected images on which"):
        barrier(net, own, theirs, [])


def test_settings_are_checked_and_shown():
    for make, message in [
        (lambda: GradientSignMask(0), "images_per_class of 1 or more"),
        (lambda: Procrustes(0), "images of 1 or more"),
        (lambda: Auto(0), "images of 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    assert repr(Permuted(WeightMatching("none"))) == (
        "Permuted(aligner=WeightMatching(within_head='none', residual=True, max_sweeps=100, seed=0), images=256)"
    )
    assert {t.data for t in (Identity, GradientSignMask, Procrustes, Auto)} == {"none", "labelled images", "images"}
    assert issubclass(Auto, Transport)
