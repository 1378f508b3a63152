"""Names that are markup, formulas, commands or steer a terminal, everywhere a report shows names."""

import csv
import io
import re
import tracemalloc

import pytest
from made_up import make_results
from support.run_folders import write_run

import clmerge.report
from clmerge.cli import main
from clmerge.figures import save_plots
from clmerge.report import paper_table, read_study, write_report
from clmerge.report.tables import escape_latex, escape_markdown
from clmerge.results.table import render_text

NAMES = (
    "$x^2$",
    "$\\frac{1}{$",
    "=cmd|'/c calc'!A0",
    "\x1b[31mred\x1b[0m",
    "\u202eevil",
    "",
    "x" * 3000,
    "_hidden",
    "../../x",
    "\\input{/etc/passwd}",
    "\u4e2d\u6587 \u05d0\u05d1",
    "\ud800",
)


def hostile_results(num_tasks=4):
    results = make_results(num_tasks, models=(*NAMES, "expert"))
    results.tasks = list(NAMES[:num_tasks])
    return results


def test_a_page_of_hostile_names_is_whole(tmp_path):
    names = iter(NAMES)
    write_run(tmp_path / "run", models=(*NAMES[:6], "expert"), num_tasks=3, bank=False)
    file = tmp_path / "run" / "results.json"
    text = re.sub(r'"task [123]"', lambda _: to_json(next(names)), file.read_text())
    file.write_text(text)
    files = write_report(read_study([tmp_path / "run"]), tmp_path / "out" / "page.html", title="\x1b[0m\0")
    page = files[-1].read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
    for table in (file for file in files if file.suffix == ".csv"):
        cells = [cell for row in csv.reader(io.StringIO(table.read_text(encoding="utf-8"))) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def to_json(text):
    import json

    return json.dumps(text)


def test_plots_of_hostile_names_are_drawn_in_their_folder(tmp_path):
    files = save_plots(hostile_results(), tmp_path / "plots")
    assert len(files) == len(NAMES) + 1 + 8
    assert all(file.resolve().is_relative_to((tmp_path / "plots").resolve()) for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def test_a_report_that_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run", bank=False)
    drawn = iter([b"png", b"png"])
    monkeypatch.setattr(clmerge.report, "to_png", lambda figure: next(drawn))
    with pytest.raises((StopIteration, RuntimeError)):
        write_report(read_study([tmp_path / "run"]), tmp_path / "out" / "page.html")
    assert not (tmp_path / "out").exists()


def test_plots_that_cannot_be_drawn_leave_nothing(tmp_path, monkeypatch):
    drawn = iter([b"png", b"png"])
    monkeypatch.setattr("clmerge.figures.to_png", lambda figure: next(drawn))
    with pytest.raises((StopIteration, RuntimeError)):
        save_plots(make_results(), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_tables_for_terminals_and_papers_hold_no_escapes(tmp_path, capsys):
    write_run(tmp_path / "run", models=("\x1b[31mred\x1b[0m", "a|b", "expert"), names="\x1b]0;owned\x07{}", bank=False)
    for form in ("md", "latex"):
        assert main(["report", str(tmp_path / "run"), "--format", form]) == 0
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
    assert "\x1b" not in render_text(hostile_results(), width=100)


def test_markdown_and_latex_are_text(tmp_path):
    assert escape_markdown("a|b *c* <d> $e$ `f` _g_") == r"a\|b \*c\* \<d\> \$e\$ \`f\` \_g\_"
    assert escape_latex("[1] *x* <a|b>") == r"{[}1] {*}x{*} \textless{}a\textbar{}b\textgreater{}"
    write_run(tmp_path / "run", models=("\\input{/etc/passwd}", "[2pt] x", "expert"), bank=False)
    table = paper_table(read_study([tmp_path / "run"]), "task_agnostic", "latex")
    assert "\\input" not in table
    assert not re.search(r"\\(\\|midrule|toprule)\s*\[", table)


def test_configurations_of_odd_keys_are_compared_in_little_memory(tmp_path):
    many = {f"k{index}": index for index in range(1000)}
    for name in ("a", "b"):
        config = {"x" * 100_000: many, 1: {2: 0}, "lists": [{1: 0, "a": {"seed": name}}]}
        write_run(tmp_path / name, config=config, models=("magmax", "expert"), bank=False)
    tracemalloc.start()
    try:
        study = read_study([tmp_path / "a", tmp_path / "b"])
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert [entry.name for entry in study.entries] == ["magmax", "expert", "zero_shot"]  # a seed is no difference
