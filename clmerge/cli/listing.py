"""``clmerge list``: what there is to choose from, one line each and what it needs."""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from clmerge.cli.option_table import nearest, option_table
from clmerge.names import tell

TOPICS = {
    "mergers": ("Merger",),
    "streams": ("Stream",),
    "sources": ("DataSource", "SourceGroup"),
    "backbones": ("Backbone",),
    "heads": ("Head",),
    "tunings": ("Tuning",),
    "regularizers": ("Regularizer",),
    "optimizers": ("Optimizer",),
    "augmentations": ("Transform",),
    "calibrations": ("Calibration",),
    "routings": ("Routing",),
    "transforms": ("StreamTransform",),
    "triggers": ("Trigger",),
    "changes": ("ImageChange",),
    "probes": ("Probe",),
    "sparsifiers": ("Sparsifier",),
    "finishers": ("Finisher",),
    "loggers": ("Logger",),
    "methods": (),
    "scenarios": (),
}
EPILOG = """\
examples:
  clmerge list mergers
  clmerge list methods           # the configurations in configs/methods
  clmerge list scenarios         # those in configs/scenarios
  clmerge list sources --json
"""


def build_parser() -> ArgumentParser:
    """Return the parser of ``clmerge list``."""
    parser = ArgumentParser(
        prog="clmerge list",
        usage="clmerge list [TOPIC] [--json]",
        description="Show what there is to choose from, one line each and what it needs; without a topic, the topics.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help=f"One of {', '.join(TOPICS)}.")
    parser.add_argument("--json", action="store_true", help="Print JSON: name, summary, needs and settings of each.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge list``; return the exit code."""
    arguments = build_parser().parse_args(argv)
    topic: str | None = arguments.topic
    if topic is not None and topic not in TOPICS:
        near = nearest(topic, TOPICS)
        hint = f"; did you mean {near}?" if near else ""
        tell(f"clmerge list: expected one of {', '.join(TOPICS)}, got {topic!r}{hint}")
        return 2
    found = [{"name": name} for name in TOPICS] if topic is None else entries(topic)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    width = max(len(one["name"]) for one in found)
    for one in found:
        needs = f"; needs {', '.join(one['needs'])}" if one.get("needs") else ""
        print(f"{one['name']:<{width}}  {one.get('summary', '').removesuffix('.')}{needs}".rstrip())
    return 0


def entries(topic: str) -> list[dict[str, Any]]:
    """Return what there is of one topic.

    Args:
        topic: One of ``TOPICS``.

    Returns:
        Dictionaries with ``name``, ``summary``, ``needs`` (in words), and for classes ``class`` (the import path) and
        ``settings`` (their names).

    Example:
        >>> [one["name"] for one in entries("heads")]
        ['CosineHead', 'LinearHead', 'ZeroShotHead']
    """
    table = option_table()
    if topic in ("methods", "scenarios"):
        own = table.methods if topic == "methods" else table.scenarios
        return [{"name": name, "summary": text, "needs": []} for name, text in own.items()]
    found = []
    for kind in TOPICS[topic]:
        for name, path in table.kinds[kind].items():
            one = table.classes[path]
            settings = [setting for setting in one["options"] if "." not in setting]
            found.append(
                {"name": name, "summary": one["summary"], "needs": one["needs"], "class": path, "settings": settings}
            )
    return found
