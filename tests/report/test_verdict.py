import json
import math

import pytest
from support.run_folders import config_of, write_run

from clmerge.report import evidence, read_study
from clmerge.report.evidence import Lead
from clmerge.report.verdict import judge, sampling_error


def test_the_best_merger_is_the_one_with_the_highest_average(tmp_path):
    document = write_run(tmp_path / "run")
    study = read_study([tmp_path / "run"])
    verdict = judge(study, "task_agnostic")
    averages = {m: document["models"][m]["task_agnostic"]["average_accuracy"][-1] for m in ("magmax", "ties")}
    assert averages["magmax"] > averages["ties"]
    assert verdict.best.name == "magmax"
    lead = 100 * (averages["magmax"] - averages["ties"])
    assert f"That is {lead:.1f} points more than the runner-up, ties" in verdict.reasons[1]
    assert [tile.title for tile in verdict.tiles] == [
        "Average accuracy",
        "Forgetting",
        "Gap to the experts",
        "Kept between tasks",
    ]
    assert verdict.tiles[0].value == f"{100 * averages['magmax']:.1f}"
    assert verdict.tiles[3].note == "whatever the number of tasks"


def test_the_sampling_error_is_that_of_independent_binomials(tmp_path):
    document = write_run(tmp_path / "run")
    magmax, ties = read_study([tmp_path / "run"]).mergers
    rows = [document["models"][m]["task_agnostic"]["R"][-1] for m in ("magmax", "ties")]
    variance = sum(p * (1 - p) / n for row in rows for p, n in zip(row, [100, 101, 102], strict=True)) / 9
    assert sampling_error(magmax, ties, [100, 101, 102], "task_agnostic") == pytest.approx(math.sqrt(variance))


def test_a_reference_that_is_better_is_named(tmp_path):
    document = write_run(tmp_path / "run")
    document["baseline"]["task_agnostic"] = [1.0, 1.0, 1.0]
    (tmp_path / "run" / "results.json").write_text(json.dumps({"schema": 2, "runs": [document]}))
    study = read_study([tmp_path / "run"])
    reasons = " ".join(judge(study, "task_agnostic").reasons)
    expert = document["models"]["expert"]["task_agnostic"]["average_accuracy"][-1]
    assert f"fine-tuning one task after another ends at {100 * expert:.1f} %" in reasons
    assert "the zero-shot model at 100.0 %. So no merger does better than the zero-shot model." in reasons
    assert "no merger does better" not in " ".join(judge(study, "task_aware").reasons)


def test_a_small_lead_is_called_one(tmp_path):
    write_run(tmp_path / "run")
    caution = " ".join(judge(read_study([tmp_path / "run"]), "task_agnostic").caution)
    assert "With 303 test images" in caution
    assert "ties may be as good" in caution
    assert "choose by validation images" in caution


def test_several_seeds_say_how_often_the_best_wins(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"s{seed}", config=config_of(seed=seed), shift=0.02 * seed)
    verdict = judge(read_study([tmp_path / f"s{seed}" for seed in (0, 1, 2)]), "task_agnostic")
    assert "Mean of 3 runs (seeds 0, 1, 2)" in verdict.caution[0]
    assert "magmax beats ties in 3 of 3" in verdict.caution[0]
    assert verdict.tiles[0].deviation


def test_without_a_merger_there_is_no_verdict(tmp_path):
    write_run(tmp_path / "run", models=("expert",))
    verdict = judge(read_study([tmp_path / "run"]), "task_agnostic")
    assert verdict.best is None
    assert "nothing to compare" in verdict.caution[0]


def test_rules_that_were_ahead_elsewhere_are_named_unless_they_were_compared(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    study = read_study([tmp_path / "run"])  # magmax is best, ties is compared
    known = (Lead("TIES", "MagMax", 0.05), Lead("TSVM", "MagMax", 0.02), Lead("ACTMat", "MagMax", 0.031))
    known += (Lead("DARE", "TSVM", 0.2),)
    monkeypatch.setattr(evidence, "known", lambda: {"streams": ["digits", "letters"]})
    monkeypatch.setattr(evidence, "leads", lambda setting: known if setting == "task_aware" else ())
    assert "ahead of MagMax" not in " ".join(judge(study, "task_agnostic").caution)
    told = [line for line in judge(study, "task_aware").caution if line.startswith("Not compared here")]
    assert told == [
        "Not compared here, but ahead of MagMax where docs/which_merger.md measured them (digits; letters): "
        "ACTMat (by 3.1 points), TSVM (by 2.0 points)."
    ]


def test_the_leads_are_those_that_the_docs_are_made_of():
    found = evidence.leads("task_aware")
    assert any((one.ahead, one.of) == ("TALL", "TSVM") for one in found)
    assert all(one.mean > 0 and one.ahead != one.of for one in found)
