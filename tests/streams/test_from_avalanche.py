import pickle
import random

import PIL.Image
import pytest
import torch
from streams.tiny_layouts import write_mnist
from torch.utils.data import TensorDataset
from torchvision import transforms

from clmerge.streams import FromAvalanche, StreamDataModule
from clmerge.streams.avalanche_index import avalanche_benchmarks
from clmerge.streams.from_avalanche import as_pil
from clmerge.streams.identity import stream_identity


class Shade:
    """A picklable transform that paints a tensor in one grey."""

    def __init__(self, value):
        self.value = value

    def __call__(self, image):
        return torch.full_like(image, self.value / 255)


@pytest.fixture
def split_mnist(tmp_path):
    write_mnist(tmp_path, per_class=4)
    return avalanche_benchmarks().SplitMNIST(
        5,
        dataset_root=tmp_path,
        fixed_class_order=[4, 2, 0, 1, 3, 5, 6, 7, 8, 9],
        train_transform=Shade(10),
        eval_transform=Shade(20),
    )


def test_classic_benchmark(split_mnist):
    stream = FromAvalanche(split_mnist, templates=["the digit {}."], name="Split MNIST", val_fraction=0.25)
    assert stream.name == "Split_MNIST"
    assert [task.classes for task in stream.tasks] == [(2, 4), (0, 1), (3, 5), (6, 7), (8, 9)]
    assert stream.tasks[0].name == "2-4"
    assert stream.class_prompts[4] == ["the digit 4."]
    assert [len(stream.dataset(0, split)) for split in ("train", "val", "test")] == [6, 2, 8]
    assert set(stream.dataset(0, "train").plan.indices).isdisjoint(stream.dataset(0, "val").plan.indices)


def test_transform_groups_are_honoured(split_mnist):
    stream = FromAvalanche(split_mnist)
    to_tensor = transforms.PILToTensor()
    shades = {split: int(stream.dataset(3, split, to_tensor)[0][0].max()) for split in ("train", "val", "test")}
    assert shades == {"train": 10, "val": 20, "test": 20}


def test_new_style_benchmark_does_not_test_with_training_transforms(tmp_path):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path)
    benchmarks = avalanche_benchmarks()
    paint = {"train": Shade(10), "eval": Shade(20)}
    groups = {name: (transforms.Compose([transforms.ToTensor(), shade]), None) for name, shade in paint.items()}
    sets = [
        benchmarks.utils.as_classification_dataset(MNIST(tmp_path, train=train), transform_groups=groups)
        for train in (True, False)
    ]
    benchmark = benchmarks.class_incremental_benchmark(
        {"train": sets[0], "test": sets[1]}, class_order=list(range(10)), num_classes_per_exp=[5, 5]
    )
    stream = FromAvalanche(benchmark, class_names=[f"no. {digit}" for digit in range(10)])
    assert stream.tasks[0].class_names[1] == "no. 1"
    image, target = stream.dataset(0, "test", transforms.PILToTensor())[0]
    assert (int(image.max()), target) == (20, stream.dataset(0, "test").targets[0])


def test_validation_stream_of_the_benchmark_is_used(split_mnist):
    benchmarks = avalanche_benchmarks()
    sets = {name: [exp.dataset for exp in split_mnist.streams[name]] for name in ("train", "test")}
    benchmark = benchmarks.benchmark_with_validation_stream(benchmarks.benchmark_from_datasets(**sets), 0.5)
    stream = FromAvalanche(benchmark)
    assert [len(stream.dataset(0, split)) for split in ("train", "val", "test")] == [4, 4, 8]


def test_picklable(split_mnist):
    stream = FromAvalanche(split_mnist)
    data = stream.dataset(1, "train", transforms.PILToTensor())
    image, target = pickle.loads(pickle.dumps(data))[0]
    assert (int(image.max()), target) == (10, data.targets[0])


def test_without_templates_there_are_no_prompts(split_mnist):
    with pytest.raises(ValueError, match="prompt templates for class 0"):
        _ = FromAvalanche(split_mnist).class_prompts


def test_too_few_class_names(split_mnist):
    with pytest.raises(ValueError, match="expected 10 class names or more, got 2"):
        _ = FromAvalanche(split_mnist, class_names=["a", "b"]).tasks


def test_benchmark_with_its_default_normalisation_is_refused(tmp_path):
    write_mnist(tmp_path)
    stream = FromAvalanche(avalanche_benchmarks().SplitMNIST(5, dataset_root=tmp_path))
    with pytest.raises(ValueError, match=r"got Tensor torch.float32 \(1, 28, 28\) in \[-0.42, .*eval_transform=None"):
        stream.dataset(0, "test")[0]


def test_what_counts_as_an_image():
    grey = torch.arange(4, dtype=torch.uint8).reshape(1, 2, 2)
    assert as_pil(grey).getchannel(0).tobytes() == bytes([0, 1, 2, 3])
    assert as_pil(grey / 255).tobytes() == as_pil(grey).tobytes()
    assert as_pil(PIL.Image.new("L", (2, 2))).mode == "RGB"
    for wrong in (torch.zeros(2, 2), torch.zeros(5, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), "image"):
        with pytest.raises(ValueError, match="expected images from the Avalanche benchmark"):
            as_pil(wrong)


def test_streams_of_different_length(split_mnist):
    benchmarks = avalanche_benchmarks()
    benchmark = benchmarks.benchmark_from_datasets(
        train=[exp.dataset for exp in split_mnist.train_stream],
        test=[exp.dataset for exp in list(split_mnist.test_stream)[:3]],
    )
    with pytest.raises(ValueError, match=r"none of the classes of experience 4, \['6', '7'\]"):
        _ = FromAvalanche(benchmark).tasks
    with pytest.raises(ValueError, match="val_fraction"):
        FromAvalanche(benchmark, val_fraction=1.0)


# Benchmarks of every kind, from tensors whose pixels are their number ---------------------------------------------


def tensors(count, first=0, num_classes=4):
    shades = torch.arange(first, first + count, dtype=torch.uint8)
    images = shades.reshape(-1, 1, 1, 1).expand(count, 3, 4, 4).contiguous()
    return images, torch.arange(count) % num_classes


def labelled(count, first=0, extra=()):
    images, targets = tensors(count, first)
    data = TensorDataset(images, targets, *extra)
    data.targets = targets.tolist()
    return data


def shades(stream, task, split):
    data = stream.dataset(task, split)
    return [data.image(index).getpixel((0, 0))[0] for index in range(len(data))]


TRAIN, TEST = range(40), range(100, 112)


def kinds():
    random.seed(0)  # Avalanche shuffles by these generators
    torch.manual_seed(0)
    benchmarks = avalanche_benchmarks()
    train, test = labelled(40), labelled(12, first=100)
    avalanche_train, avalanche_test = map(benchmarks.utils.as_classification_dataset, (train, test))
    sets = {"train": avalanche_train, "test": avalanche_test}
    classes = benchmarks.class_incremental_benchmark(sets, num_experiences=2)
    two = benchmarks.nc_benchmark(train, test, n_experiences=2, task_labels=False, seed=1)
    return {
        "class-incremental": (classes, [2, 2]),
        "class-incremental of before": (two, [2, 2]),
        "with task labels": (benchmarks.nc_benchmark(train, test, n_experiences=4, task_labels=True, seed=1), [1] * 4),
        "new instances": (
            benchmarks.new_instances_benchmark(avalanche_train, avalanche_test, num_experiences=4),
            [4] * 4,
        ),
        "new instances of before": (
            benchmarks.ni_benchmark(train, test, n_experiences=3, task_labels=True, balance_experiences=True, seed=1),
            [4] * 3,
        ),
        "data-incremental": (benchmarks.data_incremental_benchmark(two, experience_size=5, shuffle=True), [2] * 8),
        "task-incremental": (benchmarks.task_incremental_benchmark(classes), [2, 2]),
        "tensors": (
            benchmarks.tensors_benchmark(train_tensors=[tensors(40)], test_tensors=[tensors(12, 100)], task_labels=[0]),
            [4],
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "class-incremental",
        "class-incremental of before",
        "with task labels",
        "new instances",
        "new instances of before",
        "data-incremental",
        "task-incremental",
        "tensors",
    ],
)
def test_benchmarks_of_every_kind(kind):
    benchmark, num_classes = kinds()[kind]
    stream = FromAvalanche(benchmark, val_fraction=0.25)
    tasks = stream.tasks
    assert [len(task.classes) for task in tasks] == num_classes
    assert len({task.name for task in tasks}) == len(tasks)
    learned = [shade for task in tasks for split in ("train", "val") for shade in shades(stream, task.index, split)]
    assert sorted(learned) == list(TRAIN)  # every image once, in one task and split
    for task in tasks:
        # The class of an image is its number modulo four, whatever the number of the test experiences.
        assert sorted(shades(stream, task.index, "test")) == [shade for shade in TEST if shade % 4 in task.classes]
        assert stream.dataset(task.index, "test").targets == [s % 4 for s in shades(stream, task.index, "test")]
        assert [s % 4 for s in shades(stream, task.index, "train")] == stream.dataset(task.index, "train").targets


def test_a_benchmark_of_new_instances_is_trained_on(tmp_path):
    """With worker processes, and identified when it is resumed."""
    benchmark, _ = kinds()["new instances"]
    stream = FromAvalanche(benchmark, val_fraction=0.25)
    batches = []
    for num_workers in (0, 1):
        data = StreamDataModule(batch_size=4, num_workers=num_workers)
        data.setup_stream(stream, transforms.PILToTensor(), transforms.PILToTensor())
        data.task = 2
        batches.append(torch.cat([images[:, 0, 0, 0] for images, _ in data.train_dataloader()]).tolist())
        assert len(torch.cat([task_ids for _, _, task_ids in data.test_dataloader()])) == 4 * 12
    assert batches[0] == batches[1]
    assert [task["test"] for task in stream_identity(stream)["tasks"]] == [12] * 4


@pytest.mark.parametrize("extra", [(), (torch.arange(8),), (torch.rand(8, 2), torch.arange(8))])
def test_items_of_any_length(extra):
    benchmarks = avalanche_benchmarks()
    data = benchmarks.utils.as_classification_dataset(labelled(8, extra=extra))
    test = benchmarks.utils.as_classification_dataset(labelled(8, first=50, extra=extra))
    stream = FromAvalanche(benchmarks.benchmark_from_datasets(train=[data], test=[test]), val_fraction=0.0)
    assert shades(stream, 0, "train") == list(range(8))
    assert stream.dataset(0, "train").targets == [0, 1, 2, 3] * 2


def test_without_targets_every_item_is_read_for_its_class():
    benchmarks = avalanche_benchmarks()
    sets = [benchmarks.utils.as_avalanche_dataset(TensorDataset(*tensors(8, first))) for first in (0, 50)]
    stream = FromAvalanche(benchmarks.benchmark_from_datasets(train=sets[:1], test=sets[1:]), val_fraction=0.0)
    assert stream.dataset(0, "test").targets == [0, 1, 2, 3] * 2


def test_classes_that_begin_with_zero_in_every_task():
    benchmarks = avalanche_benchmarks()
    benchmark = benchmarks.nc_benchmark(
        labelled(40), labelled(12, first=100), n_experiences=2, task_labels=True, seed=1,
        class_ids_from_zero_in_each_exp=True,
    )  # fmt: skip
    assert [task.classes for task in FromAvalanche(benchmark).tasks] == [(0, 1), (0, 1)]
    stream = FromAvalanche(benchmark, class_names=["left", "right"], templates=["a {}."], separate_classes=True)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3)]
    assert stream.class_names == ["0: left", "0: right", "1: left", "1: right"]
    assert stream.class_prompts == [["a left."], ["a right."]] * 2
    assert set(stream.dataset(1, "test").targets) == {2, 3}
