import pytest

from clmerge.cli.messages import class_options, complain, condensed

UNION = """\
Parser key "groups":
  Problem with given class_path 'clmerge.checkpoints.groups.Group':
    Parser key "merger":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'clmerge.merging.merger.Merger'>, <class 'NoneType'>]
      Errors:
        - Import path does not correspond to a subclass of Merger
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: os.system"""
OPTION = """\
Parser key "merger":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'clmerge.merging.merger.Merger'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'clmerge.merging.TaskArithmetic':
        Option 'density' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='density', val='2')"""
SUBCLASS = """\
Parser key "merger":
  Not a valid subclass of Merger. Got value: []
  Subclass types expect one of:
  - a class path (str)
  - a dict with class_path entry"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (UNION, "groups: Group: merger: Import path does not correspond to a subclass of Merger; got os.system"),
        (OPTION, "merger: TaskArithmetic: Option 'density' is not accepted"),
        (SUBCLASS, "merger: Not a valid subclass of Merger. Got value: []"),
        ('Parser key "recipe": two documents', "recipe: two documents"),
        ("Parser key \"verify\":\n  Expected a <class 'str'>. Got value: 1", "verify: Expected str. Got value: 1"),
        ('Parser key "x":', "x: no value that fits"),
        ("one\ntwo\n  three", "one\ntwo\n  three"),
        ("", ""),
    ],
)
def test_outlines_become_one_line(message, expected):
    assert condensed(message) == expected


def test_long_values_are_cut():
    assert len(condensed(UNION.replace("os.system", "x" * 10_000))) < 500
    assert len(condensed("[" * 10_000)) < 2000


def test_the_options_of_a_class_in_a_message():
    import clmerge.merging

    assert clmerge.merging
    assert class_options(OPTION) == ["scale", "weights"]
    assert class_options("Option 'x' is not accepted") is None
    assert class_options("Problem with given class_path 'no.such.Thing':") is None


def test_failures_are_shown_without_control_characters(capsys):
    assert complain("merge", ValueError("bad \x1b[2J name\nmore")) == 1
    assert capsys.readouterr().err == "clmerge merge: bad \\x1b[2J name\nmore\n"


def test_an_error_of_the_system_that_is_a_sentence_goes_without_its_number(capsys):
    assert complain("fit", BlockingIOError(11, "expected a folder that no other process uses")) == 1
    assert capsys.readouterr().err == "clmerge fit: expected a folder that no other process uses\n"
    assert complain("fit", OSError(28, "No space left on device", "a")) == 1
    assert "[Errno 28]" in capsys.readouterr().err
