"""``clmerge predict``: the most likely classes of images, by a model of a finished run."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.names import shown, tell, visible

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser

EPILOG = """\
examples:
  clmerge predict runs/photos photos/cat/1.png
  clmerge predict runs/photos photos --model MagMax --top 3 --csv found.csv
  clmerge predict runs/photos photos/cat/1.png --classes cat tiger lion --json
  clmerge predict runs/photos photos --task 1
"""
_BATCH = 64


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge predict``."""
    from clmerge.cli.open_run import ALLOW_HELP, MODEL_HELP
    from clmerge.cli.parser import CommandFormatter, CommandParser

    parser = CommandParser(
        prog="clmerge predict",
        usage="clmerge predict RUN IMAGE [IMAGE ...] [options]",
        description="Show the most likely classes of images with their probabilities; the run's data are not needed. "
        "Images that cannot be read are named, do not stop the others, and make the exit code 1.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    task_help = "Task by name or number: choose from its classes; needed by EMR and TALL, which have weights per task."
    classes_help = "Choose from these classes; a text head also takes classes that the run has not seen."
    parser.add_argument("run", type=str, metavar="RUN", help="A finished run.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Image files, or folders of them.")
    parser.add_argument("--model", type=str | None, default=None, help=MODEL_HELP)
    parser.add_argument("--top", type=int, default=5, help="Classes per image.")
    parser.add_argument("--task", type=str | None, default=None, help=task_help)
    parser.add_argument("--classes", type=str, nargs="+", default=[], metavar="NAME", help=classes_help)
    parser.add_argument("--csv", type=str | None, default=None, help="File for one line per image and class.")
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=ALLOW_HELP)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge predict``; return the exit code."""
    parser = build_parser()
    config = parser.parse_args(list(argv))
    if config.top < 1:
        parser.error(f"expected --top of 1 or more, got {config.top}")
    if twice := {name for name in config.classes if config.classes.count(name) > 1}:
        parser.error(f"expected different --classes, got {min(twice)} twice")
    try:
        return _predict(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("predict", error)


def _predict(config: Any) -> int:
    from clmerge.cli.open_run import open_classifier
    from clmerge.lightning_compat import quiet_lightning

    quiet_lightning()
    files = list(images_in(config.images))
    classifier = open_classifier(
        config.run, model=config.model, task=config.task, classes=config.classes, allow=config.allow
    )
    for name in classifier.new_classes:
        tell(f"{name}: not a class of {config.run}, so known to the text head by its name alone")
    found: list[dict[str, Any]] = []
    for start in range(0, len(files), _BATCH):
        found += _classified(classifier, files[start : start + _BATCH], config.top)
    for each in found:
        if "error" in each:
            tell(f"clmerge predict: {each['error']}")
    if config.csv is not None:
        _write_csv(Path(config.csv), found)
    if config.json:
        print(json.dumps({"model": classifier.name, "images": found}, indent=2, ensure_ascii=False))
    else:
        for line in _lines(found):
            print(line)
    return int(any("error" in each for each in found))


def images_in(paths: Sequence[str]) -> Iterator[Path]:
    """Yield the files that paths name: files as they are, and all images in folders and below, without hidden ones.

    Args:
        paths: Files and folders.

    Raises:
        ValueError: If a folder holds no image.
    """
    from clmerge.streams.split_folders import image_files

    for path in map(Path, paths):
        inside = image_files(path) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"expected images in {path}, got a folder without any")
        yield from inside


def _classified(classifier: Any, files: Sequence[Path], top: int) -> Iterator[dict[str, Any]]:
    import torch

    from clmerge.streams.decoding import UnreadableImageError, open_image

    images, errors = {}, {}
    for file in files:
        try:
            images[file] = classifier.transform(open_image(file))
        except UnreadableImageError as error:
            errors[file] = str(error)
    rows = iter(classifier.probabilities(torch.stack(list(images.values()))) if images else ())
    for file in files:
        if file in errors:
            yield {"image": str(file), "error": errors[file]}
            continue
        values, order = next(rows).topk(min(top, len(classifier.classes)))
        pairs = zip(order.tolist(), values.tolist(), strict=True)
        yield {
            "image": str(file),
            "classes": [{"class": classifier.classes[index], "probability": value} for index, value in pairs],
        }


def _lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    for each in found:
        if "error" not in each:
            classes = (f"{100 * one['probability']:.1f} % {shown(one['class'])}" for one in each["classes"])
            yield f"{visible(each['image'])}: {', '.join(classes)}"


def _write_csv(file: Path, found: Sequence[dict[str, Any]]) -> None:
    import csv
    import io

    from clmerge.weights import write_text_atomic

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for each in found:
        for rank, one in enumerate(each.get("classes", ()), 1):
            writer.writerow([each["image"], rank, one["class"], one["probability"]])
    write_text_atomic(file, text.getvalue())
    tell(f"table     {file}", file=sys.stderr)
