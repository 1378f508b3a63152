import math

import pytest
import torch

from clmerge.weights import secrets
from clmerge.weights.secrets import Secret, marked_names, marked_part, marked_vector


def dense(secret, numel):
    """The whole projection, read out with unit vectors."""
    return torch.stack([secret.read(unit) for unit in torch.eye(numel, dtype=torch.float64)], dim=1)


def test_the_projection_is_linear_normal_and_of_the_key_alone():
    secret = Secret("mine", 32)
    matrix = dense(secret, 200)
    vector = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(secret.read(vector), matrix @ vector)
    assert torch.equal(matrix, dense(Secret("mine", 32), 200))
    assert not torch.equal(matrix, dense(Secret("other", 32), 200))
    assert abs(float(matrix.mean())) < 4 / math.sqrt(matrix.numel())
    assert abs(float(matrix.std()) - 1) < 4 / math.sqrt(2 * matrix.numel())


def test_the_gradient_is_the_transposed_projection(monkeypatch):
    matrix = dense(Secret("mine", 8), 50)
    for kept in (1 << 26, 0):  # held in memory, and drawn again
        monkeypatch.setattr(secrets, "_KEPT", kept)
        monkeypatch.setattr(secrets, "_WIDTH", 1 << 14)
        vector = torch.zeros(50, dtype=torch.float64, requires_grad=True)
        weights = torch.arange(8, dtype=torch.float64)
        (Secret("mine", 8).read(vector) * weights).sum().backward()
        torch.testing.assert_close(vector.grad, weights @ matrix)


def test_blocks_join_to_one_projection(monkeypatch):
    monkeypatch.setattr(secrets, "_WIDTH", 16)
    secret, vector = Secret("mine", 4), torch.randn(40, dtype=torch.float64)
    places = [(place.start, place.stop) for place, _ in secret.blocks(vector)]
    assert places == [(0, 16), (16, 32), (32, 40)]
    columns = torch.cat([columns for _, columns in secret.blocks(vector)], dim=1)
    torch.testing.assert_close(secret.read(vector), columns @ vector)


def test_right_bits_of_a_vector_that_spells_the_message():
    secret = Secret("mine", 16)
    matrix = dense(secret, 400)
    signs = 2.0 * secret.message - 1
    vector = torch.linalg.lstsq(matrix, signs.double().unsqueeze(1)).solution[:, 0]
    assert secret.right(vector) == 16
    assert secret.right(-vector) == 0
    assert {int(bit) for bit in secret.message} == {0, 1}


def test_marked_parts():
    base = {"a.w": torch.tensor([1.27, 0.0]), "b.w": torch.tensor([2.54])}
    weights = {"a.w": torch.tensor([1.28, 0.0125]), "b.w": torch.tensor([2.0])}
    assert marked_names(weights, "*.w") == ["a.w", "b.w"]
    assert torch.equal(marked_vector(weights, {}, "*.w", "weights"), torch.tensor([1.28, 0.0125, 2.0]))
    torch.testing.assert_close(marked_vector(weights, base, "*.w", "task_vector"), torch.tensor([0.01, 0.0125, -0.54]))
    # Steps of 0.01 and 0.02: 128 whole steps; 1.25 steps, a quarter beyond a whole one; 100 whole steps.
    found = marked_vector(weights, base, "*.w", "rounding")
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_weights_rounded_to_int8_carry_nothing():
    base = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    step = base["w"].abs().max() / 127
    assert marked_vector({"w": (base["w"] / step).round() * step}, base, "w", "rounding").abs().max() < 1e-9


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="expected 1 bit or more"):
        Secret("mine", 0)
    with pytest.raises(
        ValueError, match=r"expected a pattern of a trained weight's name .* got 'x\*', .* matches none of a"
    ):
        marked_names({"a": torch.zeros(1)}, "x*")
    with pytest.raises(ValueError, match="expected of= one of task_vector, weights, rounding, got 'bias'"):
        marked_part("bias")
