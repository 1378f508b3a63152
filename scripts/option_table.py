"""The table of options and classes that the command line answers typos from, without importing torch.

scripts/update_generated.py writes it to clmerge/cli/options.json.
"""

import inspect
import itertools
import types
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch

from clmerge.cli import COMMANDS, command_module

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Packages whose classes and Trainer are in the table, too; of other versions than these, it refuses nothing.
PACKAGES = ("torch", "lightning", "torchvision", "wandb")


def kinds() -> dict[str, type]:
    """Return the base classes whose subclasses are chosen by name."""
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torchvision.transforms.v2 import Transform

    from clmerge.alignment import Aligner, Transport
    from clmerge.deploy.calibration import Calibration
    from clmerge.deploy.routing import Routing
    from clmerge.evaluation.probes import Probe
    from clmerge.merging import Finisher, Merger, Sparsifier
    from clmerge.models import Backbone, Head, Tuning
    from clmerge.runs.launching import Launcher
    from clmerge.streams import DataSource, SourceGroup, Stream
    from clmerge.streams.transforms import ImageChange, StreamTransform, Trigger
    from clmerge.training.exchange_rules import ExchangeRule
    from clmerge.training.regularizers import Regularizer
    from clmerge.training.trajectory import TrajectoryRule

    own = (Merger, Sparsifier, Finisher, Stream, DataSource, SourceGroup, Backbone, Head, Tuning, Regularizer)
    own = (*own, TrajectoryRule, ExchangeRule, Launcher, StreamTransform, Trigger, ImageChange, Probe)
    return {
        base.__name__: base
        for base in (*own, Transport, Aligner, Calibration, Routing, Optimizer, Transform, Callback, Logger)
    }


def type_of(hint: Any) -> Any:
    """Return a type in the table's words; "any" for what only the parser can check."""
    origin, arguments = get_origin(hint), get_args(hint)
    simple = {int: "int", float: "float", bool: "bool", str: "str", Path: "str", type(None): "null"}
    if hint in simple:
        return simple[hint]
    if hint is torch.Tensor:
        return "null"  # which no option can be: torch's optimizers take learning rates as tensors, too
    if origin is Literal:
        words: list[Any] = [{"choices": [str(v) for v in arguments if not isinstance(v, bool | None)]}]
        words += ["bool"] * any(isinstance(v, bool) for v in arguments) + ["null"] * (None in arguments)
        return words[0] if len(words) == 1 else {"union": words}
    if origin in (Union, types.UnionType):
        found: list[Any] = []
        for part in map(type_of, arguments):
            for one in part["union"] if isinstance(part, dict) and "union" in part else [part]:
                found += [one] * (one not in found)
        return "any" if "any" in found else found[0] if len(found) == 1 else {"union": found}
    if origin is Callable:
        return type_of(arguments[-1]) if arguments else "any"
    if origin in (list, tuple, set) or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        return {"list": type_of(arguments[0])} if arguments and origin is not tuple else {"list": "any"}
    if inspect.isclass(hint) and hint.__name__ in kinds() and kinds()[hint.__name__] is hint:
        return {"kind": hint.__name__}
    return "any"


def options_of(parser: Any) -> dict[str, dict[str, Any]]:
    """Return the options of a parser by name, without ``--``."""
    from jsonargparse import ActionConfigFile

    found: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        names = [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
        names = [name for name in names if not name.endswith((".help", "+"))]
        if not names or names[0] in ("help", "print_config"):
            continue
        option: dict[str, Any] = {"key": action.dest} if action.dest != names[0] else {}
        hint = getattr(action, "_typehint", None)
        if isinstance(action, ActionConfigFile):
            option["type"] = "config"
        elif type(action).__name__ == "_ActionConfigLoad":
            option["type"] = "group"
        elif hint is None:
            option["type"] = "flag" if action.nargs == 0 else "str"
        else:
            option["type"] = type_of(hint)
            if action.nargs == "+":
                option["type"] = {"words": option["type"]}
        for name in names:
            found[name] = option
    return found


def positionals_of(parser: Any) -> list[str]:
    """Return what a command is given without an option; in brackets what may be left out."""
    found = [action for action in parser._actions if not action.option_strings]
    return [f"[{a.metavar}]" if a.nargs in ("?", "*") else str(a.metavar) for a in found]


def class_options(kind: type) -> dict[str, Any]:
    """Return the types of a class's settings by name."""
    from torch.optim import Optimizer

    from clmerge.cli.parser import CommandParser

    parser = CommandParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={1} if issubclass(kind, Optimizer) else set())
    return {name: option["type"] for name, option in options_of(parser).items()}


def subclasses(base: type) -> list[type]:
    """Return all public subclasses that can be chosen, by name."""
    found, pending = [], [base]
    while pending:
        children = pending.pop().__subclasses__()
        pending += children
        found += [child for child in children if not child.__name__.startswith("_") and not inspect.isabstract(child)]
    mine = {child for child in found if child.__module__.split(".")[0] in ("clmerge", *PACKAGES)}
    return sorted(mine, key=lambda child: child.__name__)


def import_path(kind: type) -> str:
    """Return the shortest path under which a class is imported, as the parser writes it."""
    parts = kind.__module__.split(".")
    for length in range(2, len(parts) + 1):
        module = ".".join(parts[:length])
        if getattr(import_module(module), kind.__name__, None) is kind:
            return f"{module}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__name__}"


def needs_of(kind: type) -> list[str]:
    """Return what a class takes beside its settings, in words."""
    from clmerge.deploy.calibration import Calibration
    from clmerge.deploy.routing import Routing
    from clmerge.merging import Merger
    from clmerge.models import Head

    if issubclass(kind, Head):
        text, means = "a backbone with a text tower", "mean features of new classes"
        return [text] * kind.open_vocabulary + [means] * kind.wants_prototypes
    if issubclass(kind, Routing):
        looked_at = kind().data
        return [] if looked_at == "none" else [f"images: {looked_at}"]
    if issubclass(kind, Calibration):
        return ["images of every task"]
    if not issubclass(kind, Merger):
        return []
    merger = kind()
    needs = [f"statistics: {', '.join(sorted(merger.requires))}"] * bool(merger.requires)
    needs += ["a score on validation images"] * merger.requires_score
    needs += ["labelled adaptation data" if merger.reads_labels else "adaptation data"] * merger.requires_gradient
    needs += ["all task vectors, in the bank or in memory"] * merger.keeps_vectors
    return needs + ["the task of every image, for its views"] * merger.task_views


def summary_of(kind: type) -> str:
    """Return one line about a class."""
    from clmerge.merging import Merger

    if issubclass(kind, Merger) and kind.summary:
        return kind.summary
    text = (inspect.getdoc(kind) or "").split("\n\n")[0]
    return " ".join(text.split())


def configurations(folder: str) -> dict[str, str]:
    """Return the first sentence of every configuration in a folder."""
    found = {}
    for file in sorted((CONFIGS / folder).glob("*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("# "), file.read_text("utf-8").splitlines())
        found[file.stem] = " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0]
    return found


def option_table() -> dict[str, Any]:
    """Return the table."""
    commands: dict[str, Any] = {}
    for command in COMMANDS:
        parser = command_module(command).build_parser()
        commands[command] = {"positionals": positionals_of(parser), "options": options_of(parser)}
    by_kind = {name: subclasses(base) for name, base in kinds().items()}
    classes = {kind: import_path(kind) for members in by_kind.values() for kind in members}
    return {
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "commands": commands,
        "kinds": {name: {kind.__name__: classes[kind] for kind in members} for name, members in by_kind.items()},
        "classes": {
            path: {"summary": summary_of(kind), "needs": needs_of(kind), "options": class_options(kind)}
            for kind, path in sorted(classes.items(), key=lambda item: item[1])
        },
        "methods": configurations("methods"),
        "scenarios": configurations("scenarios"),
    }
