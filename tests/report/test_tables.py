import json

import pytest
from support.run_folders import config_of, write_run

from clmerge.report import paper_table, read_study
from clmerge.report.tables import escape_latex, table_csv


@pytest.fixture
def study(tmp_path):
    write_run(tmp_path / "a", models=("magmax", "ties_density0.1", "expert"))
    return read_study([tmp_path / "a"])


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_shows_every_number_and_marks_the_best_merger(study):
    lines = paper_table(study, "task_agnostic", "md").splitlines()
    assert cells(lines[0]) == ["model", "task 1", "task 2", "task 3", "Average", "Forgetting", "BWT"]
    magmax = study.mergers[0]
    average = 100 * magmax.figure("average_accuracy", "task_agnostic").mean
    assert cells(lines[2])[0] == "magmax"
    assert cells(lines[2])[4] == f"**{average:.1f}**"
    assert "**" not in lines[4]  # the expert is no merger
    assert lines[-1] == "Accuracy in % after task 3 of 3, task-agnostic, one run. Bold: best merger."
    assert len({len(line) for line in lines[:6]}) == 1


def test_latex_is_a_whole_table_of_the_same_numbers(study):
    text = paper_table(study, "task_aware", "latex")
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"ties\_density0.1 & " in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.count("&") for row in rows} == {6}
    markdown = paper_table(study, "task_aware", "md").splitlines()
    plain = [cell.replace("**", "") for cell in cells(markdown[2])]
    latex = rows[1].removesuffix(r" \\").replace(r"\textbf{", "").replace("}", "").replace("$-$", "-").split(" & ")
    assert latex == plain


def test_several_runs_have_deviations_and_long_names_a_key(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", config=config_of(seed=seed), shift=0.1 * seed, names="long task {}")
    study = read_study([tmp_path / "s0", tmp_path / "s1"])
    text = paper_table(study, "task_agnostic", "md")
    assert " ± " in text.splitlines()[2]
    assert text.endswith(
        "mean ± standard deviation of 2 runs. Bold: best merger. T1 long task 1, T2 long task 2, T3 long task 3.\n"
    )
    assert r"{\small$\pm$ " in paper_table(study, "task_agnostic", "latex")


def test_latex_cannot_be_broken_by_a_name():
    assert escape_latex(r"a\b{c}~^$#&%") == r"a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}\$\#\&\%"


def test_what_models_looked_at_is_a_column_of_every_table(tmp_path):
    write_run(tmp_path / "a", models=("magmax", "adamerging", "expert"))
    document = json.loads((tmp_path / "a" / "results.json").read_text())
    document["runs"][0]["models"]["adamerging"]["data"] = "val(unlabelled)"
    (tmp_path / "a" / "results.json").write_text(json.dumps(document))
    study = read_study([tmp_path / "a"])
    lines = paper_table(study, "task_agnostic", "md").splitlines()
    assert cells(lines[0])[-1] == "data"
    told = {cells(line)[0]: cells(line)[-1] for line in lines[2:5]}
    assert told == {"magmax": "none", "adamerging": "val(unlabelled)", "expert": "-"}
    assert "val(unlabelled) \\\\" in paper_table(study, "task_agnostic", "latex")
    csv = {line.split(",")[0]: line.split(",")[-1] for line in table_csv(study, "task_agnostic").splitlines()}
    assert csv == {"model": "data", "magmax": "none", "adamerging": "val(unlabelled)", "expert": "", "zero_shot": ""}
