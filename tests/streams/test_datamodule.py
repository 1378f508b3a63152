import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torchvision import transforms
from torchvision.transforms import v2

from clmerge.streams import ClassIncremental, DataSource, SklearnDigits, StreamDataModule
from clmerge.streams.sources import ArrayImages


class Crop:
    """A random training transform that leaves a mark: training images are positive, see `Mark`."""

    def __call__(self, image):
        image = transforms.functional.to_tensor(image)
        top = int(torch.randint(0, 3, ()))
        return image[:, top : top + 6, :6] + 1


class Mark:
    """The evaluation transform counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return transforms.functional.to_tensor(image)[:, :6, :6]


def data_module(num_workers=0, val_fraction=0.1, **options):
    data = StreamDataModule(32, num_workers=num_workers, **options)
    data.setup_stream(ClassIncremental(SklearnDigits(), val_fraction=val_fraction), Crop(), Mark())
    return data


class Recorder(LightningModule):
    """Remember every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.tested = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, images.clone(), labels.clone()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        images, _ = batch
        assert float(images.min()) < 1

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, epochs, **options):
    module = Recorder()
    with warnings.catch_warnings():
        # Lightning advises to use more worker processes.
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data, **options)
    return module, trainer


def same(first, second):
    return len(first) == len(second) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True)
    )


def test_batches_of_the_current_task():
    data = data_module()
    for task in (0, 3):
        data.task = task
        classes = set(data.stream.tasks[task].classes)
        labels = torch.cat([labels for _, labels in data.train_dataloader()])
        assert sorted(labels.tolist()) == sorted(data.stream.dataset(task, "train").targets)
        held = torch.cat([labels for _, labels in data.val_dataloader()])
        assert held.tolist() == data.stream.dataset(task, "val").targets
        assert set(labels.tolist()) == set(held.tolist()) == classes


def test_test_batches_hold_all_tasks_in_order_with_their_index():
    data = data_module()
    data.task = 2
    batches = list(data.test_dataloader())
    labels, tasks = (torch.cat([batch[i] for batch in batches]).tolist() for i in (1, 2))
    wanted = [(t, task) for task in range(5) for t in data.stream.dataset(task, "test").targets]
    assert list(zip(labels, tasks, strict=True)) == wanted
    assert batches[0][0].shape == (32, 3, 6, 6)


def test_transforms_are_separate_for_training_and_evaluation():
    data = data_module(cache_eval=False)
    assert all(float(images.min()) >= 1 for images, _ in data.train_dataloader())
    assert all(float(images.max()) <= 1 for images, _ in data.val_dataloader())
    assert all(float(batch[0].max()) <= 1 for batch in data.test_dataloader())
    assert all(float(batch[0].max()) <= 1 for batch in data.eval_dataloader("train", [0]))


def test_augmentation_stands_before_the_evaluation_transform_of_training_images_alone():
    plain, turned = data_module(), data_module(augmentation=[v2.RandomVerticalFlip(p=1.0), v2.Identity()])
    first = [next(iter(data.train_dataloader()))[0] for data in (plain, turned)]
    assert first[0].min() >= 1, "the backbone's own"
    assert first[1].max() <= 1, "that for evaluation"
    order = [next(iter(data.train_dataloader()))[1] for data in (plain, turned)]
    assert torch.equal(*order)
    images = turned.stream.dataset(0, "train", lambda image: transforms.functional.to_tensor(image))
    batch, _ = next(iter(turned.train_dataloader()))
    flipped = {
        tuple(image.flip(1)[:, :6, :6].flatten().tolist()) for image, _ in (images[i] for i in range(len(images)))
    }
    assert all(tuple(image.flatten().tolist()) in flipped for image in batch)
    test = [next(iter(data.test_dataloader()))[0] for data in (plain, turned)]
    assert torch.equal(*test)


def test_random_augmentation_is_a_function_of_seed_task_and_epoch():
    steps = [v2.RandomResizedCrop(8, scale=(0.3, 1.0)), v2.ColorJitter(brightness=0.5)]
    batches = [next(iter(data_module(workers, augmentation=steps).train_dataloader()))[0] for workers in (0, 0, 2)]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    other = next(iter(data_module(augmentation=steps, seed=1).train_dataloader()))[0]
    assert not torch.equal(batches[0], other)


def test_a_step_that_makes_no_picture_is_named():
    with pytest.raises(TypeError, match="returns a picture, got a Image from ToImage"):
        next(iter(data_module(augmentation=[v2.ToImage()]).train_dataloader()))


def test_evaluation_images_are_transformed_once():
    data = data_module()
    mark = data._eval_transform
    first = [batch[0] for batch in data.test_dataloader()]
    calls = mark.calls
    assert calls >= 359
    again = [batch[0] for batch in data.test_dataloader()]
    assert mark.calls == calls
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    list(data.val_dataloader())
    assert mark.calls > calls


@pytest.mark.parametrize("options", [{"cache_eval": False}, {"cache_mb": 0}])
def test_evaluation_images_may_be_transformed_anew(options):
    data = data_module(**options)
    list(data.test_dataloader())
    calls = data._eval_transform.calls
    list(data.test_dataloader())
    assert data._eval_transform.calls >= calls + 359


def test_cached_and_uncached_evaluation_agree():
    cached, live = data_module().test_dataloader(), data_module(cache_eval=False).test_dataloader()
    for a, b in zip(cached, live, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_validation_images_of_another_task_are_forgotten():
    data = data_module()
    list(data.val_dataloader())
    assert ("val", 0) in data._cache
    data.task = 1
    assert ("val", 0) not in data._cache


def test_no_validation_images():
    data = data_module(val_fraction=0.0)
    assert data.val_dataloader() == []
    fit(data, 1)


def test_chosen_tasks_and_split():
    data = data_module()
    tasks = torch.cat([batch[2] for batch in data.eval_dataloader("val", [4, 1])]).tolist()
    assert tasks == [4] * len(data.stream.dataset(4, "val")) + [1] * len(data.stream.dataset(1, "val"))


def test_training_batches_are_a_function_of_seed_task_and_epoch():
    def seen(seed=0, task=0, noise=0):
        data = data_module(seed=seed)
        data.task = task
        torch.rand(noise)
        return fit(data, 2)[0].seen

    first = seen()
    assert same(first, seen(noise=5))
    assert not same(first, seen(seed=1))
    assert not same(first, seen(task=1))
    half = len(first) // 2
    assert not torch.equal(first[0][2], first[half][2])


@pytest.mark.parametrize("class_balanced", [False, True])
def test_resumed_run_sees_the_same_batches(tmp_path, class_balanced):
    options = {"class_balanced": class_balanced}
    whole = fit(data_module(**options), 3)[0].seen
    _, trainer = fit(data_module(**options), 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(data_module(**options), 3, ckpt_path=tmp_path / "last.ckpt")[0].seen
    assert resumed[0][0] == 2
    assert same(resumed, [batch for batch in whole if batch[0] == 2])


def long_tailed(**options):
    """Two tasks whose first class has 90 images and whose second has 6."""
    rng = np.random.default_rng(0)
    labels = [0] * 90 + [1] * 6 + [2] * 90 + [3] * 6

    class LongTailed(DataSource):
        class_names = ("a", "b", "c", "d")

        def _load(self, split):
            return ArrayImages(rng.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8), labels)

    data = StreamDataModule(16, **options)
    stream = ClassIncremental(LongTailed("long tail"), num_tasks=2, val_fraction=0.0)
    data.setup_stream(stream, Crop(), Mark())
    return data


@pytest.mark.parametrize(
    ("options", "task", "counts"),
    [
        ({}, 0, {0: 90, 1: 6}),
        ({"class_balanced": True}, 0, {0: 48, 1: 48}),
        ({"class_balanced": True}, 1, {2: 48, 3: 48}),
        ({"class_balanced": True, "replay": "all"}, 1, {0: 48, 1: 48, 2: 48, 3: 48}),
        ({"class_balanced": True, "replay": 4}, 1, {0: 48, 1: 48, 2: 48, 3: 48}),
        ({"class_balanced": True, "num_workers": 1}, 1, {2: 48, 3: 48}),
    ],
)
def test_class_balanced_batches_of_a_long_tailed_task(options, task, counts):
    data = long_tailed(**options)
    data.task = task
    labels = torch.cat([labels for _, labels in data.train_dataloader()]).tolist()
    assert Counter(labels) == counts


def test_workers_change_nothing():
    alone = [tuple(batch) for batch in data_module().train_dataloader()]
    helped = [tuple(batch) for batch in data_module(num_workers=2).train_dataloader()]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, helped, strict=True))


def test_loading_leaves_the_global_random_state_alone():
    data = data_module()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


class FakeTrainer:
    """What the data module asks of a distributed trainer."""

    def __init__(self, world_size, rank):
        self.world_size = world_size
        self.global_rank = rank
        self.strategy = self
        self.root_device = torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_test_images_without_repeating_any(world_size):
    seen, steps = [], set()
    for rank in range(world_size):
        data = data_module(cache_eval=False)
        data.trainer = FakeTrainer(world_size, rank)
        batches = list(data.test_dataloader())
        steps.add(len(batches))
        seen += [(int(t), int(y), x.sum().item()) for xs, ys, ts in batches for x, y, t in zip(xs, ys, ts, strict=True)]
    alone = data_module(cache_eval=False).test_dataloader()
    wanted = [(int(t), int(y), x.sum().item()) for xs, ys, ts in alone for x, y, t in zip(xs, ys, ts, strict=True)]
    assert sorted(seen) == sorted(wanted)
    assert len(steps) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_training_images(world_size):
    labels = []
    for rank in range(world_size):
        data = data_module()
        data.trainer = FakeTrainer(world_size, rank)
        sampler = data.train_dataloader().sampler
        labels.append([position for _, position in sampler])
    assert len({len(part) for part in labels}) == 1
    assert {position for part in labels for position in part} == set(range(len(data.stream.dataset(0, "train"))))


def test_lightning_tests_all_images():
    data = data_module()
    module, trainer = fit(data, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(module, datamodule=data, verbose=False)
    assert sum(len(batch[1]) for batch in module.tested) == 359


def test_stream_and_task_are_checked():
    with pytest.raises(RuntimeError, match="call setup_stream"):
        StreamDataModule().train_dataloader()
    data = data_module()
    with pytest.raises(ValueError, match=r"task in 0\.\.4 of stream SklearnDigits-5, got 5"):
        data.task = 5


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}, {"cache_mb": -1}])
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="or more"):
        StreamDataModule(**options)


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_kept_images_are_decoded_once_whatever_task_is_trained(tmp_path, cache_mb):
    decoded = []

    def counted(image):
        decoded.append(1)
        return transforms.functional.to_tensor(image)

    data = StreamDataModule(64, cache_mb=cache_mb)
    stream = ClassIncremental(SklearnDigits(), num_tasks=2)
    data.setup_stream(stream, None, counted)
    data.keep_images(tmp_path)
    seen = []
    for task in (0, 1, 0):
        data.task = task
        before = len(decoded)
        seen.append([batch[0] for split in ("val", "test") for batch in data.eval_dataloader(split)])
        assert (len(decoded) == before) == (len(seen) > 1)
    assert all(torch.equal(a, b) for batches in seen[1:] for a, b in zip(seen[0], batches, strict=True))
    assert len(list(tmp_path.iterdir())) == (0 if cache_mb else 4)
