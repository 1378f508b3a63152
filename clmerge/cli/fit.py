"""``clmerge fit``: train a stream, merge after every task, evaluate all tasks after every task."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.cli.run_loggers import Logging, build_loggers
from clmerge.cli.signals import Stopped
from clmerge.names import file_name, tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.results.results import Results
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.launching.branch_jobs import BranchJobs
    from clmerge.runs.launching.task_jobs import TaskJobs
    from clmerge.runs.learner import Learner
    from clmerge.streams import Stream
    from clmerge.streams.data_check import DataCheck

# Arguments of the Trainer that the learner sets itself.
_OWNED_BY_LEARNER = {
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "logger",
    "num_sanity_val_steps",
}
TRAINER_HELP = """\
Trainer:
  Every argument of lightning.pytorch.Trainer but the logger and the checkpointing, for example
    --trainer.max_epochs N       epochs per task (default: 10)
    --trainer.accelerator cpu    cpu, gpu, mps, auto (default: auto)
    --trainer.devices N          devices to train on, with --trainer.strategy ddp for several
    --trainer.precision bf16-mixed
    --trainer.gradient_clip_val 1.0
    --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss
    --trainer.callbacks+=BestWeights   merge the weights of the epoch with the smallest val/loss
  Callbacks are built anew for every task.

examples:
  clmerge fit --config configs/quickstart.yaml --mergers MagMax TIES TaskArithmetic
  clmerge fit --config configs/quickstart.yaml --learner.start_policy=base --trainer.max_epochs=3
  clmerge fit --config configs/quickstart.yaml --print_config
  clmerge fit --resume runs/quickstart-20260101-120000 --trainer.max_epochs=3
  clmerge fit --mergers.help TIES
"""


def build_parser(*, trainer: bool = True) -> "CommandParser":
    """Return the parser of ``clmerge fit``; imports the modules of all its types.

    Args:
        trainer: Whether to add the Trainer's arguments; the written help omits their three hundred lines.
    """
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch import loggers as lightning_loggers
    from torch.optim import Optimizer

    from clmerge.cli.named_code import set_policy
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses, load_all
    from clmerge.deploy.calibration import Calibration
    from clmerge.deploy.routing import Routing
    from clmerge.evaluation.probes import Probe
    from clmerge.merging import Merger, Objective
    from clmerge.models import Backbone, Head, Tuning
    from clmerge.runs.launching import Launcher
    from clmerge.runs.learner import Learner
    from clmerge.streams import AdaptationData, DataSource, Stream, StreamDataModule
    from clmerge.streams.transforms import ImageChange, StreamTransform
    from clmerge.training.module import ContinualClassifier
    from clmerge.training.regularizers import Regularizer

    load_all("clmerge.callbacks", "clmerge.streams")
    set_policy()
    Logging.__dataclass_fields__["extra"].type = list[lightning_loggers.Logger]
    Logging.__annotations__["extra"] = list[lightning_loggers.Logger]
    models = (Backbone, Head, Tuning, Regularizer, Calibration, Routing, Probe, StreamTransform, ImageChange, Optimizer)
    bases = (Merger, Objective, Stream, DataSource, Launcher, *models, Callback, lightning_loggers.Logger)
    CommandParser.class_names = known_subclasses(bases)
    parser = CommandParser(
        prog="clmerge fit",
        usage="clmerge fit --config FILE [options]\n       clmerge fit --resume RUN [options]",
        description="Train a stream of tasks, merge after every task, evaluate all tasks after every task.",
        epilog=None if trainer else TRAINER_HELP,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below; may be repeated.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder (default: runs/NAME-TIMESTAMP).")
    resume_help = (
        "Continue the run in this folder; options of --trainer, --data, --logging and the optimizer hold for the tasks "
        "that it still has to train."
    )
    parser.add_argument("--resume", type=str | None, default=None, help=resume_help)
    auto_help = (
        "Continue the run in --run_dir if there is one of this configuration, else begin it: the same command starts "
        "and resumes, as a requeued job needs."
    )
    parser.add_argument("--auto_resume", "--auto-resume", action="store_true", help=auto_help)
    parser.add_argument("--name", type=str, default="run", help="What the run is called in folders and in W&B.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of everything that is random.")
    seeds_help = "Run each of these seeds in a folder of its own in --run_dir, as clmerge sweep does: --seeds 0 1 2."
    parser.add_argument("--seeds", type=list[int] | None, default=None, help=seeds_help)
    check_help = "Open every image before the first task; end with 1 and the name of each that cannot be read."
    parser.add_argument("--check_data", "--check-data", action="store_true", help=check_help)
    skip_help = "Open every image before the first task and leave out, count and record those that cannot be read."
    parser.add_argument("--skip_unreadable", type=bool, default=False, help=skip_help)
    dry_help = (
        "Show what the run would be (classes, images, model, device, bytes, time after a few measured steps), decode "
        "images of every task, and write nothing."
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help=dry_help)
    fast_help = "Go the whole path with one batch of images of every task, in a folder that is removed afterwards."
    parser.add_argument("--fast_dev_run", "--fast-dev-run", action="store_true", help=fast_help)
    parser.add_subclass_arguments(Stream, "stream", help="The tasks.")
    transforms_help = "What the tasks are turned into before training, such as Poisoned; one after another."
    parser.add_argument("--transforms", type=list[StreamTransform], default=[], help=transforms_help)
    parser.add_class_arguments(ContinualClassifier, "model")
    parser.add_argument("--mergers", type=list[Merger], help="Mergers that ride on the run, by class name.")
    parser.add_class_arguments(StreamDataModule, "data", skip={"seed"})
    parser.add_class_arguments(
        Learner, "learner", skip={"stream", "module", "mergers", "data", "adaptation", "seed"}, instantiate=False
    )
    parser.add_class_arguments(AdaptationData, "adaptation")
    parser.add_class_arguments(Logging, "logging")
    launcher_help = (
        "Train the tasks apart from each other under learner.start_policy=base, else the learner.branches of one task "
        "after the other: local (processes of this machine), or ray; the results have the same bits."
    )
    parser.add_subclass_arguments(Launcher, "launcher", required=False, help=launcher_help)
    parser.set_defaults({"mergers": [{"class_path": "clmerge.merging.MagMax"}]})
    if trainer:
        parser.add_class_arguments(Trainer, "trainer", skip=_OWNED_BY_LEARNER, instantiate=False)
        parser.set_defaults({"trainer.max_epochs": 10})
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge fit``; return the exit code."""
    from clmerge.cli.launch import split_launcher
    from clmerge.cli.resume import complete_line, split_resume

    launcher, others = split_launcher(argv)
    resumed, arguments = split_resume(others)
    if resumed is not None and not arguments and (line := complete_line(resumed)):
        tell(line, file=sys.stdout)
        return 0
    others_than_loggers = arguments and not any(word.startswith("--logging") for word in arguments)
    if resumed is not None and others_than_loggers and (line := complete_line(resumed)):
        # They are checked all the same.
        tell(f"{line}; nothing is left to train, so {' '.join(arguments)} changes nothing: begin a new run")
    return _run(arguments, resumed, launcher)


_LISTS = (
    "--mergers",
    "--calibrations",
    "--learner.calibrations",
    "--routings",
    "--learner.routings",
    "--probes",
    "--learner.probes",
    "--transforms",
    "--seeds",
)


def spread_lists(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--mergers A B C`` and ``--mergers=A``, calibrations and seeds alike, as the list that the parser reads.

    Example:
        >>> spread_lists(["--mergers", "MagMax", "TIES", "--seed", "1"])
        ['--mergers=[MagMax, TIES]', '--seed', '1']
    """
    result: list[str] = []
    position = 0
    while position < len(argv):
        option, given, name = argv[position].partition("=")
        position += 1
        names: list[str] = []
        if option in _LISTS and given and (name.isidentifier() or name.isdecimal()) and name != "null":
            names = [name]
        elif option in _LISTS and not given:
            end = position
            while end < len(argv) and not argv[end].startswith("-"):
                end += 1
            names = [*argv[position:end]]
            if names and names[0].startswith("["):
                names = []
            position = end if names else position
        result.append(f"{option}=[{', '.join(names)}]" if names else argv[position - 1])
    return result


def _run(arguments: Sequence[str], resume: str | None, launcher: Sequence[str]) -> int:
    from clmerge.cli.failures import is_foreseen
    from clmerge.cli.launch import build_launcher, jobs_of
    from clmerge.cli.preflight import check_run
    from clmerge.cli.ranks import find_processes
    from clmerge.cli.rehearsal import fast_dev_config
    from clmerge.cli.requeue import requeue_hint
    from clmerge.cli.resume import complete_line, find_run, give_hint, open_run, record_changes, recorded_words
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.launching.spread import spread_of
    from clmerge.streams.data_check import RECORD
    from clmerge.streams.decoding import UnreadableImageError
    from clmerge.streams.overview import stream_lines

    run: RunFolder | None = None
    repeatable = False
    try:
        words: Sequence[str] = [] if resume is None else arguments
        parser = build_parser()
        config = parser.parse_args([*(arguments if resume is None else recorded_words(resume, words)), *launcher])
        if config.stream is None:
            parser.error("expected --stream or a --config that has one, got neither")
        repeatable = config.auto_resume
        if repeatable and config.run_dir is None:
            parser.error("expected --run_dir beside --auto_resume, the folder in which to look for the run, got none")
        if repeatable and (resume := find_run(config.run_dir, config_text(parser, config))):
            if line := complete_line(resume):
                tell(line, file=sys.stdout)
                return 0
            config = parser.parse_args([*recorded_words(resume, words), *launcher])
        if config.fast_dev_run:
            fast_dev_config(config)
        build = trainer_factory(config)
        processes = find_processes(build, config.run_dir or resume)
        changes: Sequence[str] = ()
        if resume is not None:
            run, changes = open_run(resume, words, writes=processes.writes)
        known = run.path if run is not None else None if processes.writes else Path(processes.folder)
        learner, logging, check = build_run(parser, config, known, tells=processes.writes)
        check_run(learner, build)
        jobs_by = build_launcher(config.launcher)
        if jobs_by is not None and processes.count > 1:
            raise ValueError(
                f"expected one process for --launcher, whose jobs are processes of their own, got {processes.count}: "
                "set --trainer.devices=1 (of several GPUs each job sees another one), or leave --launcher out"
            )
        spread = None if jobs_by is None else spread_of(learner)
        if config.dry_run or config.fast_dev_run:
            return _rehearse(learner, build, config, writes=processes.writes)
        if run is None:
            default = f"runs/{file_name(config.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
            run = RunFolder.create(
                processes.folder or default,
                config=config_text(parser, config),
                unique=config.run_dir is None,
                writes=processes.writes,
            )
        elif changes:
            record_changes(run, changes)
        processes.publish(run.path)
        if run.writes:
            if check is not None:
                check.save(run.path / RECORD)
            for line in stream_lines(learner.stream):
                tell(line)
        jobs = jobs_of(run, jobs_by, learner, spread) if jobs_by is not None and spread is not None else None
        _fit(learner, logging, config, run, build, jobs)
    except Exception as error:
        hint = ""
        if run is not None and not run.is_untrained:
            hint = f"; what was trained is kept: resume with clmerge fit --resume {run.path}"
        elif resume is not None and run is not None:
            hint = f"; resume with clmerge fit --resume {run.path}"
        elif run is not None:
            with suppress(OSError):  # the start failed; if the folder cannot be removed, the next start reuses it
                run.discard()
        if isinstance(error, UnreadableImageError):
            hint += "; --check_data finds all such images before a run"
        if not is_foreseen(error, started=hasattr(error, "__notes__")):  # the learner notes the task
            if hint:
                error.add_note(hint.removeprefix("; "))
            raise
        return complain("fit", error, hint)
    except Stopped as stop:
        give_hint(stop, run)
        stop.hint = requeue_hint(stop, stop.hint, repeatable=repeatable, writes=run is not None and run.writes)
        raise
    return 0


def _rehearse(learner: "Learner", build: Any, config: Any, *, writes: bool) -> int:
    """Do a dry run, or a fast one in a folder that is removed."""
    import tempfile

    from clmerge.cli.rehearsal import dry_run, fast_dev_run, shrink
    from clmerge.results.run_folder import RunFolder

    if config.dry_run:
        without = config.clone()
        without.trainer.callbacks = None  # which may write
        dry_run(learner, trainer_factory(without), config)
        return 0
    shrink(learner.stream, learner.data.batch_size)
    with tempfile.TemporaryDirectory(prefix="clmerge-") as folder:
        run = RunFolder.create(f"{folder}/run", writes=writes)
        fast_dev_run(learner, build, run)
    return 0


def build_run(
    parser: "CommandParser", config: Any, known: Path | None, *, tells: bool
) -> "tuple[Learner, Logging, DataCheck | None]":
    """Build the learner of a parsed configuration.

    Args:
        parser: The parser.
        config: What it parsed.
        known: The run folder, if it exists.
        tells: Whether this process prints.
    """
    from lightning.pytorch import seed_everything

    from clmerge.runs.learner import Learner
    from clmerge.runs.trainers import require_whole

    require_whole(config.trainer.as_dict())
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"expected a seed from 0 to {2**32 - 1}, got {config.seed}")
    seed_everything(config.seed, workers=True, verbose=False)
    without_extra = config.clone()
    without_extra.launcher = None  # which is no part of the learner
    without_extra.logging.extra = []  # built when the run has a folder, to which they write
    objects = parser.instantiate(without_extra)
    objects.data.seed = config.seed
    objects.stream.turned_into(objects.transforms)
    check = leave_unreadable_out(objects.stream, config, known)
    learner = Learner(
        objects.stream,
        objects.model,
        objects.mergers,
        objects.data,
        adaptation=objects.adaptation,
        seed=config.seed,
        **vars(objects.learner),
    )
    if tells and (read := objects.model.backbone.read):
        tell(f"backbone  {read}", file=sys.stdout)
    if objects.logging.artifacts:
        learner.require_task_vectors()
    return learner, objects.logging, check


def leave_unreadable_out(stream: "Stream", config: Any, run: Path | None) -> "DataCheck | None":
    """Check all images if configured, or load the run's check, and leave unreadable images out of the stream."""
    from clmerge.streams.data_check import RECORD, DataCheck, check_images, leave_out

    check = None if run is None else DataCheck.load(run / RECORD)
    if check is None and (config.check_data or config.skip_unreadable):
        check = check_images(stream)
        for image in check.unreadable:
            tell(image.reason)
    if check is None:
        return None
    numbers = f"{len(check.unreadable)} of {check.num_images} images"
    if check.unreadable and not config.skip_unreadable:
        raise RuntimeError(
            f"expected images that can be read, got {numbers} that cannot: mend or remove them, or leave them out with "
            "--skip_unreadable=true"
        )
    leave_out(stream, check)
    found = f"leaving out {numbers}, which cannot be read" if check.unreadable else f"{numbers} cannot be read"
    tell(found)
    return check


def _fit(
    learner: "Learner",
    logging: Logging,
    config: Any,
    run: "RunFolder",
    build: Any,
    jobs: "TaskJobs | BranchJobs | None",
) -> None:
    from clmerge.loggers import describe_run

    facts = describe_run(
        config.as_dict(), stream=learner.stream.name, num_tasks=len(learner.tasks), mergers=list(learner.merge.mergers)
    )
    results = learner.fit(
        run,
        trainer=build,
        loggers=build_loggers(logging, config.logging.extra, facts, run),
        report=_print_table if run.writes else None,
        progress=config.trainer.enable_progress_bar,
        artifacts=logging.artifacts,
        jobs=jobs,
    )
    if run.writes:
        _print_ending(results, run, wandb=logging.wandb)


def config_text(parser: "CommandParser", config: Any) -> str:
    """Return a parsed configuration as the text of ``config.yaml``."""
    kept = config.clone()
    for key in (
        "config",
        "run_dir",
        "resume",
        "auto_resume",
        "seeds",
        "launcher",
        "check_data",
        "dry_run",
        "fast_dev_run",
    ):
        kept.pop(key, None)
    header = "# The configuration of this run; `clmerge fit --config FILE` with this file runs it again.\n"
    return header + str(parser.dump(kept, skip_validation=True))


def trainer_factory(config: Any) -> Any:
    """Return a function that builds a new Trainer with its callbacks from a parsed configuration."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    from clmerge.cli.parser import CommandParser
    from clmerge.cli.ranks import own_environment

    builder = CommandParser(exit_on_error=False)
    builder.add_class_arguments(Trainer, "trainer", skip=_OWNED_BY_LEARNER, instantiate=False)
    builder_config = builder.parse_object({"trainer": config.trainer.as_dict()})

    def build(**given: Any) -> Trainer:
        # Instantiated at every call: callbacks keep state, and every task needs new ones.
        options = vars(builder.instantiate(builder_config).trainer)
        for key in ("callbacks", "plugins"):
            own = options.pop(key, None)
            given[key] = [*(own if isinstance(own, list) else [own] if own else []), *given[key]]
        try:
            given["plugins"] += own_environment(options, given["plugins"])
            return Trainer(**{**options, **given})
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"expected options under trainer that Lightning accepts here, got: {reason}") from error

    return build


def _print_table(results: "Results") -> None:
    from rich.console import Console

    from clmerge.results.probe_table import probe_text
    from clmerge.results.table import render_table, render_text

    console = Console()
    if console.is_terminal:
        console.print(render_table(results, width=console.width))
    else:
        print(render_text(results, width=100))
    if found := probe_text(results):
        print(f"\n{found}")
    print(flush=True)


def _print_ending(results: "Results", run: "RunFolder", *, wandb: bool) -> None:
    from clmerge.loggers import wandb_sync_command

    places = {"results": str(run.results), "plots": str(run.plots), "models": str(run.path / "model")}
    if wandb and (command := wandb_sync_command(run.path)):
        places["W&B"] = command
    for what, place in places.items():
        tell(f"{what:<10}{place}", file=sys.stdout)
