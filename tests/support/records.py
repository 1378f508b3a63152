"""Read the record of a run from ``results.json``."""

import json


def record(folder, index=0):
    """Return the record of one run in a folder's ``results.json``."""
    return json.loads((folder / "results.json").read_text())["runs"][index]


def without_times(found):
    """Return a record without what differs between two runs of the same: times, and the name of the folder."""
    models = {name: {**model, "merge_seconds": None} for name, model in found["models"].items()}
    return {**found, "name": "", "path": None, "seconds": {}, "models": models}
