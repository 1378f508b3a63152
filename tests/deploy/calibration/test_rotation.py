import pytest
import torch
from support.calibrated_runs import learner, run

from clmerge.deploy.calibration import HeadRotation
from clmerge.deploy.calibration.rotation import rotation
from clmerge.merging import TaskArithmetic
from clmerge.models import CosineHead, LinearHead
from clmerge.streams import AdaptationData

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("no_pictures")


def turned(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def test_a_rotation_is_found_again_and_a_head_turned_by_it_answers_as_before():
    true = turned(16)
    features = torch.randn(40, 16, dtype=torch.float64)
    merged = features @ true.T  # merged R = features
    found = rotation(merged, features)
    torch.testing.assert_close(found, true, rtol=0, atol=1e-12)
    head = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(merged @ (head @ found.T).T, features @ head.T, rtol=0, atol=1e-12)


def test_directions_that_no_image_shows_do_not_turn():
    found, wanted = torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
    found[:, :2] = torch.randn(6, 2)
    wanted[:, :2] = found[:, :2] @ turned(2)
    turn = rotation(found, wanted, ridge=1e-6)
    torch.testing.assert_close(turn[2:, 2:], torch.eye(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(turn @ turn.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    strong = rotation(found, wanted, ridge=1e6)
    torch.testing.assert_close(strong, torch.eye(4).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [LinearHead, CosineHead])
def test_the_head_alone_is_turned_and_one_task_needs_no_turn(clip, tmp_path, head):
    data = AdaptationData("buffer", per_class=4)
    one = learner(clip, HeadRotation(adaptation=data), head=head(), mergers=[TaskArithmetic(1.0)])
    results = run(one, tmp_path / "run")
    merged = one.merged()
    (state,) = one.calibrated.models(merged, 1, CPU).values()
    changed = {name for name, tensor in state.items() if name not in merged["task_arithmetic"]}
    assert changed == {"head.blocks.0", "head.blocks.1"}
    for name, rows in one.module.head.named_parameters():
        after = state[f"head.{name}"]
        torch.testing.assert_close(after[:, :8].norm(dim=1), rows[:, :8].norm(dim=1))
        assert torch.equal(after[:, 8:], rows[:, 8:])
        assert not torch.allclose(after, rows, atol=1e-4)
    first = [results.matrix(name)[0, 0] for name in ("task_arithmetic", "task_arithmetic+rotated")]
    assert first[0] == first[1]
    assert results.bytes == {"calibration.rotated": 40 * (4 * 8 + 8) + 40 * 3 * 8 * 8}


def test_what_cannot_be_turned_is_refused(clip):
    with pytest.raises(ValueError, match="expected a LinearHead or a CosineHead for HeadRotation, got ZeroShotHead"):
        learner(clip, HeadRotation())
    with pytest.raises(ValueError, match="expected ridge of 0 or more"):
        HeadRotation(ridge=-1.0)
