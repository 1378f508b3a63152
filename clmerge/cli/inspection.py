"""``clmerge inspect``: what is in a checkpoint, an adapter, a bank, a merged file or a run folder."""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clmerge.cli.messages import complain
from clmerge.names import shown, visible

EPILOG = """\
examples:
  clmerge inspect model.safetensors
  clmerge inspect runs/NAME
  clmerge inspect runs/NAME/bank --json
"""
_MOST_PARTS = 12


def build_parser() -> ArgumentParser:
    """Return the parser of ``clmerge inspect``."""
    parser = ArgumentParser(
        prog="clmerge inspect",
        usage="clmerge inspect PATH [--weights NAME] [--json]",
        description="Show what is in a checkpoint of any format that clmerge merge reads, in a LoRA adapter, a bank of "
        "task vectors, a merged file with its ledger, or a run folder. Nothing in a file is executed.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="The file or folder.")
    parser.add_argument("--weights", metavar="NAME", help="Which set to show of a file that holds several.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge inspect``; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        document = inspected(arguments.path, arguments.weights)
    except (ValueError, OSError) as error:
        return complain("inspect", error)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        for line in lines(document):
            print(visible(line))
    return 0


def inspected(path: str, weights: str | None = None) -> dict[str, Any]:
    """Return what is at a path, in JSON types.

    Args:
        path: The file or folder.
        weights: Which set is read of a file that holds several.

    Returns:
        ``path``, ``kind`` (``run``, ``bank`` or ``checkpoint``), and what there is of that kind.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it cannot be read.
    """
    from clmerge.weights import TaskVectorBank

    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return {"path": path, "kind": "run", **_run(folder)}
    if folder.is_dir() and (bank := TaskVectorBank(folder)).tasks:
        return {"path": path, "kind": "bank", **_bank(bank)}
    from clmerge.checkpoints.summary import summarize

    return {"path": path, "kind": "checkpoint", **summarize(path, weights)}


def _run(folder: Path) -> dict[str, Any]:
    from clmerge.bounded_yaml import load_yaml
    from clmerge.results.results import Results
    from clmerge.results.run_manifest import read_manifest
    from clmerge.weights import TaskVectorBank
    from clmerge.weights.checksums import MANIFEST

    manifest = read_manifest(folder / MANIFEST)
    config = load_yaml(manifest.config, str(folder / MANIFEST)) if manifest.config else {}
    results = Results.from_dict(manifest.results) if manifest.results else None
    model = config.get("model") or {}
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return {
        "name": config.get("name", ""),
        "seed": config.get("seed"),
        "stream": _class(config.get("stream")),
        "backbone": _class(model.get("backbone")),
        "head": _class(model.get("head")),
        "tuning": _class(model.get("tuning")),
        "mergers": [_class(merger) for merger in config.get("mergers") or []],
        "finished": manifest.finished,
        "trained": manifest.trained,
        "tasks": [] if results is None else list(results.tasks),
        "classes": [] if results is None else [list(names) for names in results.classes],
        "evaluation": None if results is None else results.evaluation,
        "average_accuracy": {} if results is None else _averages(results),
        "bank": len(TaskVectorBank(folder / "bank").tasks),
        "models": sorted(str(file.relative_to(folder)) for file in folder.glob("model/*.safetensors")),
        "bytes": sum(sizes),
    }


def _averages(results: Any) -> dict[str, float | None]:
    """Return every model's average accuracy after the last evaluated task; None where it has none."""
    found: dict[str, float | None] = {}
    for model in results.models:
        values = results.figures(model, results.evaluation)["average_accuracy"]
        last = float(values[-1]) if len(values) else float("nan")
        found[model] = None if last != last else last
    return found


def _bank(bank: Any) -> dict[str, Any]:
    headers = [bank.metadata(task) for task in bank.tasks]
    sizes = [bank.path(task).stat().st_size for task in bank.tasks]
    return {
        "tasks": [{"task": task, "name": header["name"]} for task, header in zip(bank.tasks, headers, strict=True)],
        "base": bank.base,
        "tensors": len(bank[bank.tasks[0]]),
        "bytes": sum(sizes),
    }


def _class(spec: Any) -> dict[str, Any] | None:
    """Return a class of a configuration by its own name, with the settings that the configuration gives."""
    if spec is None:
        return None
    if isinstance(spec, str):
        spec = {"class_path": spec}
    name = str(spec.get("class_path", "")).rpartition(".")[2]
    return {"class": name, "settings": spec.get("init_args") or {}}


def lines(document: dict[str, Any]) -> Iterator[str]:
    """Yield what ``inspected`` returned as lines for a terminal.

    Args:
        document: The document.
    """
    yield from {"run": _run_lines, "bank": _bank_lines, "checkpoint": _checkpoint_lines}[document["kind"]](document)


def _run_lines(run: dict[str, Any]) -> Iterator[str]:
    total = len(run["tasks"])
    state = "finished" if run["finished"] else f"{run['trained']} of {total or '?'} tasks trained"
    yield f"{run['path']}: run {shown(run['name'])}, seed {run['seed']}, {state}, {_size(run['bytes'])}"
    for what in ("stream", "backbone", "head", "tuning"):
        if run[what] is not None:
            yield f"  {what:<9} {_called(run[what])}"
    if run["mergers"]:
        yield f"  {'mergers':<9} {', '.join(map(_called, run['mergers']))}"
    for index, (task, names) in enumerate(zip(run["tasks"], run["classes"], strict=True)):
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield f"  task {index + 1:<4} {shown(task)}: {', '.join(names[:6])}{more}"
    for model, value in run["average_accuracy"].items():
        shown_value = "  none" if value is None else f"{100 * value:6.1f} %"
        yield f"  accuracy  {shown_value}  {shown(model)}"
    yield f"  bank      {run['bank']} task vectors"
    if not run["finished"]:
        yield f"  resume    clmerge fit --resume {run['path']}"


def _bank_lines(bank: dict[str, Any]) -> Iterator[str]:
    base = f" of base {bank['base'][:12]}..." if bank["base"] else ""
    number = f"{len(bank['tasks'])} task vectors{base}"
    yield f"{bank['path']}: {number}, {bank['tensors']} tensors each, {_size(bank['bytes'])}"
    for task in bank["tasks"]:
        yield f"  task {task['task'] + 1:<4} {shown(task['name'])}"


def _checkpoint_lines(found: dict[str, Any]) -> Iterator[str]:
    words = ["task vector" if found["is_task_vector"] else "weights", found["format"]]
    what = ", ".join(dict.fromkeys(words))
    task = f" of {shown(found['task'])}" if found["task"] else ""
    dtypes = ", ".join(
        f"{count} {name}" if len(found["dtypes"]) > 1 else name for name, count in found["dtypes"].items()
    )
    yield f"{found['path']}: {what}{task}"
    yield f"  {found['tensors']} tensors, {found['parameters']:,} parameters, {_size(found['bytes'])}, {dtypes}"
    for part in found["parts"][:_MOST_PARTS]:
        yield f"  {part['parameters']:>13,}  {part['name']} ({part['tensors']})"
    if more := len(found["parts"]) - _MOST_PARTS:
        yield from [f"  and {more} more parts"] * (more > 0)
    if found["base"]:
        yield f"  base      {found['base'][:12]}..."
    if found["left_out"]:
        yield f"  left out  objects of {', '.join(found['left_out'][:5])}, which were not built"
    if model := found["model"]:
        yield from _model_lines(model)
    if ledger := found["ledger"]:
        yield f"  merged by clmerge {ledger['versions'].get('clmerge', '?')}: {_rule(ledger)}"
        yield f"    base    {ledger['base']}"
        for model in ledger["models"]:
            yield f"    model   {model}"
        for told in ledger["diagnostics"].get("barriers", []):
            gain = "" if told["before"] is None else f", barrier {told['before']:.3f} before, {told['after']:.3f} after"
            yield f"    aligned {told['model']}: {100 * told['moved']:.1f} % of its units moved{gain}"
        yield f"    check   clmerge merge --verify {found['path']}"


def _model_lines(model: dict[str, Any]) -> Iterator[str]:
    rule = model["rule"]
    made = "not merged" if rule is None else _called({"class": rule["merger"], "settings": rule["init_args"]})
    calibrated = f", calibrated by {model['calibration']}" if model["calibration"] else ""
    backbone = {"class": model["backbone"]["class"], "settings": model["backbone"].get("settings", {})}
    yield f"  model     {shown(model['model'])} of run {shown(model['run'])}: {made}{calibrated}"
    yield f"  backbone  {_called(backbone)}, {model['tuning']}, {model['head']}"
    yield f"  classes   {', '.join(model['classes'][:6])}" + f" and {len(model['classes']) - 6} more" * (
        len(model["classes"]) > 6
    )
    yield f"  tasks     {', '.join(shown(task['name']) for task in model['tasks'])}"
    yield f"  written by clmerge {model['version']}"


def _rule(ledger: dict[str, Any]) -> str:
    groups = f" and {len(ledger['groups'])} groups of their own rules" if ledger["groups"] else ""
    return (_called(_class(ledger["merger"]) or {"class": "the base's", "settings": {}})) + groups


def _called(one: dict[str, Any]) -> str:
    """Return a class and its plain settings as in Python; classes among the settings by name."""
    parts = []
    for name, value in one["settings"].items():
        if isinstance(value, dict) and "class_path" in value:
            parts.append(f"{name}={_called(_class(value) or {})}")
        else:
            parts.append(f"{name}={value!r}")
    return f"{one['class']}({', '.join(parts)})"


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
