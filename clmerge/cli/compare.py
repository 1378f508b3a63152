"""``clmerge compare``: merge the task vectors of finished runs again, with any mergers, without training."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.cli.signals import Stopped
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.results.results import Results
    from clmerge.runs.launching import Launcher
    from clmerge.runs.stored_run import StoredRun
    from clmerge.streams import AdaptationData

EPILOG = """\
examples:
  clmerge compare runs/digits --mergers MagMax TIES TaskArithmetic TSVM
  clmerge compare runs/digits --mergers TIES TaskArithmetic --scale 0.1:1.5:0.1 --grid TIES.density=0.1,0.2,0.5
  clmerge compare runs/digits --mergers TaskArithmetic --grid 'TaskArithmetic.weights[*]=0:1:0.1' --search cma_es
  clmerge compare runs/digits --mergers MagMax OPCM --orders 10
  clmerge compare runs/seed0 runs/seed1 runs/seed2 --mergers MagMax TIES --out runs/three-seeds
  clmerge compare runs/seed0 runs/seed1 runs/seed2 --mergers MagMax TIES --launcher=local --launcher.jobs=3
  clmerge compare runs/seed0 runs/seed1 runs/seed2 --mergers MagMax --soup
  clmerge compare runs/digits --joint runs/all-classes --diagnose
  clmerge compare runs/digits --mergers MagMax --calibrations SampleTuning
  clmerge compare runs/digits --mergers TaskArithmetic --routings Smile DAM
  clmerge compare runs/digits --mergers TIES MagMax --probes CalibrationError
  clmerge compare --mergers.help TIES
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge compare``; imports torch."""
    from clmerge.cli.named_code import set_policy
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses
    from clmerge.deploy.calibration import Calibration
    from clmerge.deploy.routing import Routing
    from clmerge.evaluation.probes import Probe
    from clmerge.merging import Finisher, Merger, Objective, Sparsifier
    from clmerge.merging.strategies.methods import Method
    from clmerge.runs.launching import Launcher
    from clmerge.streams import AdaptationData
    from clmerge.streams.plan import Evaluation
    from clmerge.streams.transforms import ImageChange

    set_policy()
    models = (Calibration, Routing, Probe, ImageChange)
    CommandParser.class_names = known_subclasses((Merger, Objective, Sparsifier, Finisher, *models))
    parser = CommandParser(
        prog="clmerge compare",
        usage="clmerge compare RUN [RUN ...] [--mergers A B ...] [--calibrations A B ...] [--routings A B ...] "
        "[options]",
        description="Merge a finished run's task vectors again with any mergers, after every task, and evaluate as fit "
        "does. Resumes after an interruption; results that exist are reused.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    calibrations_help = (
        "Calibrations of every merged model, each a model of its own such as magmax+tuned (default: none). They get "
        "the images that they had got in the run."
    )
    routings_help = (
        "Routed models around every merged one, each a model of its own such as magmax+smile (default: none). The "
        "nearest centroid and the oracle of their experts are added."
    )
    probes_help = "Numbers beside the accuracies, measured of every model, such as AttackSuccess (default: none)."
    scale_help = "Values of scale to choose from on validation images: first:last:step or a,b,c."
    grid_help = (
        "Values of other parameters, for example TIES.density=0.1,0.2, Pipeline.finisher.scale=0.5,1 or, one parameter "
        "for every task, TaskArithmetic.weights[*]=0:1:0.1."
    )
    search_help = (
        "How to search: grid (default for one or two parameters), differential_evolution (default for more), "
        "preferences, cma_es, gaussian, nsga or quadratic."
    )
    budget_help = "How many points of a search to evaluate for each merger (default: the strategy's own choice)."
    preference_help = (
        "How much tasks count in the score of a search, by name or index: others do not; a negative weight unlearns "
        "(default: all that are merged count the same)."
    )
    at_least_help = "Accuracies that a search must keep, as shares of the base model's on the validation images."
    rule_help = "Also let the scale after task t follow from the best scales after the tasks before (needs --scale)."
    orders_help = "Merge the experts in this many orders (0: the run's own only)."
    joint_help = "A run that was trained on all classes together, for a reference row."
    without_help = (
        "Leave these tasks out, by name or by index: every merger is what it had been without them. Their accuracy is "
        "the probe 'forgotten' of results.json."
    )
    evaluation_help = (
        "What searches, scores and the table go by: task_agnostic accuracy, or task_aware (default: what the run does)."
    )
    adaptation_help = "Images that mergers and routings learn on; without any of these options what the run does"
    soup_help = (
        "Also average the final models of the runs: all of them, those that validation images choose (greedy soup), "
        "and their predictions; and measure how they differ."
    )
    diagnose_help = "Also explain the differences: how task vectors, experts and merged models of the first run relate."
    memory_help = "GiB of accumulators and merged weights to hold at a time."
    images_help = "MiB of decoded images to hold in memory; others wait in files in the output folder meanwhile."
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="Finished run folders.")
    parser.add_argument("--mergers", type=list[Merger], default=[], help="Mergers (default: those of the first run).")
    parser.add_argument("--calibrations", type=list[Calibration], default=[], help=calibrations_help)
    parser.add_argument("--routings", type=list[Routing], default=[], help=routings_help)
    parser.add_argument("--probes", type=list[Probe], default=[], help=probes_help)
    parser.add_argument("--scale", type=str | None, default=None, help=scale_help)
    parser.add_argument("--grid", type=str, nargs="+", default=[], metavar="NAME.PARAMETER=VALUES", help=grid_help)
    parser.add_argument("--search", type=Method | None, default=None, help=search_help)
    parser.add_argument("--budget", type=int | None, default=None, help=budget_help)
    parser.add_argument("--preference", type=str, nargs="+", default=[], metavar="TASK=WEIGHT", help=preference_help)
    parser.add_argument("--at-least", type=str, nargs="+", default=[], metavar="TASK=SHARE", help=at_least_help)
    parser.add_argument("--scale-rule", action="store_true", help=rule_help)
    parser.add_argument("--orders", type=int, default=0, help=orders_help)
    parser.add_argument("--orders-seed", type=int, default=0, help="Seed of the other orders.")
    parser.add_argument("--without", type=str, nargs="+", default=[], metavar="TASK", help=without_help)
    parser.add_argument("--evaluation", type=Evaluation | None, default=None, help=evaluation_help)
    parser.add_class_arguments(AdaptationData, "adaptation", help=adaptation_help)
    parser.add_argument("--joint", type=str | None, default=None, help=joint_help)
    parser.add_argument("--soup", action="store_true", help=soup_help)
    parser.add_argument("--diagnose", action="store_true", help=diagnose_help)
    parser.add_argument("--out", type=str | None, default=None, help="Folder to write to (default: RUN/compare).")
    parser.add_argument("--memory", type=float, default=4.0, help=memory_help)
    parser.add_argument("--image-memory", type=int, default=1024, help=images_help)
    allow_help = (
        "Packages beside clmerge, torch, Lightning, timm, open_clip, avalanche, torchvision and torchmetrics whose "
        "code the runs' configurations may name; that code is run."
    )
    wandb_help = "Log what was found about each run to W&B, into the project and group of that run."
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=allow_help)
    parser.add_argument("--wandb", action="store_true", help=wandb_help)
    launcher_help = (
        "Evaluate several runs at the same time: local (processes of this machine), or ray; the same results."
    )
    parser.add_argument("--json", action="store_true", help="Print the document instead of the table.")
    parser.add_subclass_arguments(Launcher, "launcher", required=False, help=launcher_help)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge compare``; return the exit code."""
    from clmerge.cli.launch import build_launcher, split_launcher

    parser = build_parser()
    launcher, words = split_launcher(argv)
    config = parser.parse_args([*words, *launcher])
    if config.orders < 0 or config.memory <= 0 or config.image_memory < 0:
        parser.error("expected --orders and --image-memory of 0 or more and --memory above 0")
    if config.budget is not None and config.budget < 1:
        parser.error("expected --budget of 1 or more")
    if (config.search or config.budget or config.preference or config.at_least) and not (config.scale or config.grid):
        parser.error("expected --scale or --grid with what to search, got neither")
    if config.launcher and len(config.runs) < 2:
        parser.error("expected two runs or more for --launcher, which evaluates each by a job of its own, got one")
    if config.soup and len(config.runs) < 2:
        parser.error("expected two runs or more for --soup, which averages their final models, got one")
    if config.scale_rule and config.scale is None:
        parser.error("expected --scale with the values that --scale-rule chooses from, got none")
    try:
        jobs_by, config.launcher = build_launcher(config.launcher), None
        objects = parser.instantiate(config)
        given = any(word.startswith("--adaptation.") for word in argv)
        return _compare(config, objects, objects.adaptation if given else None, jobs_by, words)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("compare", error)
    except Stopped as stop:
        stop.hint = "the same command goes on from here"
        raise


def _compare(
    config: Any, objects: Any, adaptation: "AdaptationData | None", jobs_by: "Launcher | None", words: Sequence[str]
) -> int:
    import json

    from clmerge.cli.compare_jobs import take_rows
    from clmerge.cli.open_run import open_run
    from clmerge.deploy.naming import name_mergers
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.loggers import wandb_sync_command
    from clmerge.report.groups import group_labels
    from clmerge.report.runs import Run
    from clmerge.report.study import make_study
    from clmerge.results.probe_table import probe_text
    from clmerge.results.results import Results, to_document
    from clmerge.runs.comparison.compare import Request, check_alike, check_request, compare_run
    from clmerge.runs.comparison.row_cache import RowCache
    from clmerge.runs.comparison.searches import Sought
    from clmerge.runs.comparison.soups import Soups
    from clmerge.runs.comparison.table import print_comparison
    from clmerge.weights import write_json_atomic

    quiet_lightning()
    mergers = objects.mergers
    names = _run_names(config.runs)
    out = Path(config.out) if config.out is not None else _default_out(config.runs)
    soups = Soups() if config.soup else None
    found: list[Results] = []
    configs: list[Mapping[str, Any]] = []

    def request(mergers: Any) -> Request:
        return Request(
            name_mergers(mergers),
            sought=Sought(
                scale=config.scale,
                grid=config.grid,
                method=config.search,
                budget=config.budget,
                preference=config.preference,
                at_least=config.at_least,
            ),
            scale_rule=config.scale_rule,
            orders=config.orders,
            orders_seed=config.orders_seed,
            memory=int(config.memory * 2**30),
            diagnose=config.diagnose and not found,
            calibrations=objects.calibrations,
            routings=objects.routings,
            soups=soups,
            probes=objects.probes,
        )

    def opened(path: str, name: str) -> "tuple[StoredRun, Any]":
        found = open_run(path, name=name, allow=config.allow, evaluation=config.evaluation, adaptation=adaptation)
        found[0].leave_out(config.without)
        return found

    joint = None if config.joint is None else open_run(config.joint, name="joint", allow=config.allow)[0]
    if (
        len(config.runs) > 1
    ):  # evaluating the first may take minutes: check all runs before, with one at a time in memory
        results = {}
        for path, name in zip(config.runs, names, strict=True):
            run, own = opened(path, name)
            mergers = mergers or own
            check_request(run, request(mergers), joint)
            results[name] = run.results
        check_alike(results)
    cache: RowCache | None = None
    with ExitStack() as ending:
        for path, name in zip(config.runs, names, strict=True):
            run, own = opened(path, name)
            mergers = mergers or own
            if cache is None:  # from here on, no other process writes to the folder
                cache = RowCache(out / "rows.json")
                ending.callback(cache.close)
                if jobs_by is not None:
                    take_rows(cache, out, words, config.runs, names, jobs_by)
            with _scratch_folder(out) as scratch:
                run.use_scratch(scratch, image_memory=config.image_memory)
                found.append(compare_run(run, request(mergers), cache, joint))
                if soups is not None and len(found) == len(config.runs):
                    found[0].soups = soups.finish(run, cache)
                configs.append(run.config)
                if config.wandb:
                    _log_to_wandb(run, found[-1], out)
        for one, label in zip(found, group_labels(configs, names), strict=True):
            one.group = label
        document = to_document(found)
        write_json_atomic(out / "results.json", document)
    command = wandb_sync_command(out / "logs") if config.wandb else None
    if config.json:
        print(json.dumps(document, indent=2))
    else:
        runs = zip(config.runs, found, configs, strict=True)
        print_comparison(make_study([Run(Path(path).resolve(), each, config=own) for path, each, own in runs]))
        for each in found:
            if text := probe_text(each):
                print(f"{each.name}: {text}\n" if len(found) > 1 else f"{text}\n")
        tell(f"results   {out / 'results.json'}", file=sys.stdout)
        if command:
            tell(f"W&B       {command}", file=sys.stdout)
    return 0


def _log_to_wandb(run: "StoredRun", results: "Results", out: Path) -> None:
    """Log a comparison of one run as a W&B run of its own, in the group of that run."""
    from clmerge.loggers import build_wandb_logger, describe_run, finish_loggers, log_comparison

    describe = partial(describe_run, run.config, stream=run.stream.name, num_tasks=len(run.tasks))
    own = [name for name in run.results.mergers if run.results.model(name).kind != "calibrated"]
    facts = describe(mergers=results.mergers)
    options = run.config["logging"]
    logger = build_wandb_logger(
        out / "logs",
        project=options["project"],
        name=f"compare {facts.name}",
        group=options["group"] or describe(mergers=own).group,
        tags=["compare", *facts.tags],
        job_type="compare",
        config={**facts.settings, "run": str(run.folder.path)},
        online=options["online"],
    )
    log_comparison([logger], results)
    finish_loggers([logger])


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """Make a temporary folder, removed after the block; one that a killed process left is emptied first."""
    scratch = out / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _run_names(paths: Sequence[str]) -> list[str]:
    """Name runs after their folders, with as many parent folders as make the names different."""
    parts = [Path(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different runs, got {', '.join(map(str, paths))}")


def _default_out(paths: Sequence[str]) -> Path:
    return Path(paths[0]) / ("compare" if len(paths) == 1 else f"compare-{len(paths)}-runs")
