"""The cases of all rules, collected from the ``CASES`` of the rules' own test files."""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from support.references import Case

from clmerge.merging import Merger, registered_mergers

TESTS = Path(__file__).resolve().parents[1]
RULES = TESTS / "merging"  # the rules' test files are those in its folders, and the pipeline's


def imported(path: Path) -> ModuleType:
    """Import a test file once, under pytest's own name for it, and through pytest's import hook where there is one."""
    name = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
    if name not in sys.modules:
        found = (finder.find_spec(name, [str(path.parent)]) for finder in sys.meta_path)
        spec = next(spec for spec in found if spec)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # or pytest would find a file with half of its tests
            raise
    return sys.modules[name]


def joined(modules: Iterable[ModuleType]) -> dict[str, Case]:
    cases, homes = {}, {}
    for module in modules:
        for label, case in getattr(module, "CASES", {}).items():
            if label in cases:
                raise ValueError(
                    f"expected a label of its own for every case, got {label!r} in {homes[label]} and "
                    f"{module.__file__}; rename one"
                )
            cases[label], homes[label] = case, module.__file__
    return cases


CASES = joined(imported(path) for path in [RULES / "test_pipeline.py", *sorted(RULES.glob("*/test_*.py"))])


def own_rules() -> dict[str, type[Merger]]:
    """The rules of clmerge by class name, without those that tests define."""
    return {name: rule for name, rule in registered_mergers().items() if rule.__module__.startswith("clmerge.")}
