import pytest

from clmerge.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: clmerge" in capsys.readouterr().out


@pytest.mark.parametrize(("typo", "meant"), [("fti", "fit"), ("fitt", "fit")])
def test_a_misspelt_command_names_the_nearest(capsys, typo, meant):
    assert main([typo]) == 2
    assert f"did you mean {meant!r}" in capsys.readouterr().err
