"""``clmerge forget``: take tasks out of the merged models of a finished run, and state what was done."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.cli.signals import Stopped
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser

EPILOG = """\
examples:
  clmerge forget runs/digits --tasks 1 --mergers WeightAverage TIES --out forgotten
  clmerge forget runs/digits --tasks 1 --method negate --mergers TaskArithmetic --out negated
  clmerge forget runs/digits --tasks 0 1 --method ssu --out in-sequence
  clmerge forget runs/digits --tasks 1 --method gradient_ascent --steps 10 --relearn 16 --out baseline
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge forget``; imports torch."""
    from clmerge.cli.named_code import set_policy
    from clmerge.cli.open_run import ALLOW_HELP
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses
    from clmerge.evaluation.probes import Probe
    from clmerge.merging import Finisher, Merger, Objective, Sparsifier
    from clmerge.runs.unlearning.request import Method
    from clmerge.streams.plan import Evaluation
    from clmerge.streams.transforms import ImageChange

    set_policy()
    CommandParser.class_names = known_subclasses((Merger, Objective, Sparsifier, Finisher, Probe, ImageChange))
    parser = CommandParser(
        prog="clmerge forget",
        usage="clmerge forget RUN --tasks TASK [TASK ...] --out FOLDER [--method METHOD] [--mergers A B ...] [options]",
        description="Take tasks out of the merged models of a finished run, evaluate them before and after, beside the "
        "merge in which the tasks never were, and write the models with a statement of what was removed.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    method_help = (
        "downdate: subtract the tasks from the rule's sums, or merge the others anew; negate, ext_sub, ethos: subtract "
        "their vectors, or a part of them; gradient_ascent and random_vector: baselines; ssu: one task after the other "
        "(default: downdate)."
    )
    coefficients_help = (
        "Coefficients to choose from on validation images: first:last:step or a,b,c; one value is taken as it is "
        "(default: 0:1:0.05, and 1 for ssu)."
    )
    at_least_help = "Share of the merged model's accuracy on the other tasks that must stay, on validation images."
    steps_help = "Steps of training (default: at most 20 of gradient_ascent; one epoch of ssu)."
    labels_help = "Factor of the loss of random labels in ssu; 0: none (default: 0.5, the paper's)."
    relearn_help = "Also learn so many images per task again, to see how fast (default: 0, not)."
    probes_help = "Further numbers about every model; ForgetControl and MembershipInference are there."
    evaluation_help = "What is measured: task_agnostic accuracy, or task_aware (default: what the run does)."
    memory_help = "GiB of weights to hold at a time while coefficients are tried."
    parser.add_argument("run", type=str, metavar="RUN", help="A finished run.")
    parser.add_argument("--tasks", type=str, nargs="+", required=True, metavar="TASK", help="Tasks, by name or index.")
    parser.add_argument("--method", type=Method, default="downdate", help=method_help)
    parser.add_argument("--mergers", type=list[Merger], default=[], help="Mergers (default: those of the run).")
    parser.add_argument("--out", type=str, required=True, metavar="FOLDER", help="New or empty folder to write to.")
    parser.add_argument("--coefficients", type=str | None, default=None, help=coefficients_help)
    parser.add_argument("--at-least", type=float, default=0.95, metavar="SHARE", help=at_least_help)
    parser.add_argument("--steps", type=int | None, default=None, help=steps_help)
    parser.add_argument("--random-labels", type=float, default=0.5, metavar="FACTOR", help=labels_help)
    parser.add_argument("--relearn", type=int, default=0, metavar="IMAGES", help=relearn_help)
    parser.add_argument("--probes", type=list[Probe], default=[], help=probes_help)
    parser.add_argument("--evaluation", type=Evaluation | None, default=None, help=evaluation_help)
    parser.add_argument("--memory", type=float, default=4.0, help=memory_help)
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=ALLOW_HELP)
    parser.add_argument("--json", action="store_true", help="Print the statement instead of the table.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge forget``; return the exit code."""
    parser = build_parser()
    config = parser.parse_args(list(argv))
    if config.memory <= 0:
        parser.error("expected --memory above 0")
    try:
        return _forget(config, parser.instantiate(config))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("forget", error)
    except Stopped as stop:
        stop.hint = "nothing was written; the same command starts anew"
        raise


def _forget(config: Any, objects: Any) -> int:
    from clmerge.cli.open_run import open_run
    from clmerge.deploy.naming import name_mergers
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.runs.exported import require_empty
    from clmerge.runs.unlearning.forget import Forgetting
    from clmerge.runs.unlearning.request import Request, check_request, named_tasks
    from clmerge.runs.unlearning.statement import statement, write
    from clmerge.search.grid import parse_values

    quiet_lightning()
    out = Path(config.out)
    require_empty(out)
    run, own = open_run(
        config.run, name=Path(config.run).resolve().name, allow=config.allow, evaluation=config.evaluation
    )
    mergers = name_mergers(objects.mergers or own)
    coefficients = [] if config.coefficients is None else parse_values(config.coefficients)
    if wrong := [one for one in coefficients if isinstance(one, bool) or not isinstance(one, int | float)]:
        raise ValueError(f"expected numbers in --coefficients, got {wrong[0]!r}")
    request = Request(
        named_tasks([task.name for task in run.tasks], config.tasks),
        config.method,
        coefficients=[float(one) for one in coefficients],
        at_least=config.at_least,
        steps=config.steps,
        random_labels=config.random_labels,
        relearn=config.relearn,
        probes=objects.probes,
        memory=int(config.memory * 2**30),
    )
    check_request(run, mergers, request)
    with tempfile.TemporaryDirectory() as scratch:
        run.use_scratch(Path(scratch), image_memory=1024)
        forgetting = Forgetting(run, request)
        models = [forgetting.forget(name, merger) for name, merger in mergers.items()]
        document = statement(run, request, models)
        files = write(run, request, models, document, out)
    if config.json:
        print(json.dumps(document, indent=2))
        return 0
    _show(document)
    for file in files:
        tell(f"wrote     {file}", file=sys.stdout)
    return 0


def _show(document: dict[str, Any]) -> None:
    """Print what is left of the tasks, and what of the others."""
    from clmerge.results.table import align, percent

    tasks = ", ".join(task["name"] for task in document["tasks"])
    rows = [["", "forget", "control", "attack", "leak", "relearn"]]
    for name, one in document["models"].items():
        rows += [[f"{name} {label}", *_cells(one, label, percent)] for label in ("before", "after", "never")]
    shown = next(iter(document["models"].values()))
    if "zero_shot" in shown:
        rows.append(["zero_shot", *_cells(shown, "zero_shot", percent)])
    print(f"{document['method']} of {tasks}; accuracies in %, {document['evaluation'].replace('_', '-')}")
    for line in align(rows):
        tell(line, file=sys.stdout)
    for name, one in document["models"].items():
        gap = one["difference"]
        far = "to the bit" if gap["bitwise"] else f"but for {gap['max_abs']:.1e} at most"
        chosen = "".join(f", {key} {value:g}" for key, value in one.get("chosen", {}).items())
        if "validation" in one:
            (value,) = one["chosen"].values()
            if not value:
                chosen += " (the model as it was: nothing that was tried forgets more and keeps the control)"
            elif value == one["validation"]["tried"][-1]["value"]:
                chosen += " (the largest that was tried)"
        tell(f"{name}: {one['how']}{chosen}; equals the merge without them {far}", file=sys.stdout)
    print("forget, control: mean accuracy on the tasks to forget, and on the others; never: merged without them")
    print("attack: membership inference, 0.5 is no trace; leak: by how many % it works better than on never")
    for remark in document["remarks"]:
        tell(f"note: {remark}", file=sys.stdout)


def _cells(one: dict[str, Any], label: str, percent: Any) -> list[str]:
    found = one[label]
    attack = found["probes"].get("membership_inference", {}).get("value")
    leak = one["privacy_leak"].get(label)
    steps = one.get("relearning_steps", {}).get(label, "-") if "relearning_steps" in one else "-"
    return [
        *("-" if found[key] is None else percent(found[key]) for key in ("forget", "control")),
        "-" if attack is None else f"{attack:.3f}",
        "-" if leak is None else f"{leak:+.1f}",
        "over 50" if steps is None else str(steps),
    ]
