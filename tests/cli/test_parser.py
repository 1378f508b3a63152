import inspect

import pytest

from clmerge.cli import main
from clmerge.cli.parser import CommandParser, known_subclasses, suggestion
from clmerge.merging import Merger, Sparsifier
from clmerge.streams import FileListSource, ImageFolderSource, NpzSource, SklearnDigits, Stream, TorchvisionSource

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


def test_known_subclasses_leave_out_what_no_option_accepts():
    names = known_subclasses([Merger, Sparsifier])
    assert {"MagMax", "TIES", "TrimModel"} <= set(names)
    assert not {"Stored", "Spectral", "Gram"} & set(names)  # bases
    assert not [name for name in names if name.startswith("_")]  # private helpers


def test_the_base_of_rules_is_no_rule(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "--base", "b", "--models", "a", "--merger", "Stored", "--out", "o"])
    assert stopped.value.code == 2
    assert "Stored" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "fit", "compare"])
def test_the_help_of_a_class_is_its_whole_docstring(command, capsys):
    option = "--merger.help" if command == "merge" else "--mergers.help"
    with pytest.raises(SystemExit) as stopped:
        main([command, option, "Ethos"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "The released code adds the task vector of an auxiliary task" in " ".join(
        printed.split()
    )  # the second paragraph
    assert ">>> merger = Ethos(threshold=0.1)" in printed
    words = " ".join(printed.split())
    assert words.count("Coordinates below this share of the largest count as small") == 1  # once, as an option


def optional_settings():
    for source in (FileListSource, ImageFolderSource, NpzSource, SklearnDigits, TorchvisionSource):
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.default is None:
                yield source, name


@pytest.mark.parametrize(("source", "name"), list(optional_settings()))
def test_null_is_null_inside_of_a_class_too(source, name):
    parser = CommandParser()
    parser.add_subclass_arguments(Stream, "stream")
    needed = [key for key, p in inspect.signature(source).parameters.items() if p.default is p.empty]
    values = {"dataset": "MNIST"}
    arguments = [f"--stream.source.{key}={values.get(key, 'x')}" for key in needed]
    given = ["--stream=ClassIncremental", f"--stream.source={source.__name__}", *arguments]
    for value in ("null", "~"):
        found = parser.parse_args([*given, f"--stream.source.{name}={value}"])
        assert found.stream.init_args.source.init_args[name] is None


def test_text_stays_text():
    parser = CommandParser()
    parser.add_subclass_arguments(Stream, "stream")
    given = ["--stream=ClassIncremental", "--stream.source=ImageFolderSource", "--stream.source.root=None/x=None/y"]
    assert parser.parse_args(given).stream.init_args.source.init_args.root == "None/x=None/y"
