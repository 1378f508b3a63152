import csv
import io
from dataclasses import replace

from support.run_folders import MODELS, config_of, write_run

from clmerge.report import make_study, read_study, write_report
from clmerge.report.classes import MOST_LISTED, class_tables, classes_csv, confusion_figures
from clmerge.results.confusion import Confusion, summed
from clmerge.results.results import Results


def study_of(tmp_path, count=1, **options):
    documents = [
        write_run(tmp_path / f"run{seed}", config=config_of(seed=seed), answers=True, **options)
        for seed in range(count)
    ]
    return read_study([tmp_path / f"run{seed}" for seed in range(count)]), [Results.from_dict(d) for d in documents]


def test_the_best_merger_the_deployed_one_and_the_expert_have_a_matrix(tmp_path):
    study, (results,) = study_of(tmp_path)
    (figure,) = confusion_figures(study, "task_aware")
    best = study.ranking("task_aware")[0].name
    assert [grid.title for grid in figure.chart.grids] == list(dict.fromkeys([best, "magmax", "expert"]))
    matrix, images = results.confusion(best, "task_aware").matrix(), results.confusion(best, "task_aware").images
    assert figure.chart.grids[0].cells[1][0].mean == matrix[1, 0] / images[1]
    deployed, _ = study_of(tmp_path / "other", models=MODELS)
    deployed.runs[0].config["learner"]["deploy"] = "TIES"
    assert {"ties"} <= {table.entry.name for table in class_tables(deployed, "task_aware")}


def test_tables_name_the_worst_classes_and_the_most_confused_pairs(tmp_path):
    study, (results,) = study_of(tmp_path)
    table = next(table for table in class_tables(study, "task_agnostic") if table.entry.name == "expert")
    answers, names = results.confusion("expert", "task_agnostic"), results.class_names
    lowest = min(zip(answers.accuracies, names, strict=True))
    assert (table.worst[0].name, table.worst[0].share) == (lowest[1], f"{100 * lowest[0]:.1f}")
    true, taken, count = max((t for t in answers.wrong if t[1] is not None), key=lambda t: t[2])
    assert (table.pairs[0].images, len(table.pairs)) == (count, MOST_LISTED)
    assert (names[true], names[taken]) in {(row.name, row.taken_for) for row in table.pairs if row.images == count}
    rows = list(csv.DictReader(io.StringIO(classes_csv(study, "task_agnostic"))))
    assert len(rows) == len(names) * 3
    own = [float(row["accuracy"]) for row in rows if row["model"] == "expert"]
    assert own == answers.accuracies


def test_answers_of_repetitions_are_added(tmp_path):
    study, results = study_of(tmp_path, count=2)
    assert len(study.runs) == 2
    entry = study.mergers[0]
    assert entry.confusion("task_aware") == summed([one.confusion(entry.model, "task_aware") for one in results])


def test_answers_to_no_images_are_none(tmp_path):
    study, (results,) = study_of(tmp_path)
    empty = Confusion([0] * len(results.class_names), [0] * len(results.class_names), [])
    for model in results.models:
        results.set_confusion(model, dict.fromkeys(("task_agnostic", "task_aware"), empty))
    run = replace(study.runs[0], results=results)
    assert not list(confusion_figures(make_study([run]), "task_aware"))
    assert class_tables(make_study([run]), "task_aware") == []


def test_a_page_has_them_and_one_of_older_runs_does_without(tmp_path):
    study, _ = study_of(tmp_path, names="<b>task</b> {}")
    files = write_report(study, tmp_path / "report.html")
    text = files[-1].read_text(encoding="utf-8")
    assert {"classes.csv", "confusion.png", "confusion.csv"} <= {file.name for file in files}
    assert 'id="task_aware-classes"' in text
    assert 'id="task_agnostic-confusion"' in text
    write_run(tmp_path / "old")
    old = write_report(read_study([tmp_path / "old"]), tmp_path / "old.html")
    assert not {"classes.csv", "confusion.png"} & {file.name for file in old}
    assert "Which classes" not in old[-1].read_text(encoding="utf-8")
