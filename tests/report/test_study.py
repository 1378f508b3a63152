import math
import statistics

import pytest
from support.run_folders import config_of, write_run

from clmerge.merging import TIES
from clmerge.report import read_study
from clmerge.report.study import Spread


def test_a_spread_of_one_run_is_its_number_to_the_last_digit():
    assert Spread((0.1 + 0.2,)).mean == 0.1 + 0.2
    assert math.isnan(Spread((0.5,)).std)
    several = Spread((0.5, 0.25, 0.375))
    assert several.mean == pytest.approx(statistics.fmean(several.values))
    assert several.std == pytest.approx(statistics.stdev(several.values))
    assert not Spread((0.5, math.nan)).is_defined  # nothing is skipped


def test_runs_that_differ_in_seed_and_mergers_are_repetitions(tmp_path):
    first = write_run(tmp_path / "a")
    second = write_run(
        tmp_path / "b", config=config_of(seed=1, name="other", mergers=[]), shift=0.1, models=("magmax", "expert")
    )
    study = read_study([tmp_path / "a", tmp_path / "b"])
    assert [entry.name for entry in study.entries] == ["magmax", "ties", "expert", "zero_shot"]
    magmax, ties = study.mergers
    assert (len(magmax.runs), len(ties.runs)) == (2, 1)
    own = [d["models"]["magmax"]["task_aware"]["forgetting"] for d in (first, second)]
    assert magmax.figure("forgetting", "task_aware").values == tuple(own)
    assert study.notes == ()


def test_other_settings_make_other_groups_that_are_named_by_them(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", config=config_of(learner={"start_policy": "base"}), models=("magmax", "expert"))
    study = read_study([tmp_path / "a", tmp_path / "b"])
    names = ["magmax (start_policy=previous)", "ties (start_policy=previous)", "magmax (start_policy=base)"]
    assert [entry.name for entry in study.mergers] == names
    assert study.reference(study.mergers[2], "expert").runs == study.mergers[2].runs


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a")
    assert len(read_study([tmp_path / "a", tmp_path / "a"]).runs) == 1


def test_runs_are_compared_after_the_same_task_and_say_so(tmp_path):
    whole = write_run(tmp_path / "a")
    write_run(tmp_path / "b", finished=2, config=config_of(seed=1))
    study = read_study([tmp_path / "a", tmp_path / "b"])
    assert study.num_finished == 2
    assert "b is not finished: 2 of 3 tasks" in study.notes[0]
    assert "after task 2" in study.notes[1]
    curve = whole["models"]["magmax"]["task_agnostic"]["average_accuracy"]
    assert study.mergers[0].figure("average_accuracy", "task_agnostic").values[0] == curve[1]


def test_streams_of_other_lengths_are_refused_and_other_names_are_numbered(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", num_tasks=2)
    write_run(tmp_path / "c", names="other {}")
    with pytest.raises(ValueError, match="different numbers of tasks"):
        read_study([tmp_path / "a", tmp_path / "b"])
    study = read_study([tmp_path / "a", tmp_path / "c"])
    assert study.tasks == ("task 1", "task 2", "task 3")
    assert "different tasks" in study.notes[0]
    with pytest.raises(ValueError, match="at least one run"):
        read_study([])


def test_figures_follow_from_the_matrices(tmp_path):
    document = write_run(tmp_path / "a")
    study = read_study([tmp_path / "a"])
    magmax, ties = study.mergers
    experts, merged = (document["models"][name]["task_aware"]["R"] for name in ("expert", "magmax"))
    gap = statistics.fmean(experts[t][t] - merged[2][t] for t in range(3))
    assert magmax.figure("gap_to_experts", "task_aware").mean == pytest.approx(gap, abs=1e-15)
    assert magmax.figure("worst_task", "task_aware").mean == min(merged[2])
    assert [spread.mean for spread in ties.bytes_kept()] == [
        TIES(density=0.1).state_size({"w": (23,)}, t + 1) for t in range(3)
    ]
    assert study.ranking("task_aware") == [magmax, ties]


def test_sizes_are_unknown_without_kept_task_vectors(tmp_path):
    write_run(tmp_path / "a", bank=False)
    assert read_study([tmp_path / "a"]).mergers[0].bytes_kept() == []
