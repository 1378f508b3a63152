import pytest

from clmerge.cli import main
from clmerge.cli.parser import known_subclasses, suggestion
from clmerge.merging import Merger

OPTIONS = ["learner.start_policy", "trainer.max_epochs", "stream", "mergers", "model.backbone"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --learner.start_polcy=base", "--learner.start_policy"),
        ("unrecognized arguments: --completely.other 3", None),
        ("Group 'learner' does not accept option 'start_polcy'", "learner.start_policy"),
        ("Option 'strem.init_args.source' is not accepted", "stream"),
        ("Expected a dot import path string: MagMaxx", "MagMax"),
        ("Expected a dot import path string: teis", "TIES"),
        ("Expected a typing.Literal['base', 'previous', 'merged']. Got value: bse", "base"),
        ("something else", None),
    ],
)
def test_nearest_words(message, expected):
    assert suggestion(message, OPTIONS, ["MagMax", "TIES"]) == expected


def test_known_subclasses_leave_private_ones_out():
    names = known_subclasses([Merger])
    assert {"MagMax", "TIES"} <= set(names)
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("command", ["merge", "fit", "compare"])
def test_the_help_of_a_class_is_its_whole_docstring(command, capsys):
    option = "--merger.help" if command == "merge" else "--mergers.help"
    with pytest.raises(SystemExit) as stopped:
        main([command, option, "Ethos"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "The released code adds a further task vector" in printed  # the second paragraph
    assert ">>> merger = Ethos(threshold=0.1)" in printed
    words = " ".join(printed.split())
    assert words.count("Share of the largest coordinate below which one counts as small") == 1  # once, as an option
