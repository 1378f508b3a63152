import numpy as np
import pytest
import torch
from support.references import Batch, Case, Vector, each

from clmerge.merging import EMR


def emr_unified(undecided: str) -> Batch:
    def rule(taus):
        total = taus.sum(axis=0)
        sign = np.where(total == 0, -1 if undecided == "negative" else 0, np.sign(total))
        return sign * np.where(taus * sign > 0, np.abs(taus), 0).max(axis=0)

    return each(rule)


def emr_view(vectors: list[Vector], position: int, rescale: str = "l1", undecided: str = "zero") -> Vector:
    unified = emr_unified(undecided)(vectors, [])
    own = vectors[position]
    masked = {name: np.where(own[name] * unified[name] > 0, unified[name], 0) for name in own}

    def size(vector):
        sizes = [(np.abs(entries).sum(), max(entries.size, 1)) for entries in vector.values()]
        return sum(total / (count if rescale == "tensor_mean" else 1) for total, count in sizes)

    return {name: entries * size(own) / (size(masked) or 1) for name, entries in masked.items()}


CASES = {
    "EMR": Case(EMR, emr_unified("zero")),
    "EMR negative": Case(
        lambda: EMR(0.5, rescale="tensor_mean", undecided="negative"),
        lambda vectors, tasks: {
            name: 0.5 * entries for name, entries in emr_unified("negative")(vectors, tasks).items()
        },
    ),
}


SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "one": (1,), "empty": (0, 3)}
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = [{name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()} for _ in range(5)]
TIED = [{name: tensor.round() for name, tensor in vector.items()} for vector in VECTORS]
LONG = [{"short": torch.randn(3, generator=GENERATOR), "w": torch.randn(300, 301, generator=GENERATOR)} for _ in "ab"]


def assert_views_are_those_of_the_batch(merger, vectors, tasks):
    arrays = [{name: tensor.double().numpy() for name, tensor in vector.items()} for vector in vectors]
    for position, task in enumerate(tasks):
        expected = emr_view(arrays, position, merger.rescale, merger.undecided)
        for name, tensor in merger.task_view(task).items():
            torch.testing.assert_close(tensor.double(), torch.as_tensor(expected[name]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vectors", [VECTORS, TIED, LONG], ids=["normal", "tied", "many blocks"])
@pytest.mark.parametrize("rescale", ["l1", "tensor_mean"])
@pytest.mark.parametrize("undecided", ["zero", "negative"])
def test_every_view_equals_the_batch_after_every_task(vectors, rescale, undecided):
    merger = EMR(rescale=rescale, undecided=undecided)
    for count, vector in enumerate(vectors, start=1):
        merger.update(vector)
        assert_views_are_those_of_the_batch(merger, vectors[:count], range(count))


def test_the_first_view_is_the_task_itself():
    merger = EMR()
    merger.update(VECTORS[0])
    for name, tensor in merger.task_view(0).items():
        torch.testing.assert_close(tensor, VECTORS[0][name])


def test_views_survive_saving_and_joining():
    left, right = EMR(), EMR()
    for task in (4, 2):
        left.update(VECTORS[task], task=task)
    for task in (0, 3):
        right.update(VECTORS[task], task=task)
    left.merge_state(right)
    resumed = EMR()
    resumed.load_state_dict(left.state_dict())
    assert_views_are_those_of_the_batch(resumed, [VECTORS[task] for task in (4, 2, 0, 3)], [4, 2, 0, 3])


def test_masks_follow_a_sign_that_turns():
    merger = EMR()
    merger.update({"w": torch.tensor([1.0, 2.0])})
    merger.update({"w": torch.tensor([-3.0, 2.0])})
    assert merger.task_view(0)["w"].tolist() == [0.0, 3.0]
    assert merger.task_view(1)["w"].tolist() == [-3.0, 2.0]


def test_a_task_without_any_agreement_gets_zeros():
    merger = EMR()
    merger.update({"w": torch.tensor([1.0])})
    merger.update({"w": torch.tensor([-3.0])})
    assert merger.task_view(0)["w"].tolist() == [0.0]


def test_unknown_tasks_and_settings_are_refused():
    merger = EMR()
    merger.update(VECTORS[0], task=7)
    with pytest.raises(ValueError, match=r"merged tasks \[7\], got 0"):
        merger.task_view(0)
    merger.reset()
    with pytest.raises(ValueError, match=r"merged tasks \[\]"):
        merger.task_view(7)
    with pytest.raises(ValueError, match="rescale"):
        EMR(rescale="l2")
    with pytest.raises(ValueError, match="undecided"):
        EMR(undecided="positive")


def test_two_bits_per_entry_and_task():
    assert EMR().state_size({"w": (1000,)}, 5) - EMR().state_size({"w": (1000,)}, 4) == 250


def test_pieces_of_vectors_leave_no_masks_behind():
    merger = EMR()
    merger.update_piece({"w": torch.tensor([1.0, -2.0])}, 0)
    assert merger.compute()["w"].tolist() == [1.0, -2.0]
    with pytest.raises(ValueError, match="one of the merged tasks"):
        merger.task_view(0)
