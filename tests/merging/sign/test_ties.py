import pytest
import torch
from support.references import Case, ties

from clmerge.merging import TIES
from clmerge.merging.sign.ties import count_signs, sum_of_signs

WEIGHTS = [0.5, 2.0, 1.0, 0.0, 4.0, 1.0, 0.25, 3.0] * 4  # by task index

CASES = {
    "TIES": Case(TIES, ties(0.2, "model", "mean", 1.0)),
    "TIES weighted": Case(
        lambda: TIES(0.5, trim="tensor", weights=WEIGHTS),
        ties(0.5, "tensor", "mean", 1.0, WEIGHTS),
    ),
    "TIES weighted sum": Case(
        lambda: TIES(0.5, merge="sum", scale=0.5, weights=WEIGHTS),
        ties(0.5, "model", "sum", 0.5, WEIGHTS),
    ),
    **{
        f"TIES {trim} {merge} {density}": Case(
            lambda trim=trim, merge=merge, density=density: TIES(density, trim=trim, merge=merge, scale=0.5),
            ties(density, trim, merge, 0.5),
        )
        for trim in ("model", "tensor")
        for merge in ("mean", "sum", "max")
        for density in (0.3, 1.0)
    },
}


def merged(merger, *vectors):
    for vector in vectors:
        merger.update({name: torch.tensor(value) for name, value in vector.items()})
    return {name: tensor.tolist() for name, tensor in merger.compute().items()}


def test_mean_sum_and_max_of_the_agreeing_entries():
    vectors = [{"w": [1.0, -2.0]}, {"w": [3.0, 1.0]}, {"w": [-2.0, -4.0]}]
    assert merged(TIES(1.0, merge="mean"), *vectors) == {"w": [2.0, -3.0]}
    assert merged(TIES(1.0, merge="sum"), *vectors) == {"w": [4.0, -6.0]}
    assert merged(TIES(1.0, merge="max"), *vectors) == {"w": [3.0, -4.0]}


def test_model_trim_keeps_one_more_than_the_share_and_all_ties():
    vector = {"a": [10.0, 9.0, 8.0, 7.0], "b": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]}
    assert merged(TIES(0.2), vector) == {"a": [10.0, 9.0, 8.0, 0.0], "b": [0.0] * 6}
    ties = {"a": [3.0, -1.0, 1.0, 1.0, 1.0]}
    assert merged(TIES(0.2), ties) == ties


def test_tensor_trim_keeps_exactly_the_share_of_every_tensor():
    vector = {"a": [10.0, 9.0, 8.0, 7.0, 6.0], "b": [-1.0, 1.0, 0.5, 1.0, 1.0], "c": 0.25}
    assert merged(TIES(0.4, trim="tensor"), vector) == {
        "a": [10.0, 9.0, 0.0, 0.0, 0.0],
        "b": [-1.0, 1.0, 0.0, 0.0, 0.0],
        "c": 0.25,
    }


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([[5.0, 0.0], [0.0, 0.0]], 2.0),  # most entries of the model are positive
        ([[-5.0, 0.0], [0.0, 0.0]], -2.0),
    ],
)
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_a_sum_of_zero_takes_the_majority_sign_of_the_model(others, expected, merge):
    vectors = [{"zero": [2.0], "others": others[0]}, {"zero": [-2.0], "others": others[1]}]
    assert merged(TIES(1.0, merge=merge), *vectors)["zero"] == [expected]


@pytest.mark.parametrize(("merge", "expected"), [("mean", -2.0), ("sum", -2.0), ("max", 0.0)])
def test_without_a_majority_a_sum_of_zero_is_what_the_released_code_makes_of_it(merge, expected):
    # It keeps entries below zero for any sign that is not positive; max then multiplies by the sign, which is zero.
    vectors = [{"zero": [2.0], "others": [5.0, -9.0]}, {"zero": [-2.0], "others": [0.0, 0.0]}]
    assert merged(TIES(1.0, merge=merge), *vectors) == {"zero": [expected], "others": [5.0, -9.0]}


@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_a_sum_of_zero_is_positive_with_the_trim_by_tensor(merge):
    vectors = [{"zero": [2.0], "others": [-5.0, -9.0]}, {"zero": [-2.0], "others": [0.0, 0.0]}]
    assert merged(TIES(1.0, trim="tensor", merge=merge), *vectors)["zero"] == [2.0]


def test_election_happens_after_the_trim():
    vectors = [{"w": [1.0, 10.0]}, {"w": [1.0, 10.0]}, {"w": [-5.0, 1.0]}]
    assert merged(TIES(0.5, trim="tensor"), *vectors) == {"w": [-5.0, 10.0]}


def test_majority_counts_entries_not_magnitudes():
    assert sum_of_signs([torch.tensor([-9.0, 1.0, 1.0]), torch.tensor(0.0)]) == 1
    assert sum_of_signs([torch.tensor([-9.0, 1.0])]) == 0
    assert sum_of_signs([]) == 0


@pytest.mark.parametrize(("narrow", "bytes_after"), [(torch.int8, 12), (torch.int16, 16)])
def test_counts_are_widened_before_they_overflow(narrow, bytes_after):
    limit = torch.iinfo(narrow).max
    merger = TIES(1.0)
    merger.update({"w": torch.tensor([1.0, -1.0])})
    state = merger.state_dict()
    state["tasks"] = {str(task): "" for task in range(limit - 1)}
    for count in ("pos_count", "neg_count"):
        state["slots"]["w"][count] = state["slots"]["w"][count].to(narrow) * (limit - 1)
    for total in ("pos_sum", "neg_sum"):
        state["slots"]["w"][total] *= limit - 1
    merger.load_state_dict(state)
    half = TIES(1.0)
    half.load_state_dict(state | {"tasks": {str(task): "" for task in range(limit, 2 * limit - 1)}})
    assert merger.state_size({"w": (2,)}, merger.num_tasks) == 2 * (8 + 2 * narrow.itemsize)
    for task in range(3):
        merger.update({"w": torch.tensor([1.0, -1.0])}, task=3 * limit + task)
    assert merger.compute()["w"].tolist() == [1.0, -1.0]
    assert merger.state_size({"w": (2,)}, merger.num_tasks) == 2 * bytes_after
    half.merge_state(merger)
    assert half.compute()["w"].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("count", [torch.int8, torch.int16, torch.int32])
def test_signs_are_counted_on_every_device_alike(count):
    tau = torch.randint(-2, 3, (1000,), generator=torch.Generator().manual_seed(0)).float()
    tau[0] = -0.0
    positive, negative = torch.full((1000,), 5, dtype=count), torch.full((1000,), 7, dtype=count)
    count_signs(positive, negative, tau)
    assert torch.equal(positive, (5 + (tau > 0).int()).to(count))
    assert torch.equal(negative, (7 + (tau < 0).int()).to(count))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="share in"):
        TIES(20)
    with pytest.raises(ValueError, match="trim 'model' or 'tensor'"):
        TIES(trim="layer")
    with pytest.raises(ValueError, match="merge 'mean'"):
        TIES(merge="median")
