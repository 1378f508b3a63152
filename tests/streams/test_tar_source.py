import json
import pickle

import pytest
from streams.tiny_layouts import png, samples, write_members
from torch.utils.data import DataLoader

from clmerge.streams import ClassIncremental, StreamDataModule, WebDatasetSource
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.identity import stream_identity
from clmerge.streams.tar_source import shards


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "pets"
    top.mkdir()
    for shard in range(3):
        write_members(top / f"train-{shard:03d}.tar", samples(10 * shard, 4))
    write_members(top / "test-000.tar", samples(100, 4))
    write_members(top / "val-000.tar", samples(200, 2))
    (top / "names.txt").write_text("cat\nsea_lion\n")
    return top


def shade(images, index):
    return images.image(index).getpixel((0, 0))[0]


def test_ranges_patterns_and_names(folder):
    source = WebDatasetSource(
        f"{folder}/train-{{000..002}}.tar", test=f"{folder}/test-*.tar", val=f"{folder}/val-000.tar",
        class_name_file=f"{folder}/names.txt",
    )  # fmt: skip
    assert (source.name, source.class_names) == ("pets", ["cat", "sea lion"])
    assert [shade(source.train(), index) for index in range(12)] == [s + i for s in (0, 10, 20) for i in range(4)]
    assert source.train().targets == [0, 1] * 6
    assert [shade(source.test(), 3), shade(source.val(), 1)] == [103, 201]
    assert shade(pickle.loads(pickle.dumps(source.train())), 5) == 11
    assert source.train().where(5).startswith("the image at byte ")
    assert ", 000011.png, of " in source.train().where(5)
    stream = ClassIncremental(source, num_tasks=2)
    assert [len(stream.dataset(1, split)) for split in ("train", "val", "test")] == [6, 1, 2]


def test_every_image_is_read_alone_by_any_process(folder):
    stream = ClassIncremental(WebDatasetSource(f"{folder}/train-*.tar"), num_tasks=1, val_fraction=0.0)
    batches = []
    for num_workers in (0, 2):
        data = StreamDataModule(batch_size=3, num_workers=num_workers, seed=1)
        data.setup_stream(stream, lambda image: image.getpixel((0, 0))[0], None)
        batches.append([labels.tolist() + images.tolist() for images, labels in data.train_dataloader()])
    assert batches[0] == batches[1]


def test_without_test_archives_they_are_cut(folder):
    source = WebDatasetSource(f"{folder}/train-*.tar", test_fraction=0.5)
    assert (len(source.train()), len(source.test()), source.val()) == (6, 6, None)
    assert len({shade(images, i) for images in (source.train(), source.test()) for i in range(6)}) == 12
    assert [task["train"] for task in stream_identity(ClassIncremental(source, num_tasks=2))["tasks"]] == [2, 2]


def test_the_content_is_the_identity(folder):
    def identity():
        source = WebDatasetSource(f"{folder}/train-*.tar", test=f"{folder}/test-000.tar")
        return stream_identity(ClassIncremental(source, num_tasks=2))

    before = identity()
    assert identity() == before
    write_members(folder / "test-000.tar", {**samples(100, 4), "000102.png": png(9)})
    assert identity() != before


def test_labels_in_json_and_long_names(tmp_path):
    long = "a" * 150
    files = {
        f"x/{long}.jpg": png(1),
        f"x/{long}.json": json.dumps({"kind": "zebra"}).encode(),
        "y/1.PNG": png(2),
        "y/1.json": json.dumps({"kind": "ant"}).encode(),
        "y/._1.png": b"hidden",
        "y/1.txt": b"a caption",
    }
    source = WebDatasetSource(str(write_members(tmp_path / "t.tar", files)), label_key="kind")
    assert source.class_names == ["ant", "zebra"]
    (images,) = [source._everything]
    assert ([shade(images, 0), shade(images, 1)], images.targets) == ([1, 2], [1, 0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": png(0)}, r"a label of sample '1' in .*t\.tar, found neither 1\.cls nor 'label' in 1\.json"),
        ({"1.png": png(0), "1.jpg": png(0), "1.cls": b"0"}, "one plain image of sample '1' in .*, got another"),
        ({"1.png": png(0), "1.json": b"{"}, r"a label in 1\.json in .*t\.tar, got expected JSON"),
        ({"1.png": png(0), "1.json": b"[1]"}, r"a label in 1\.json in .*t\.tar, got 'list'"),
        ({"1.png": png(0), "1.json": b'{"label": 1.5}'}, r"whole number as label in 1\.json in .*, got 1\.5"),
        ({"1.png": png(0), "1.cls": b" "}, r"whole number as label in 1\.cls in .*, got ''"),
        ({"1.txt": b"x"}, r"samples NAME\.jpg and NAME\.cls in .*t\.tar, found no image"),
    ],
)
def test_samples_that_are_not_whole(tmp_path, files, message):
    with pytest.raises(RuntimeError, match=message):
        WebDatasetSource(str(write_members(tmp_path / "t.tar", files))).train()


def test_archives_that_cannot_be_indexed(tmp_path, folder):
    write_members(tmp_path / "t.tar.gz", samples(0, 2), "w:gz")
    with pytest.raises(RuntimeError, match=r"uncompressed tar archive at .*t\.tar\.gz, got .*not compressed"):
        WebDatasetSource(str(tmp_path / "t.tar.gz")).train()
    for pattern in ("none.tar", "none-*.tar", "none-{0..1}.tar"):
        with pytest.raises(RuntimeError, match=r"expected tar archives at .*none.*, found none"):
            WebDatasetSource(str(tmp_path / pattern)).train()
    with pytest.raises(RuntimeError, match=r"archives at .*train-003\.tar, found none"):
        shards(f"{folder}/train-{{000..003}}.tar")
    (folder / "names.txt").write_text("cat\n")
    with pytest.raises(RuntimeError, match=r"labels 0 to 0, as .*names\.txt has 1 class names, got '1'"):
        WebDatasetSource(f"{folder}/train-*.tar", class_name_file=f"{folder}/names.txt").train()
    with pytest.raises(ValueError, match="test_fraction"):
        WebDatasetSource("x", test_fraction=1.0)


def test_archives_that_changed_after_they_were_indexed(tmp_path, folder):
    images = WebDatasetSource(f"{folder}/train-*.tar", test=f"{folder}/test-000.tar").test()
    (folder / "test-000.tar").write_bytes(b"short")
    with pytest.raises(UnreadableImageError, match=r"byte \d+, whose name cannot be read, of .*, got no bytes"):
        images.image(0)
    (folder / "test-000.tar").unlink()
    with pytest.raises(UnreadableImageError, match=r"test-000\.tar, got .*No such file"):
        images.image(0)


def test_memory_is_twenty_bytes_an_image(folder):
    images = WebDatasetSource(f"{folder}/train-*.tar", test=f"{folder}/test-000.tar").train()
    assert sum(column.itemsize for column in images.places) == 20
    assert len(DataLoader(images, batch_size=None)) == 12
