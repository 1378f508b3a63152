"""Convert the results of runs and comparisons from schema 1 to schema 2.

    python scripts/convert_results.py runs/digits runs/digits/compare

Rewrites ``results.json``, and the results in ``manifest.json``, of each folder.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clmerge.bounded_yaml import read_yaml
from clmerge.checkpoints.ledger import configured_from
from clmerge.deploy.describe import Description, describe_merger
from clmerge.deploy.naming import name_mergers
from clmerge.report.rules import plain
from clmerge.results.results import SETTINGS, Results, to_document
from clmerge.weights import write_json_atomic


def convert(document: Mapping[str, Any], rules: Mapping[str, Description], name: str) -> list[Results]:
    """Return the runs of a document of schema 1.

    Args:
        document: The document.
        rules: Descriptions of the mergers of a run of ``clmerge fit``; a comparison holds its own.
        name: Name of the run, if the document holds none.
    """
    compare = document.get("compare") or {"settings": {}, "searches": []}
    runs = compare.get("runs") or [{"name": name, "tasks": document["tasks"]}]
    found = []
    for run in runs:
        suffix = f"@{run['name']}" if len(runs) > 1 else ""
        results = Results(run["tasks"], classes=document["classes"], samples=document.get("samples"), name=run["name"])
        results.evaluation = document.get("evaluation", results.evaluation)
        results.path, results.group, results.seed = run.get("path"), run.get("group"), run.get("seed")
        results.seconds, results.bytes = document["seconds"], document.get("bytes", {})
        results.options = document.get("options", [])
        searches = [i for i, search in enumerate(compare["searches"]) if search["run"] == run["name"]]
        for search in (compare["searches"][i] for i in searches):
            results.searches.append({**search, "model": search["model"].removesuffix(suffix)})
        own = [model for model in document["models"] if model.endswith(suffix)]
        for model in own:
            label = model.removesuffix(suffix)
            matrices = [document["models"][model][setting]["R"] for setting in SETTINGS]
            if label == "zero_shot":
                results.set_zero_shot(*(matrix[0] for matrix in matrices))
                continue
            if label in rules:
                results.describe(label, **rules[label])
            if model in compare["settings"]:
                setting = compare["settings"][model]
                merger = configured_from(plain({"class_path": setting["merger"], "init_args": setting["init_args"]}))
                position = None if setting.get("search") is None else searches.index(setting["search"])
                results.describe(label, **describe_merger(merger, search=position))
            kept, seconds = (
                (compare.get(kind) or {}).get(model) or [None] * len(matrices[0])
                for kind in ("bytes_kept", "merge_seconds")
            )
            for *rows, size, spent in zip(*matrices, kept, seconds, strict=True):
                results.add_row(label, *rows, bytes_kept=size, merge_seconds=spent)
        orders = {m: part for m, part in ((compare.get("orders") or {}).get("models") or {}).items() if m in own}
        if orders:
            models = {model.removesuffix(suffix): part for model, part in orders.items()}
            results.orders = {"seed": compare["orders"].get("seed", 0), "models": models}
        diagnostics = compare.get("diagnostics") or {}
        results.diagnostics = diagnostics if diagnostics.get("run") == run["name"] else None
        found.append(results)
    return found


def _configured(folder: Path) -> dict[str, Description]:
    """Return the descriptions of a run's mergers by name."""
    file = folder / "config.yaml"
    named = (read_yaml(file) or {}).get("mergers") if file.is_file() else None
    mergers = [configured_from(plain(specification)) for specification in named or []]
    return {name: describe_merger(merger) for name, merger in name_mergers(mergers).items()} if mergers else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Folders of clmerge fit or clmerge compare.")
    for folder in parser.parse_args().folders:
        file, manifest = folder / "results.json", folder / "manifest.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        if document.get("schema") != 1:
            raise SystemExit(f"expected results with schema 1 in {file}, got {document.get('schema')!r}")
        converted = to_document(convert(document, _configured(folder), folder.resolve().name))
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            write_json_atomic(manifest, {**found, "results": converted["runs"][0]})
        write_json_atomic(file, converted)
        print(f"converted {file}")


if __name__ == "__main__":
    main()
