"""The documentation's site names what the package has. That it builds, and its links, is what scripts/docs checks."""

import re
from pathlib import Path

import pytest

import clmerge.alignment
import clmerge.deploy.calibration
import clmerge.merging
import clmerge.results.metrics
import clmerge.weights
from clmerge.merging import registered_mergers

DOCS = Path(__file__).parents[1] / "docs"


MODULES = [
    clmerge.alignment,
    clmerge.deploy.calibration,
    clmerge.merging,
    clmerge.weights,
    clmerge.results.metrics,
]


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(rf"^::: {re.escape(module.__name__)}\.(?:\w+\.)*(\w+)$", pages, flags=re.M)
    assert sorted(set(module.__all__) - set(shown)) == []


MERGERS = {name: merger() for name, merger in registered_mergers().items() if merger.__module__.startswith("clmerge.")}
AROUND = {"Pipeline", "DARE", "DELLA", "Breadcrumbs"}  # keep the promises of a rule inside of them


@pytest.mark.parametrize(
    ("row", "belongs"),
    [
        ("statistics of", lambda m: m.requires & {"fisher", "mask_fisher", "gram"}),
        ("numbers of samples", lambda m: m.requires & {"samples", "steps"}),
        ("the base model's weights", lambda m: "weights" in m.requires),
        ("labelled validation", lambda m: m.requires_score),
        ("images to learn", lambda m: m.requires_gradient),
        ("the task of every", lambda m: m.task_views),
        ("tasks in no fixed", lambda m: not m.order_free),
        ("tasks to be removed", lambda m: m.removable),
        ("memory that", lambda m: m.keeps_vectors or type(m).__name__ == "EMR"),
    ],
)
def test_which_merger_when_goes_by_what_rules_promise(row, belongs):
    (line,) = re.findall(rf"^\| {row}.*", (DOCS / "which_merger.md").read_text(encoding="utf-8"), flags=re.M)
    assert (
        set(re.findall(r"`(\w+)`", line)) - {"downdate"} - AROUND
        == {name for name, merger in MERGERS.items() if belongs(merger)} - AROUND
    )
