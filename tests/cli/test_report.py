import pytest
from support.run_folders import write_run

from clmerge.cli import main


def test_a_page_and_its_figures_are_written_and_replaced(tmp_path, capsys):
    write_run(tmp_path / "run", finished=1, models=("magmax",), bank=False)
    out = tmp_path / "out" / "page.html"
    out.parent.mkdir()
    out.write_text("an older report")
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--title", "two"]) == 0
    assert "<title>two</title>" in out.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.html", "page_figures"]
    assert f"page      {out}" in capsys.readouterr().out


def test_a_comparison_in_the_run_is_pointed_at(tmp_path, capsys):
    write_run(tmp_path / "run")
    write_run(tmp_path / "run" / "compare")
    assert main(["report", str(tmp_path / "run"), "--format", "md"]) == 0
    assert "run/compare holds a comparison" in capsys.readouterr().err


def test_tables_go_to_the_terminal_or_to_a_file(tmp_path, capsys):
    write_run(tmp_path / "run", finished=2)
    assert main(["report", str(tmp_path / "run"), "--format", "md"]) == 0
    printed = capsys.readouterr()
    assert "task-agnostic" in printed.out
    assert "task-aware" in printed.out
    assert "run is not finished: 2 of 3 tasks" in printed.err
    assert main(["report", str(tmp_path / "run"), "--format", "latex", "--out", str(tmp_path / "t.tex")]) == 0
    assert (tmp_path / "t.tex").read_text().count(r"\begin{table}") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}"], 2, "expected --out with the name of a page"),
        (["{}", "--out", "results.json"], 2, "expected --out with the name of a page"),
        (["{}", "--format", "md", "--title", "x"], 2, "expected --title with a page"),
        (["{}", "--fromat", "md"], 2, "--format"),
        (["{}/nothing", "--out", "r.html"], 1, "which does not exist"),
        ([], 2, "expected RUN after clmerge report, got none"),
    ],
)
def test_wrong_calls_say_what_is_wrong(tmp_path, capsys, arguments, code, message):
    write_run(tmp_path / "run")
    arguments = [argument.format(tmp_path / "run") for argument in arguments]
    try:
        found = main(["report", *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_help_is_quick_and_complete(capsys):
    assert main(["report", "--help"]) == 0
    assert "--format" in capsys.readouterr().out
