import pytest

from clmerge.merging import DARE, OPCM, TALL, TIES, LayerScale, MagMax, Pipeline
from clmerge.search.grid import grids, parse_values, points, value_at, with_values


def test_ranges_hold_both_ends_without_rounding_errors():
    assert parse_values("0.1:1.5:0.1") == [round(0.1 * i, 1) for i in range(1, 16)]
    assert parse_values("1:3:1") == [1, 2, 3]
    assert parse_values("0.5:0.5:1.0") == [0.5]
    assert parse_values("0.2,1,true,null,sum") == [0.2, 1, True, None, "sum"]


@pytest.mark.parametrize("text", ["1:2", "2:1:0.5", "1:2:0", "1:2:-1", "a:b:c", "1:2:3:4"])
def test_malformed_ranges_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_values(text)


def test_scale_goes_to_mergers_that_have_one_and_names_may_be_classes():
    mergers = {"ties_density0.1": TIES(density=0.1), "ties": TIES(), "dop": OPCM()}
    found = grids(mergers, "1,2", ["TIES.density=0.1,0.2", "ties.scale=3"])
    assert found["ties"] == {"scale": [3], "density": [0.1, 0.2]}
    assert found["ties_density0.1"] == {"scale": [1, 2], "density": [0.1, 0.2]}


def test_a_merger_of_which_nothing_is_tried_is_left_out():
    assert grids({"magmax": MagMax(), "ties": TIES()}, None, ["TIES.density=0.1"]) == {"ties": {"density": [0.1]}}


@pytest.mark.parametrize("assignment", ["TIES.density", "TIES=1", "density=1", "TIES.density=", "TIES.densty=1"])
def test_malformed_assignments_are_refused(assignment):
    with pytest.raises(ValueError, match="expected"):
        grids({"ties": TIES()}, None, [assignment])


def test_other_settings_stay():
    merger = DARE(drop_rate=0.5, seed=7)
    changed = with_values(merger, {"drop_rate": 0.1})
    assert changed.settings() == {**merger.settings(), "drop_rate": 0.1}
    assert changed is not merger
    assert len(points({"a": [1, 2, 3], "b": [1, 2]})) == 6


def test_a_value_may_be_a_list():
    assert parse_values("[1,0.5],[2,3],null") == [[1, 0.5], [2, 3], None]
    assert parse_values("[[1,2],[3]]") == [[[1, 2], [3]]]
    assert parse_values("[*.w,*.b]") == [["*.w", "*.b"]]
    assert parse_values("[1:2]") == [["1:2"]]
    assert grids({"tall": TALL()}, None, ["TALL.threshold=0.2,[0.1,0.3]"])["tall"]["threshold"] == [0.2, [0.1, 0.3]]
    found = grids({"ties": TIES()}, None, ["TIES.weights=[1,2],[2,1]"])
    assert [merger.weights for merger in (with_values(TIES(), p) for p in points(found["ties"]))] == [[1, 2], [2, 1]]


@pytest.mark.parametrize("text", ["[1,2", "1]", "[1,2],[3"])
def test_brackets_that_are_not_closed_are_refused(text):
    with pytest.raises(ValueError, match="lists in brackets"):
        parse_values(text)


@pytest.mark.parametrize("text", ["scale=abc", "density=0.1,many", "density=true"])
def test_a_word_for_a_number_is_refused(text):
    with pytest.raises(ValueError, match=r"expected numbers as (scale|density) of TIES, got"):
        grids({"ties": TIES()}, None, [f"ties.{text}"])
    with pytest.raises(ValueError, match="expected numbers as scale of TIES, got 'x'"):
        grids({"ties": TIES()}, "0.1,x", [])


def test_a_parameter_may_be_that_of_a_part_or_an_entry_of_a_list():
    merger = Pipeline(TIES(), finisher=LayerScale([1.0, 1.0]))
    mergers = {"pipeline": merger}
    found = grids(mergers, None, ["Pipeline.finisher.coefficients[*]=0:1:0.5", "Pipeline.reducer.density=0.1,0.3"])
    assert list(found["pipeline"]) == ["finisher.coefficients[0]", "finisher.coefficients[1]", "reducer.density"]
    changed = with_values(merger, {"finisher.coefficients[1]": 0.5, "reducer.density": 0.3})
    assert (changed.finisher.coefficients, changed.reducer.density) == ([1.0, 0.5], 0.3)
    assert (merger.finisher.coefficients, merger.reducer.density) == ([1.0, 1.0], 0.2)
    assert value_at(merger, "finisher.coefficients[1]") == 1.0


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("finisher.coeficients[0]", "expected a parameter of LayerScale .*'coefficients'"),
        ("finisher.coefficients[5]", "expected a list that long as finisher.coefficients"),
        ("reducer.weights[*]", "expected a list as reducer.weights"),
        ("finisher..default", "expected a parameter such as"),
        ("reducer.density.more", "expected a rule or a part at 'reducer.density'"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, told):
    with pytest.raises(ValueError, match=told):
        grids({"p": Pipeline(TIES(), finisher=LayerScale([1.0, 1.0]))}, None, [f"p.{path}=0,1"])


def test_a_word_for_the_number_of_a_part_is_refused():
    with pytest.raises(ValueError, match=r"expected numbers as finisher.coefficients\[0\] of Pipeline, got 'many'"):
        grids({"p": Pipeline(finisher=LayerScale([1.0]))}, None, ["p.finisher.coefficients[0]=many"])
