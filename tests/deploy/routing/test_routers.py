import pytest
import torch

from clmerge.deploy.routing.routers import (
    CentroidRouter,
    GaussianRouter,
    LayerRouter,
    LinearGate,
    MLPGate,
    MLPRouter,
    PreferenceGate,
    SubspaceRouter,
    cosines,
    posterior,
    router_of,
)


def test_subspaces_of_orthogonal_experts():
    """The closed form: experts read e1 and e4, x = (3, 0, 0, 1), so the logits are (3, 1)."""
    a = torch.zeros(2, 1, 4, dtype=torch.float64)
    a[0, 0, 0], a[1, 0, 3] = 0.5, 2.0  # the lengths of the rows, which belong to singular values, do not matter
    x = torch.tensor([[[3.0, 0.0, 0.0, 1.0], [0.0, 5.0, 0.0, -2.0]]], dtype=torch.float64)
    read = torch.einsum("bni,tri->bntr", x, a)
    both = SubspaceRouter(2, 1, top_k=2).double().fit(a)
    assert torch.allclose(both(x, read)[0, 0], torch.tensor([0.880797, 0.119203], dtype=torch.float64), atol=1e-6)
    one = SubspaceRouter(2, 1, top_k=1).double().fit(a)
    assert one(x, read).tolist() == [[[1.0, 0.0], [0.0, 1.0]]]  # per token, and what lies in the second alone


def test_a_direction_of_length_zero_reads_nothing():
    a = torch.zeros(2, 2, 3)
    a[0, 0, 0] = 1.0
    x = torch.ones(1, 1, 3)
    found = SubspaceRouter(2, 2, top_k=2).fit(a)(x, torch.einsum("bni,tri->bntr", x, a))
    assert torch.allclose(found[0, 0], torch.tensor([1.0, 0.0]).softmax(dim=0))


def test_the_nearest_direction_wins_whatever_the_lengths():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    found = cosines(torch.tensor([[5.0, 4.0], [0.1, 0.2], [-1.0, 0.0]]), centroids)
    assert found.argmax(dim=1).tolist() == [0, 1, 1]


def test_the_nearest_centroids():
    router = CentroidRouter(3, 2)
    router.centroids.copy_(torch.tensor([[0.96, 0.28], [0.936, 0.352], [-1.0, 0.0]]))
    found = router(torch.tensor([[2.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[0.916827, 0.083173, 0.0]]), atol=1e-4)
    equal = CentroidRouter(3, 2, 2, None)
    equal.centroids.copy_(router.centroids)
    assert equal(torch.tensor([[2.0, 0.0]])).tolist() == [[0.5, 0.5, 0.0]]


def test_the_posterior_of_gaussians():
    means, counts = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([75, 25])
    router = GaussianRouter(2, 2, 2).fit(means, counts, torch.tensor([0, 1]), torch.eye(2))
    assert torch.allclose(router(torch.tensor([[1.0, 0.0]])), torch.tensor([[0.75, 0.25]]))


def test_classes_of_a_task_add_up_and_the_covariance_counts():
    torch.manual_seed(0)
    means, counts = torch.randn(5, 3, dtype=torch.float64), torch.tensor([3, 1, 2, 5, 4])
    owner, root = torch.tensor([1, 0, 1, 2, 0]), torch.randn(3, 3, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    found = GaussianRouter(3, 5, 3).double().fit(means, counts, owner, covariance)(x)
    normal = [torch.distributions.MultivariateNormal(mean, covariance) for mean in means]
    joint = torch.stack([each.log_prob(x).exp() * n for each, n in zip(normal, counts, strict=True)], dim=1)
    by_task = torch.stack([joint[:, owner == task].sum(dim=1) for task in range(3)], dim=1)
    assert torch.allclose(found, by_task / by_task.sum(dim=1, keepdim=True), rtol=1e-9)


def test_the_posterior_of_likelihoods():
    assert torch.allclose(posterior(torch.tensor([[0.2, 0.05]]), torch.tensor([0.5, 0.5])), torch.tensor([[0.8, 0.2]]))
    assert posterior(torch.zeros(1, 2), torch.tensor([0.5, 0.5])).isfinite().all()


@pytest.mark.parametrize("gate", [LinearGate(3, 4), MLPGate(3, 4), PreferenceGate(3)])
def test_gates_of_layers_are_one_row_per_image(gate):
    x = torch.randn(2, 5, 4)
    found = gate(x, torch.zeros(2, 5, 3, 1))
    assert found.shape == (2, 3)
    alone = gate(x[1:], torch.zeros(1, 5, 3, 1))
    assert torch.allclose(found[1:], alone, atol=1e-6)


@pytest.mark.parametrize(
    "router",
    [CentroidRouter(2, 3), GaussianRouter(2, 4, 3), MLPRouter(2, 3, 8), SubspaceRouter(2, 3), LinearGate(2, 3)],
)
def test_a_router_is_built_again_from_what_it_says(router):
    again = router_of(router.spec(), "a file")
    assert type(again) is type(router)
    again.load_state_dict(router.state_dict())
    assert again.spec() == router.spec()


class Missing(LayerRouter):  # abstract: it has no forward
    pass


@pytest.mark.parametrize("spec", [{"class": "Missing", "settings": {}}, {"class": "os.system", "settings": {}}])
def test_other_classes_are_not_built(spec):
    with pytest.raises(ValueError, match=r"expected a router that is imported, for a\.file"):
        router_of(spec, "a.file")


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="expected the settings of CentroidRouter"):
        router_of({"class": "CentroidRouter", "settings": {"tasks": 2}}, "a.file")
