"""The identity of a stream as a few hashes, to detect other data when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clmerge.streams.files import FileImages
from clmerge.streams.sources import ArrayImages, EncodedImages, ImageSubset, LabelledImages
from clmerge.streams.transforms.fingerprinted import AddedImages
from clmerge.streams.transforms.transform import ChangedImages

if TYPE_CHECKING:
    from clmerge.streams.plan import Split
    from clmerge.streams.stream import Stream

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_LOOKED_AT = 64  # about as many images per split have their content, or the size of their file, hashed


def stream_identity(stream: Stream) -> dict[str, Any]:
    """Return the identity of a stream's tasks: names, counts of images, and hashes of labels and images.

    For images in files, the hashes are of all file names with their class folder and, separately, of the sizes of some
    files; for images in arrays and archives, of the content of some. A moved folder keeps its identity. No image is
    decoded.

    Args:
        stream: The stream; its labels are read.

    Returns:
        JSON types: ``{"tasks": [{"name": ..., "train": ..., "val": ..., "test": ..., "labels": ..., "images": ...,
        "sizes": {"train": ..., "val": ..., "test": ...}}]}``.
    """
    tasks = []
    for task in stream.tasks:
        found: dict[str, Any] = {"name": task.name}
        labels, images, sizes = hashlib.sha256(), hashlib.sha256(), {}
        for split in _SPLITS:
            plan = stream.dataset(task.index, split).plan
            found[split] = len(plan.indices)
            labels.update(json.dumps([split, list(plan.targets)]).encode())
            images.update(split.encode())
            sizes[split] = _add_images(images, plan.images, plan.indices)
        tasks.append(found | {"labels": labels.hexdigest()[:16], "images": images.hexdigest()[:16], "sizes": sizes})
    return {"tasks": tasks}


def check_stream(stream: Stream, expected: dict[str, Any], run: str, *, trained: int, tested: bool) -> None:
    """Check that a stream is the one that a run began with.

    Files that the run has not used yet may change their sizes, since an unreadable one may have been replaced.

    Args:
        stream: The stream.
        expected: The result of ``stream_identity`` when the run began.
        run: Name of the run in the message.
        trained: Number of tasks whose training and validation images the run has used.
        tested: Whether the run has used the test images.

    Raises:
        ValueError: If the data differ; the message names the first difference.
    """
    found = stream_identity(stream)["tasks"]
    known = expected.get("tasks", [])
    if len(found) != len(known):
        raise ValueError(f"expected the {len(known)} tasks of {run}, got a stream of {len(found)}")
    for number, (now, then) in enumerate(zip(found, known, strict=True), 1):
        for key in ("name", *_SPLITS, "labels", "images"):
            if now[key] != then[key]:
                what = {
                    "name": f"the name {now[key]!r} instead of {then[key]!r}",
                    "labels": "other labels",
                    "images": "other images (names of files, or content of arrays and archives)",
                }.get(key, f"{now[key]} {key} images instead of {then[key]}")
                raise _other(run, number, then["name"], what)
        for split in (*(_SPLITS[:2] if number <= trained else ()), *(_SPLITS[2:] if tested else ())):
            if now["sizes"][split] != then["sizes"][split]:
                raise _other(run, number, then["name"], f"{split} images in files of other sizes")


def _other(run: str, number: int, name: str, what: str) -> ValueError:
    return ValueError(
        f"expected the data of {run} for task {number} ({name}), got {what}; give the run its data back, or begin a "
        "new one"
    )


def _add_images(digest: hashlib._Hash, images: LabelledImages, indices: Sequence[int]) -> str:
    """Add names or content of images to a hash, and return a hash of file sizes."""
    sizes = hashlib.sha256()
    while isinstance(images, ImageSubset | ChangedImages | AddedImages):
        if isinstance(images, AddedImages):
            own = len(images.images)
            for index in (index for index in indices if index >= own):
                digest.update(images.image(index).tobytes())
            indices = [index for index in indices if index < own]
        elif isinstance(images, ChangedImages):
            turned = [index for index in indices if images.only is None or index in images.only]
            digest.update(f"{images.change!r} {turned}".encode())
        else:
            indices = [images.indices[index] for index in indices]
        images = images.images
    some = indices[:: -(-len(indices) // _LOOKED_AT)] if indices else []
    if isinstance(images, FileImages):
        for index in indices:
            digest.update("/".join(images.paths[index].parts[-2:]).encode("utf-8", "surrogateescape") + b"\n")
        for index in some:
            path = images.paths[index]
            sizes.update(b"%d\n" % (path.stat().st_size if path.is_file() else -1))
    elif isinstance(images, ArrayImages):
        digest.update(repr(images.images.shape[1:]).encode())
        for index in some:
            digest.update(images.images[index].tobytes())
    elif isinstance(images, EncodedImages):
        for index in some:
            digest.update(images.encoded(index))
    return sizes.hexdigest()[:16]
