import pytest
import torch

from clmerge.merging.checks import check_base, check_finite, check_shapes, is_finite, read_shapes


def test_shapes_are_read_without_touching_the_values():
    assert read_shapes({"a": torch.empty(2, 3, device="meta"), "b": torch.tensor(0.0)}) == {
        "a": (2, 3),
        "b": (),
    }


def test_names_that_differ_are_counted_and_explained():
    known = {name: (1,) for name in ("head.weight", "head.bias", "tail.weight", "tail.bias", "x")}
    check_shapes(dict(reversed(known.items())), known, "a vector")
    with pytest.raises(ValueError, match=r"5 missing: .*; 1 unknown: 'head.wieght' \(nearest: 'head.weight'\)"):
        check_shapes({"head.wieght": (1,)}, known, "a vector")


def test_unknown_bases_are_accepted():
    check_base(None, "abc", "a vector")
    check_base("abc", None, "a vector")
    with pytest.raises(ValueError, match="cannot be merged"):
        check_base("abc", "abd", "a vector")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_entry_is_found(value, dtype):
    tensor = torch.zeros(1000, dtype=dtype)
    assert is_finite(tensor)
    tensor[567] = value
    assert not is_finite(tensor)
    with pytest.raises(ValueError, match="1 NaN or Inf among the 1000 entries of 'w'"):
        check_finite({"fine": torch.zeros(0), "w": tensor})


def test_large_values_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((10,), 6e4, dtype=torch.float16))
    assert is_finite(torch.tensor([3e38, 3e38, -3e38]))


def test_opposite_infinities_are_not_finite():
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
