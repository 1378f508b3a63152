import math

import numpy as np
import pytest
import torch
from support.references import Batch, Case, each

from clmerge.merging import SLERP
from clmerge.merging.linear.slerp import slerp_weights


def slerp(t: float | None, scale: float) -> Batch:
    def rule(taus):
        merged = taus[0]
        for count, tau in enumerate(taus[1:], start=2):
            share = 1 / count if t is None else t
            norms = np.linalg.norm(merged) * np.linalg.norm(tau)
            cosine = (merged * tau).sum() / norms if norms else 1.0
            if abs(cosine) > 0.9995:
                merged = (1 - share) * merged + share * tau
            else:
                angle = np.arccos(cosine)
                merged = (np.sin((1 - share) * angle) * merged + np.sin(share * angle) * tau) / np.sin(angle)
        return scale * merged

    return each(rule)


CASES = {
    "SLERP": Case(SLERP, slerp(None, 1.0)),
    "SLERP t": Case(lambda: SLERP(0.3, scale=2.0), slerp(0.3, 2.0)),
}


def merged(merger, *values):
    for value in values:
        merger.update({"w": torch.tensor(value)})
    return merger.compute()["w"].tolist()


def test_a_third_of_a_right_angle():
    assert merged(SLERP(t=1 / 3), [1.0, 0.0], [0.0, 1.0]) == pytest.approx([math.sqrt(3) / 2, 0.5])


def test_norms_are_interpolated_not_kept():
    # The weights of the middle of a right angle are both sqrt(1/2).
    assert merged(SLERP(t=0.5), [2.0, 0.0], [0.0, 6.0]) == pytest.approx([math.sqrt(2), 3 * math.sqrt(2)])


def test_ends_are_the_ends():
    assert merged(SLERP(t=0.0), [1.0, 2.0], [3.0, -1.0]) == pytest.approx([1.0, 2.0])
    assert merged(SLERP(t=1.0), [1.0, 2.0], [3.0, -1.0]) == pytest.approx([3.0, -1.0])


def test_by_default_parallel_vectors_are_averaged():
    assert merged(SLERP(), [1.0, 1.0], [2.0, 2.0], [6.0, 6.0]) == pytest.approx([3.0, 3.0])


def test_three_orthogonal_vectors_by_default():
    # First the middle of the quarter circle, then a third of the way to the pole.
    near = math.cos(math.pi / 6) / math.sqrt(2)
    assert merged(SLERP(), [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]) == pytest.approx([near, near, 0.5])


@pytest.mark.parametrize("cosine", [1.0, 0.9996, -0.9996, -1.0])
def test_nearly_parallel_and_opposite_ends_are_interpolated_linearly(cosine):
    assert slerp_weights(cosine, 0.25) == (0.75, 0.25)


def test_zero_has_no_direction():
    assert merged(SLERP(t=0.25), [0.0, 0.0], [4.0, 8.0]) == pytest.approx([1.0, 2.0])


def test_t_is_a_share():
    with pytest.raises(ValueError, match=r"t in \[0, 1\], got 1.5"):
        SLERP(t=1.5)
