import os

import pytest

from clmerge.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: clmerge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("fti", "fit"), ("fitt", "fit"), ("comprae", "compare"), ("--versio", "--version"), ("helpp", "--help")],
)
def test_a_misspelt_command_names_the_nearest(capsys, typo, meant):
    assert main([typo]) == 2
    assert f"did you mean {meant!r}" in capsys.readouterr().err


def test_what_is_near_to_no_command_names_none(capsys):
    assert main(["elephant"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_told_otherwise(given, found, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")  # so that it is put back
    monkeypatch.delenv("OMP_WAIT_POLICY") if given is None else monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert main(["report", "nothing", "--out", "a.html"]) == 1
    assert os.environ["OMP_WAIT_POLICY"] == found
