import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

import clmerge

HEAVY = ["lightning", "avalanche", "wandb", "open_clip", "timm", "torchvision", "torchmetrics", "matplotlib", "sklearn"]


def loaded_by(statement):
    """The heavy packages (and torch) that a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}; import sys; print(*[m for m in {['torch', 'numpy', *HEAVY]} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import clmerge", []),
        ("import clmerge.cli; clmerge.cli.main(['--help'])", []),
        ("import clmerge.cli; clmerge.cli.main(['fit', '--help'])", []),
        ("import clmerge.merging", ["torch", "numpy"]),
        ("import clmerge.weights", ["torch", "numpy"]),
        ("import clmerge.report", ["torch", "numpy", "matplotlib"]),
    ],
)
def test_imports_stay_light(statement, allowed):
    assert set(loaded_by(statement)) <= set(allowed)


def test_public_names_load_on_use():
    for name in clmerge.__all__:
        assert getattr(clmerge, name) is not None
    assert set(dir(clmerge)) == set(clmerge.__all__)
    with pytest.raises(AttributeError, match="public names are"):
        clmerge.Lerner  # noqa: B018


def test_python_dash_m():
    found = subprocess.run([sys.executable, "-m", "clmerge", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == clmerge.__version__


def test_no_module_imports_what_imports_it():
    graph = grimp.build_graph("clmerge", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"expected no circle of imports, got {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("metrics", "results.metrics"),
        ("diagnostics", "evaluation.diagnostics"),
        ("calibration", "deploy.calibration"),
        ("regularizers", "training.regularizers"),
    ],
)
def test_documented_names_are_also_where_they_were(old, new):
    was, now = (importlib.import_module(f"clmerge.{name}") for name in (old, new))
    assert now.__all__
    assert all(getattr(was, name) is getattr(now, name) for name in now.__all__)
