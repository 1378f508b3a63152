"""What a person sees in a file is what the model gets, whatever the file's kind."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from torch.utils.data import DataLoader

from clmerge.streams.decoding import UnreadableImageError, as_rgb, open_image
from clmerge.streams.files import FileImages
from clmerge.streams.images import ImageDataset
from clmerge.streams.plan import SplitPlan

GREY = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
EIGHT = [0, 1, 128, 255]


def reds(image):
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all(), "grey"
    return pixels[0, :, 0].tolist()


def colours(image):
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    PIL.Image.fromarray(GREY).save(tmp_path / f"a.{suffix}")
    assert reds(open_image(tmp_path / f"a.{suffix}")) == EIGHT


def test_sixteen_bit_grey_of_other_formats(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5\n4 1\n65535\n" + GREY.astype(">u2").tobytes())
    assert reds(open_image(tmp_path / "a.pgm")) == EIGHT
    PIL.Image.fromarray(GREY).save(tmp_path / "inverse.tif", tiffinfo={262: 0})  # white is zero
    assert reds(open_image(tmp_path / "inverse.tif")) == [255, 254, 127, 0]
    big = PIL.Image.frombytes("I;16B", (4, 1), GREY.astype(">u2").tobytes())
    assert reds(as_rgb(big)) == EIGHT


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_without_a_known_white_are_refused(tmp_path, dtype, kind):
    PIL.Image.fromarray(GREY.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=rf"image in .*a\.tif, got pixels that are {kind}, .*8 or 16 bits"):
        open_image(tmp_path / "a.tif")


def test_sixteen_bit_colour_keeps_the_high_bytes(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">3H", 0, 32768, 65535)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert colours(open_image(tmp_path / "a.png")) == [(0, 128, 255)]


def test_eight_bit_and_one_bit_grey(tmp_path):
    PIL.Image.fromarray(np.array([EIGHT], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert reds(open_image(tmp_path / "grey.png")) == EIGHT
    PIL.Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert reds(open_image(tmp_path / "bits.png")) == [0, 255]


def test_palette(tmp_path):
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert colours(open_image(tmp_path / "a.png")) == [(10, 20, 30), (200, 100, 0)]
    image.save(tmp_path / "clear.png", transparency=0)
    assert colours(open_image(tmp_path / "clear.png")) == [(255, 255, 255), (200, 100, 0)]
    image.save(tmp_path / "a.gif")
    assert colours(open_image(tmp_path / "a.gif")) == [(10, 20, 30), (200, 100, 0)]


@pytest.mark.parametrize(
    ("mode", "pixel", "seen"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
    ],
)
def test_what_is_transparent_is_white(tmp_path, mode, pixel, seen):
    PIL.Image.new(mode, (1, 1), pixel).save(tmp_path / "a.png")
    assert colours(open_image(tmp_path / "a.png")) == [seen]


def test_half_transparent_and_a_transparent_colour(tmp_path):
    PIL.Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert colours(open_image(tmp_path / "half.png")) == [(127, 127, 127)]
    PIL.Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert colours(open_image(tmp_path / "key.png")) == [(255, 255, 255)]


def test_cmyk(tmp_path):
    PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "black.jpg")
    PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "white.jpg")
    assert colours(open_image(tmp_path / "black.jpg"))[0] == (0, 0, 0)
    assert colours(open_image(tmp_path / "white.jpg"))[0] == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_an_image_is_upright_as_its_exif_says(tmp_path, mode):
    image = PIL.Image.new(mode, (3, 2))
    exif = image.getexif()
    exif[274] = 6  # taken with the camera turned
    image.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (2, 3)
    if mode in ("RGB", "L"):
        image.save(tmp_path / "a.jpg", exif=exif)
        assert open_image(tmp_path / "a.jpg").size == (2, 3)


def damaged(folder):
    """Files that hold no image, and what is said about each."""
    data = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(data, "PNG")
    (folder / "cut.png").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (folder / "text.jpg").write_text("not found")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    return {
        "cut.png": "truncated",
        "text.jpg": "cannot identify",
        "empty.png": "an empty file",
        "folder.png": "a folder",
        "absent.png": "no such file",
    }


def test_what_is_no_image_is_named(tmp_path):
    for name, reason in damaged(tmp_path).items():
        with pytest.raises(UnreadableImageError, match=rf"^expected an image in {tmp_path / name}, got .*{reason}"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_line_names_file_and_task_from_a_worker_too(tmp_path, num_workers):
    (tmp_path / "empty.png").touch()
    plan = SplitPlan(FileImages([tmp_path / "empty.png"], [0]), (0,), (0,))
    data = ImageDataset(plan, None, label="training images of task 2, cats")
    with pytest.raises(UnreadableImageError) as raised:
        next(iter(DataLoader(data, num_workers=num_workers)))
    expected = f"expected an image in {tmp_path}/empty.png, got an empty file, in the training images of task 2, cats"
    assert str(raised.value) == expected


def test_an_error_of_a_source_that_is_not_ours_names_its_image(tmp_path):
    class Foreign(FileImages):
        def image(self, index):
            raise KeyError("bits")

    data = ImageDataset(SplitPlan(Foreign([tmp_path / "a.png"], [0]), (0,), (0,)), None, label="test images of task 1")
    with pytest.raises(UnreadableImageError, match=rf"got 'bits' \({tmp_path}/a\.png\), in the test images of task 1$"):
        data[0]
