"""Every place of a comparison's document with every kind of wrong value: accepted, or one message that names it."""

import json
from contextlib import contextmanager

import pytest
from support.comparisons import make_diagnostics, write_comparison

from clmerge.results.results import validate

ODD = (None, True, -1, 1.5, float("nan"), 10**400, "x", [], {}, [None], [[0.5]], {"a": 1})


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    found = write_comparison(tmp_path_factory.mktemp("c"), num_tasks=2, diagnostics=make_diagnostics(2))
    return json.loads(json.dumps(found))  # nothing is in two places


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


@contextmanager
def changed(document, path, value):
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    kept, holder[path[-1]] = holder[path[-1]], value
    try:
        yield
    finally:
        holder[path[-1]] = kept


def test_what_compare_writes_is_accepted(document):
    validate(document)


def test_every_wrong_value_is_refused_with_its_place(document):
    refused = 0
    (run,) = document["runs"]
    for path in [path for path in places(run) if path[0] in ("searches", "orders", "diagnostics")]:
        for value in ODD:
            try:
                with changed(run, path, value):
                    validate(document)
            except ValueError as error:
                text = str(error)
                assert text.startswith("expected runs[0]."), text
                assert len(text) < 400, text
                assert "\n" not in text
                refused += 1
    assert refused > 2500


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("searches", 0, "points", 0, "values"), {}, r"searches\[0\]\.points\[0\]\.values to have scale, missing"),
        (("searches", 0, "chosen", "scale"), float("inf"), r"searches\[0\]\.chosen\.scale to be a finite number"),
        (("searches", 0, "model"), "nothing", r"searches\[0\]\.model to be one of the models, got 'nothing'"),
        (
            ("diagnostics", "vectors", "whole", "cosine", 0),
            [1.0],
            r"vectors\.whole\.cosine\[0\] to be a list of 2, got 1",
        ),
        (("diagnostics", "models", "segments", 0, "error"), [0.5], r"segments\[0\]\.error to be a list of 3"),
        (
            ("orders", "models", "opcm", "task_aware", "average_accuracy"),
            [],
            "task_aware.average_accuracy to be a list of one",
        ),
        (("models", "ties", "bytes_kept"), [1, 2, 3], r"models\.ties\.bytes_kept to be a list of at most 2, got 3"),
    ],
)
def test_messages_name_the_place(document, path, value, message):
    with changed(document["runs"][0], path, value), pytest.raises(ValueError, match=message):
        validate(document)
