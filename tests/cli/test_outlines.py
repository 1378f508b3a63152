import pytest

from clmerge.cli.outlines import class_options, plain

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
OWN = """\
Does not validate against any of the Union subtypes
Subtypes: [<class 'clmerge.streams.stream.Stream'>, <class 'NoneType'>]
Errors:
  - expected num_tasks of 1 or more, got 0
  - Expected a <class 'NoneType'>
Given value type: <class 'jsonargparse._namespace.Namespace'>
Given value: Namespace(class_path='clmerge.streams.ClassIncremental', init_args=Namespace(num_tasks=0))"""
CALLABLE = """\
Parser key "model.optimizer":
  Does not validate against any of the Union subtypes
  Subtypes: [collections.abc.Callable[[collections.abc.Iterable[typing.Any]], torch.optim.optimizer.Optimizer]]
  Errors:
    - Type collections.abc.Callable[[...], Optimizer] expects a function or a callable class: Parser key "lr":
        Does not validate against any of the Union subtypes
        Subtypes: [<class 'float'>, <class 'torch.Tensor'>]
        Errors:
          - Expected a <class 'float'>
          - Expected a dot import path string: abc
        Given value type: <class 'str'>
        Given value: abc. Got value: Namespace(class_path='torch.optim.AdamW', init_args=Namespace(lr='abc'))
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='lr', val='abc')"""
CHOICES = """\
Parser key "stream":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'clmerge.streams.stream.Stream'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'clmerge.streams.ClassIncremental':
        Parser key "class_order":
          Does not validate against any of the Union subtypes
          Subtypes: [typing.Literal['natural', 'random'], list[int]]
          Errors:
            - Expected a typing.Literal['natural', 'random']
            - Expected a <class 'list'>
          Given value type: <class 'str'>
          Given value: randm
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='class_order', val='randm')"""
REFUSED = """\
Does not validate against any of the Union subtypes
Subtypes: [list[lightning.pytorch.callbacks.callback.Callback], <class 'NoneType'>]
Errors:
  - `mode` can be min, max, got smallest
  - Not a valid subclass of Callback
    Subclass types expect one of:
    - a class path (str)
  - Expected a <class 'NoneType'>
Given value type: <class 'list'>
Given value: [Namespace(class_path='lightning.pytorch.callbacks.EarlyStopping')]"""
REQUIRED = """\
Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[lightning.pytorch.callbacks.callback.Callback], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping':
        the following arguments are required: monitor
    - Not a valid subclass of Callback
      Subclass types expect one of:
      - a class path (str)
      - a dict with class_path entry
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [Namespace(class_path='lightning.pytorch.callbacks.EarlyStopping')]"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (UNION, "groups.merger: Group: Import path does not correspond to a subclass of Merger; got os.system"),
        (OPTION, "expected a setting of TaskArithmetic for merger, got 'density'"),
        (SUBCLASS, "expected a Merger for merger, got []"),
        (OWN, "expected num_tasks of 1 or more, got 0"),
        (CALLABLE, "expected a number or the name of a class for model.optimizer.lr, got 'abc'"),
        (CHOICES, "expected 'natural', 'random' or a list for stream.class_order, got 'randm'"),
        (REFUSED, "`mode` can be min, max, got smallest"),
        (REQUIRED, "expected a value of monitor for EarlyStopping (trainer.callbacks), got none"),
        ('Parser key "recipe": two documents', "recipe: two documents"),
        ("Parser key \"verify\":\n  Expected a <class 'str'>. Got value: 1", "expected text for verify, got '1'"),
        (
            "Parser key \"data\":\n  Unable to load config 'x'",
            "expected settings, or a file with settings for data, got 'x'",
        ),
        ("argument --mergers/--mergers+: expected one argument", "expected a value after --mergers, got none"),
        (
            "--mergers.help: Expected a dot import path string: X",
            "expected the name of a class for --mergers.help, got 'X'",
        ),
        ('Parser key "x":', "x: no value that fits"),
        ("one\ntwo\n  three", "one\ntwo\n  three"),
        ("", ""),
    ],
)
def test_outlines_become_one_line(message, expected):
    assert plain(message) == expected


def test_long_values_are_cut():
    assert len(plain(UNION.replace("os.system", "x" * 10_000))) < 500
    assert len(plain("[" * 10_000)) < 2000


def test_the_options_of_a_class_in_a_message():
    import clmerge.merging

    assert clmerge.merging
    assert class_options(OPTION) == ["scale", "weights"]
    assert class_options("Option 'x' is not accepted") is None
    assert class_options("Problem with given class_path 'no.such.Thing':") is None
