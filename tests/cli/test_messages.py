from clmerge.cli.messages import complain


def test_failures_are_shown_without_control_characters(capsys):
    assert complain("merge", ValueError("bad \x1b[2J name\nmore")) == 1
    assert capsys.readouterr().err == "clmerge merge: bad \\x1b[2J name\nmore\n"


def test_an_error_of_the_system_that_is_a_sentence_goes_without_its_number(capsys):
    assert complain("fit", BlockingIOError(11, "expected a folder that no other process uses")) == 1
    assert capsys.readouterr().err == "clmerge fit: expected a folder that no other process uses\n"
    assert complain("fit", OSError(28, "No space left on device", "a")) == 1
    assert "[Errno 28]" in capsys.readouterr().err
