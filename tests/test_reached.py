"""Every public name is reached: a command uses it or lets users choose it by name, or an example or a page shows it."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import clmerge
from clmerge.alignment import Transport
from clmerge.callbacks import MergeCallback
from clmerge.deploy.calibration import Calibration
from clmerge.deploy.routing import Routing
from clmerge.evaluation.probes import Probe
from clmerge.merging import Finisher, Merger, Sparsifier
from clmerge.models import Backbone, Head, Tuning
from clmerge.runs.launching import Launcher
from clmerge.streams import DataSource, Stream
from clmerge.streams.source_groups import SourceGroup
from clmerge.streams.transforms import StreamTransform, Trigger
from clmerge.training.exchange_rules import ExchangeRule
from clmerge.training.regularizers import Regularizer
from clmerge.training.trajectory import TrajectoryRule

ROOT = Path(__file__).parent.parent
CHOSEN = (
    Merger,
    Sparsifier,
    Finisher,
    Backbone,
    Head,
    Tuning,
    DataSource,
    SourceGroup,
    Stream,
    Regularizer,
    TrajectoryRule,
    Transport,
    ExchangeRule,
    Launcher,
    Probe,
    StreamTransform,
    Trigger,
    Calibration,
    Routing,
)
PACKAGES = [
    found.name
    for found in pkgutil.walk_packages(clmerge.__path__, "clmerge.")
    if found.ispkg and hasattr(importlib.import_module(found.name), "__all__")
]


def identifiers(text):
    """Names that a file uses; those that it defines or re-exports are not uses."""
    tree = ast.parse(text)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return used, own


@pytest.fixture(scope="module")
def reached():
    """Names used in another file of the package than the one that defines them, in an example or in a page's code."""
    found, own_only = set(), set()
    for file in (ROOT / "clmerge").rglob("*.py"):
        used, own = identifiers(file.read_text(encoding="utf-8"))
        found |= used - own
        own_only |= used & own
    for file in (ROOT / "examples").glob("*.py"):
        found |= identifiers(file.read_text(encoding="utf-8"))[0]
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        code = [*re.findall(r"```.*?\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
        code += re.findall(r"^    (.*)$", text, re.MULTILINE)
        found |= set(re.findall(r"\w+", " ".join(code)))
    return found


@pytest.mark.parametrize("package", ["clmerge", *PACKAGES])
def test_every_public_name_is_reached(package, reached):
    module = importlib.import_module(package)
    assert module.__all__, package
    unreached = [
        name
        for name in module.__all__
        if name not in reached
        and not (isinstance(value := getattr(module, name), type) and issubclass(value, (*CHOSEN, MergeCallback)))
    ]
    assert not unreached, f"names of {package} that no command, example or page uses"
