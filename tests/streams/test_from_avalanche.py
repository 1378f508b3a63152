import pickle

import PIL.Image
import pytest
import torch
from streams.tiny_layouts import write_mnist
from torchvision import transforms

from clmerge.streams import FromAvalanche
from clmerge.streams.avalanche_index import avalanche_benchmarks
from clmerge.streams.from_avalanche import as_pil


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
    with pytest.raises(ValueError, match="got 5 train, 5 validation and 3 test"):
        _ = FromAvalanche(benchmark).tasks
    with pytest.raises(ValueError, match="val_fraction"):
        FromAvalanche(benchmark, val_fraction=1.0)
