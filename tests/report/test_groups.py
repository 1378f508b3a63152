from clmerge.report.groups import group_labels


def test_groups_are_named_after_what_differs():
    configs = [
        {"seed": 0, "name": "a", "stream": {"init_args": {"seed": 0}}, "learner": {"start_policy": "base"}, "x": 1},
        {"seed": 1, "name": "b", "stream": {"init_args": {"seed": 1}}, "learner": {"start_policy": "base"}, "x": 1},
        {"seed": 1, "name": "c", "stream": {"init_args": {"seed": 1}}, "learner": {"start_policy": "merged"}, "x": 1},
    ]
    assert group_labels(configs, ["a", "b", "c"]) == ["start_policy=base"] * 2 + ["start_policy=merged"]
    assert group_labels(configs[:2], ["a", "b"]) == ["", ""]


def test_groups_that_differ_in_much_have_the_names_of_their_runs():
    configs = [{"a": i, "b": i, "c": i} for i in range(2)]
    assert group_labels(configs, ["first", "second"]) == ["first", "second"]


def test_runs_without_a_configuration_are_no_repetitions():
    assert group_labels([{}, {}], ["x", "x"]) == ["x", "x'"]
