import json
import shutil

import pytest
from support.run_folders import write_run

from clmerge.cli import main
from clmerge.cli.watch import time_left, watch
from clmerge.report import read_study


def test_the_page_follows_a_run_until_it_is_complete(tmp_path, capsys):
    run, page = tmp_path / "run", tmp_path / "report.html"
    shown = []

    def go_on(seconds):
        """What happens to the run while nobody looks."""
        shown.append(page.read_text() if page.exists() else "")
        step = len(shown)
        if step == 1:
            run.mkdir()
        elif step in (2, 3, 5, 6):
            shutil.rmtree(run)
            write_run(run, finished={2: 0, 3: 1, 5: 2, 6: 3}[step])
        assert step < 8

    watch([str(run)], str(page), evaluation=None, title=None, sleep=go_on)
    told = capsys.readouterr().err
    assert "waiting: expected a run folder" in told
    assert [line for line in told.splitlines() if line.startswith("page ")] == [
        f"page      {page}: after task {task} of 3" for task in (1, 2, 3)
    ]
    assert "about 25 s left" in shown[3]
    assert 'http-equiv="refresh"' in shown[3]
    assert "about 6 s left" in shown[5]
    assert 'http-equiv="refresh"' not in page.read_text()


def test_the_slowest_run_says_how_long_it_takes(tmp_path):
    for name, finished in (("fast", 3), ("slow", 1)):
        write_run(tmp_path / name, finished=finished)
    assert time_left(read_study([tmp_path / "fast", tmp_path / "slow"])) == "about 25 s left"


def test_damage_that_stays_is_said(tmp_path):
    write_run(tmp_path / "run", finished=2)
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    document["runs"][0]["tasks"] = 3
    (tmp_path / "run" / "results.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"runs\[0\]\.tasks to be a list"):
        watch([str(tmp_path / "run")], str(tmp_path / "r.html"), evaluation=None, title=None, sleep=lambda s: None)


def test_a_table_is_not_watched(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--format", "md", "--watch"])
    assert "expected --watch with a page" in capsys.readouterr().err
