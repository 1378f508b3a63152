import numpy as np
import pytest
import torch
from support.references import PREFERENCES, Batch, Case, Vector, stacked, total

from clmerge.merging import TALL, Consensus
from clmerge.merging.sign.tall import tall_mask


def tall_masks(vectors: list[Vector], thresholds: list[float]) -> list[dict[str, np.ndarray]]:
    sums = {name: stacked(vectors, name).sum(axis=0) for name in vectors[0]}
    return [
        {name: np.abs(vector[name]) >= threshold * np.abs(sums[name] - vector[name]) for name in vector}
        for vector, threshold in zip(vectors, thresholds, strict=True)
    ]


def consensus(k: int, threshold: float | list[float], scale: float) -> Batch:
    def batch(vectors, tasks):
        thresholds = [threshold[task] if isinstance(threshold, list) else threshold for task in tasks]
        masks = tall_masks(vectors, thresholds)
        return {
            name: scale
            * stacked(vectors, name).sum(axis=0)
            * (sum(mask[name].astype(int) for mask in masks) >= min(k, len(vectors)))
            for name in vectors[0]
        }

    return batch


CASES = {
    "TALL": Case(TALL, total(0.3)),
    "TALL scale": Case(lambda: TALL(PREFERENCES, scale=-1.0), total(-1.0)),
    "Consensus": Case(Consensus, consensus(2, 0.4, 0.3)),
    "Consensus of three": Case(lambda: Consensus(3, threshold=PREFERENCES, scale=1.0), consensus(3, PREFERENCES, 1.0)),
}


SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "one": (1,), "empty": (0, 3)}
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = [{name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()} for _ in range(5)]
TIED = [{name: tensor.round() for name, tensor in vector.items()} for vector in VECTORS]


def assert_views_are_those_of_the_batch(merger, vectors, tasks, thresholds):
    arrays = [{name: tensor.double().numpy() for name, tensor in vector.items()} for vector in vectors]
    masks = tall_masks(arrays, thresholds)
    for position, task in enumerate(tasks):
        for name, tensor in merger.task_view(task).items():
            expected = torch.as_tensor(sum(array[name] for array in arrays) * masks[position][name])
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vectors", [VECTORS, TIED], ids=["normal", "tied"])
@pytest.mark.parametrize("threshold", [0.4, 0.0, [0.2, 0.3, 0.4, 0.5, 0.6]])
def test_every_view_equals_the_batch_after_every_task(vectors, threshold):
    merger = TALL(threshold)
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 5
    for count, vector in enumerate(vectors, start=1):
        merger.update(vector)
        assert_views_are_those_of_the_batch(merger, vectors[:count], range(count), thresholds[:count])


def test_views_survive_saving_and_joining():
    left, right = TALL(), TALL()
    for task in (4, 2):
        left.update(VECTORS[task], task=task)
    for task in (0, 3):
        right.update(VECTORS[task], task=task)
    left.merge_state(right)
    resumed = TALL()
    resumed.load_state_dict(left.state_dict())
    order = [4, 2, 0, 3]
    assert_views_are_those_of_the_batch(resumed, [VECTORS[task] for task in order], order, [0.4] * 4)


def test_an_entry_of_one_task_alone_is_its_own():
    tau, total = torch.tensor([2.0, 0.0]).double(), torch.tensor([2.0, 3.0]).double()
    assert tall_mask(tau, total, 0.4).tolist() == [True, False]


def test_consensus_leaves_out_selfish_and_catastrophic_entries():
    merger = Consensus(2, scale=1.0)
    for entries in ([1.0, 5.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.9]):
        merger.update({"w": torch.tensor(entries)})
    assert merger.compute()["w"].tolist() == [3.0, 0.0, pytest.approx(0.1)]


def test_consensus_of_fewer_tasks_than_asked_for_wants_all_of_them():
    merger = Consensus(3, scale=1.0)
    merger.update({"w": torch.tensor([1.0, 5.0])})
    assert merger.compute()["w"].tolist() == [1.0, 5.0]
    merger.update({"w": torch.tensor([1.0, 0.0])})
    assert merger.compute()["w"].tolist() == [2.0, 0.0]


def test_state_grows_by_one_vector_per_task():
    assert [TALL().state_size({"w": (10,)}, tasks) for tasks in (1, 2, 5)] == [40, 80, 200]
    assert not TALL.exact_online


def test_arguments_are_checked():
    merger = Consensus(threshold=[0.4])
    with pytest.raises(ValueError, match="threshold for task 1"):
        merger.update(VECTORS[0], task=1)
    assert merger.num_tasks == 0
    with pytest.raises(ValueError, match="thresholds of 0 or more"):
        TALL(-0.1)
    with pytest.raises(ValueError, match="k of 1 or more"):
        Consensus(0)
    with pytest.raises(ValueError, match=r"merged tasks \[\], got 0"):
        TALL().task_view(0)
