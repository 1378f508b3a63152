import numpy as np
import pytest
import torch
from support.matrix_references import by_kind, svd
from support.references import Case, weights_of

from clmerge.merging import Ethos


def ethos(threshold, strength):
    def rule(taus):
        merged = np.zeros(taus.shape[1:])
        u, _, vh = svd(weights_of({"w": merged.shape})["w"])
        for tau in taus:
            coordinates = u.T @ tau @ vh.T
            coordinates[np.abs(coordinates) >= threshold * np.abs(coordinates).max()] = 0  # what is left is general
            merged -= strength * (tau - u @ coordinates @ vh)
        return merged

    return by_kind(rule, lambda taus: np.zeros(taus.shape[1:]))


CASES = {
    "Ethos": Case(Ethos, ethos(0.03, 1.0)),
    "Ethos strict": Case(lambda: Ethos(0.5, strength=0.5), ethos(0.5, 0.5)),
}


GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
U, _, VH = torch.linalg.svd(WEIGHTS, full_matrices=False)


def merged(merger, tau, weights=WEIGHTS):
    merger.update({"w": tau}, statistics={"weights": {"w": weights}})
    return merger.compute()["w"]


def test_small_coordinates_are_general_and_stay():
    coordinates = torch.full((5, 5), 0.1, dtype=torch.float64)
    coordinates[2, 1] = -10.0
    large = coordinates * (coordinates < 0)
    torch.testing.assert_close(merged(Ethos(), U @ coordinates @ VH), -(U @ large @ VH))
    torch.testing.assert_close(merged(Ethos(threshold=0.0), U @ coordinates @ VH), -(U @ coordinates @ VH))


def test_a_square_matrix_is_filtered_as_the_released_code_does():
    weights, tau = (torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    u, _, vh = torch.linalg.svd(weights)
    coordinates = u.T @ tau @ vh.T
    least = coordinates.abs().max() * 0.3
    kept = torch.where((coordinates < least) & (coordinates > -least), torch.zeros_like(coordinates), coordinates)
    torch.testing.assert_close(merged(Ethos(0.3), tau, weights), -(u @ kept @ vh))


def test_what_the_base_model_does_not_span_is_negated():
    tau = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
    outside = tau - tau @ VH.t() @ VH
    inside = U @ torch.eye(5, dtype=torch.float64) @ VH  # equal coordinates, none of them small
    torch.testing.assert_close(merged(Ethos(threshold=0.9), inside + outside), -(inside + outside))
    torch.testing.assert_close(merged(Ethos(strength=2.0), tau, torch.zeros_like(tau)), -2 * tau)


def test_what_is_no_matrix_is_left_alone():
    merger = Ethos()
    merger.update({"w": torch.ones(2, 2), "b": torch.ones(3)}, statistics={"weights": {"w": torch.eye(2)}})
    assert not merger.compute()["b"].any()


def test_a_fused_weight_can_be_split():
    name = "attn.qkv.weight"
    tau, weights = (torch.randn(12, 4, generator=GENERATOR) for _ in range(2))
    merger = Ethos(0.5, split_qkv=True)
    merger.update({name: tau}, statistics={"weights": {name: weights}})
    parts = [merged(Ethos(0.5), tau[cut], weights[cut]) for cut in (slice(0, 4), slice(4, 8), slice(8, 12))]
    torch.testing.assert_close(merger.compute()[name], torch.cat(parts))


@pytest.mark.parametrize(("weights", "got"), [({}, "none"), ({"w": torch.ones(8, 5)}, r"\(8, 5\)")])
def test_weights_of_another_model_are_refused_before_anything_changes(weights, got):
    merger = Ethos()
    with pytest.raises(ValueError, match=f"base model's 'w'.*got {got}"):
        merger.update({"w": torch.ones(5, 8)}, statistics={"weights": weights})
    assert merger.num_tasks == 0


def test_threshold_out_of_range_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        Ethos(1.5)
