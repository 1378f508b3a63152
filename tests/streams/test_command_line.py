"""Streams are built from YAML and the command line: every class must be reachable and typos found."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from streams import tiny_layouts as layouts

from clmerge.streams import Stream


def parse(*arguments, config=None, tmp_path=None):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Stream, "stream")
    if config is not None:
        path = tmp_path / "config.yaml"
        path.write_text(config)
        arguments = ("--config", str(path), *arguments)
    return parser.instantiate(parser.parse_args(list(arguments))).stream


@pytest.fixture(autouse=True)
def subclasses():
    # A class is found by its short name once its module was imported.
    import clmerge.streams

    for name in clmerge.streams.__all__:
        getattr(clmerge.streams, name)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    layouts.accept_any_checksum(monkeypatch)


CIFAR100 = """
stream:
  class_path: ClassIncremental
  init_args:
    source:
      class_path: TorchvisionSource
      init_args: {dataset: CIFAR100, root: ROOT}
    num_tasks: 10
    class_order: magmax_cifar100
    val_fraction: 0.0
"""
IMAGENET_R = """
stream:
  class_path: ClassIncremental
  init_args:
    source:
      class_path: ImageFolderSource
      init_args: {root: ROOT/imagenet-r, class_name_file: README.txt, sort_by: name}
    num_tasks: 2
    class_order: natural
"""
CUB200 = """
stream:
  class_path: ClassIncremental
  init_args:
    source:
      class_path: ImageFolderSource
      init_args: {root: ROOT/cub, name: CUB200, test_folder: val}
    num_tasks: 2
"""
CARS = """
stream:
  class_path: ClassIncremental
  init_args:
    source:
      class_path: TorchvisionSource
      init_args: {dataset: StanfordCars, root: ROOT}
    num_tasks: 2
"""
DOMAINNET = """
stream:
  class_path: DomainIncremental
  init_args:
    sources:
      class_path: DomainLists
      init_args: {root: ROOT/domainnet}
    name: DomainNet
"""
RENDITIONS = """
stream:
  class_path: DomainIncremental
  init_args:
    sources:
      class_path: PrefixDomains
      init_args:
        source:
          class_path: ImageFolderSource
          init_args: {root: ROOT/imagenet-r, class_name_file: README.txt, sort_by: name}
        domains: [sketch, art]
    name: ImageNetR-domains
"""
DATASETS = """
stream:
  class_path: TaskIncremental
  init_args:
    sources:
      - class_path: TorchvisionSource
        init_args: {dataset: StanfordCars, root: ROOT}
      - class_path: TorchvisionSource
        init_args: {dataset: MNIST, root: ROOT}
      - class_path: ImageFolderSource
        init_args: {root: ROOT/cub, name: RESISC45, test_folder: val}
    max_val: 5000
"""


def write_everything(root):
    layouts.write_cifar100(root)
    layouts.write_cars(root)
    layouts.write_mnist(root)
    layouts.write_domain_lists(root / "domainnet", ["clipart", "sketch", "real", "infograph", "quickdraw", "painting"])
    for prefix in ("art", "sketch"):
        layouts.write_tree(root / "imagenet-r", ["n01", "n02"], 5, prefix=prefix)
    (root / "imagenet-r" / "README.txt").write_text("n01 zebra\nn02 ant\n")
    for folder in ("train", "val"):
        layouts.write_tree(root / "cub" / folder, ["001.Crow", "002.Gull"], 3)


@pytest.mark.parametrize(
    ("config", "names", "num_classes", "prompts"),
    [
        (CIFAR100, None, 100, 18),
        (IMAGENET_R, ["ant", "zebra"], 2, 80),
        (CUB200, ["Crow", "Gull"], 2, 80),
        (CARS, ["AM_General_Hummer_SUV_2000", "Acura_RL_Sedan_2012"], 2, 8),
        (DOMAINNET, ["clipart", "sketch", "real", "infograph", "quickdraw", "painting"], 2, 80),
        (RENDITIONS, ["sketch", "art"], 2, 80),
        (DATASETS, ["StanfordCars", "MNIST", "RESISC45"], 14, 8),
    ],
)
def test_configurations_of_the_published_protocols(tmp_path, config, names, num_classes, prompts):
    write_everything(tmp_path)
    stream = parse(config=config.replace("ROOT", str(tmp_path)), tmp_path=tmp_path)
    if names is None:
        assert len(stream.tasks) == 10
        assert {70, 89, 11} <= set(stream.tasks[0].classes)
    else:
        assert [task.name for task in stream.tasks] == names
    assert len(stream.class_names) == num_classes
    assert len(stream.class_prompts[0]) == prompts
    for task in stream.tasks:
        assert len(stream.dataset(task.index, "train"))
        assert len(stream.dataset(task.index, "test"))


def test_command_line():
    stream = parse("--stream=ClassIncremental", "--stream.source=SklearnDigits", "--stream.num_tasks=2")
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    base = ["--stream=ClassIncremental", "--stream.source=SklearnDigits"]
    assert parse(*base, "--stream.classes_per_task=[6,4]").num_tasks == 2
    assert parse(*base, "--stream.class_order=[1,0,2,3,4,5,6,7,8,9]").class_order[:2] == [1, 0]
    assert parse(*base, '--stream.source.templates=["a {}"]').class_prompts[0] == ["a zero"]
    assert parse(*base, "--stream.source.templates=generic").class_prompts[0] == ["a photo of a zero."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream.num_task=2"], "num_task"),
        (["--stream.class_order=magmax_cifar10"], "magmax_cifar100"),
        (["--stream.source=SklearnDigit"], "SklearnDigit"),
        (
            ["--stream.source=TorchvisionSource", "--stream.source.root=x", "--stream.source.dataset=CIFAR"],
            "CIFAR10",
        ),
    ],
)
def test_typos_are_errors_that_name_the_offender(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        parse("--stream=ClassIncremental", "--stream.source=SklearnDigits", *arguments)
