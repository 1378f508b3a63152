import json
import subprocess
import sys

import pytest

from clmerge.cli import main
from clmerge.cli.listing import TOPICS, entries
from clmerge.merging import registered_mergers


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_a_line_for_each(topic, capsys):
    assert main(["list", topic]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [one["name"] for one in entries(topic)]
    assert all(len(line.split()) > 2 for line in lines)
    assert main(["list", topic, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == entries(topic)


def test_without_a_topic_there_are_the_topics(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [*TOPICS]
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": topic} for topic in TOPICS]


def test_mergers_say_what_they_need(capsys):
    main(["list", "mergers"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["Fisher"].endswith("; needs statistics: fisher")
    assert lines["GreedySoup"].endswith("; needs a score on validation images")
    assert "; needs all task vectors" in lines["TALL"]
    assert "; needs" not in lines["TIES"]
    own = {name for name, kind in registered_mergers().items() if kind.__module__.startswith("clmerge.")}
    assert set(lines) == own


def test_a_wrong_topic_names_the_nearest(capsys):
    assert main(["list", "merger"]) == 2
    assert capsys.readouterr().err.endswith("got 'merger'; did you mean mergers?\n")


def test_nothing_heavy_is_imported():
    code = "import sys; from clmerge.cli import main; main(['list', 'mergers']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MagMax" in done.stdout
