"""Open a finished run: its stream, its classifier and its models, from the configuration in its folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.results.results import Results, Setting
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.exported import FinalModel
    from clmerge.runs.final_predictors import FinalPredictors
    from clmerge.runs.image_classifier import ImageClassifier
    from clmerge.runs.stored_run import StoredRun
    from clmerge.streams import AdaptationData


ALLOW_HELP = "Packages beside the known ones whose code the run's configuration may name; that code is run."
MODEL_HELP = "Model of the run, by name or class of merger (default: the deployed one)."


def add_model_options(parser: "CommandParser") -> None:
    """Add the options that choose a model of a finished run to write down: ``--model``, ``--task`` and ``--allow``."""
    task_help = "Task by name or number, of a model with weights per task (EMR, TALL)."
    parser.add_argument("--model", type=str | None, default=None, help=MODEL_HELP)
    parser.add_argument("--task", type=str | None, default=None, help=task_help)
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=ALLOW_HELP)


def open_run(
    path: str,
    *,
    name: str,
    allow: Sequence[str] = (),
    evaluation: "Setting | None" = None,
    adaptation: "AdaptationData | None" = None,
    merges_again: bool = True,
) -> "tuple[StoredRun, list[Any]]":
    """Open a finished run; return it and its mergers.

    Args:
        path: The run folder.
        name: Name of the run in the results.
        allow: Packages, beside the known ones, whose code the run's configuration may name.
        evaluation: Which reading of the logits counts; default that of the run.
        adaptation: Images that mergers learn on; default those of the run.
        merges_again: Whether task vectors are needed, to merge them again.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the run is not finished, has no task vectors, or its configuration names code of other packages.
    """
    from clmerge.cli.fit import trainer_factory
    from clmerge.deploy.naming import name_mergers
    from clmerge.runs.stored_run import StoredRun
    from clmerge.streams.data_check import RECORD, DataCheck, leave_out

    folder, config, objects = _built(path, allow)
    if check := DataCheck.load(folder.path / RECORD):
        leave_out(objects.stream, check)
    run = StoredRun(
        folder,
        objects.stream,
        objects.model,
        objects.data,
        trainer=trainer_factory(config),
        config=config.as_dict(),
        name=name,
        mergers=name_mergers(objects.mergers),
        evaluation=evaluation,
        adaptation=adaptation or objects.adaptation,
        progress=sys.stderr.isatty(),
        merges_again=merges_again,
        routings=objects.learner.routings or (),
    )
    return run, objects.mergers


def open_classifier(
    path: str, *, model: str | None, task: str | None, classes: Sequence[str], allow: Sequence[str] = ()
) -> "ImageClassifier":
    """Open a model of a finished run to classify images; the run's data are read only if its model files are old.

    Args:
        path: The run folder.
        model: The model; default the deployed one.
        task: A task, whose classes are chosen from.
        classes: The classes to choose from; default those of the task, or all.
        allow: As for ``open_run``.

    Raises:
        FileNotFoundError: As for ``open_run``.
        ValueError: As for ``open_run``, or if the run has no such model, task or class.
    """
    from clmerge.cli.fit import trainer_factory
    from clmerge.models.templates import GENERIC
    from clmerge.runs.image_classifier import ImageClassifier, RunClasses, facts_of

    folder, config, objects = _built(path, allow)
    models, name = _models(folder, config, objects, model)
    if facts := facts_of(models):
        known = RunClasses.of_facts(facts)
    else:
        stream = objects.stream
        known = RunClasses(stream.class_names, [(t.name, list(t.classes)) for t in stream.tasks], list(GENERIC))
    if not objects.model.head.open_vocabulary:
        objects.model.head.build(objects.model.backbone, len(known.names), ())
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = trainer_factory(config)(logger=False, callbacks=[], plugins=[], **quiet)
    device = trainer.strategy.root_device
    return ImageClassifier(models, objects.model, known, name, task=task, classes=classes, device=device)


def open_final_model(
    path: str, *, model: str | None, task: str | None, allow: Sequence[str] = ()
) -> "tuple[FinalModel, Results]":
    """Open a model of a finished run to write it down; return it and the results of the run.

    Args:
        path: The run folder.
        model: The model; default the deployed one.
        task: A task, for a model with weights per task.
        allow: As for ``open_run``.

    Raises:
        FileNotFoundError: As for ``open_run``.
        ValueError: As for ``open_run``, or if the run has no such model or task, or its model files are old.
    """
    from clmerge.results.results import Results
    from clmerge.runs.image_classifier import RunClasses, facts_of, final_model

    folder, config, objects = _built(path, allow)
    models, name = _models(folder, config, objects, model)
    if models.chooses(name):
        raise ValueError(
            f"expected a model that is one file, got {name}: it is the experts of several tasks and what chooses among "
            "them; export a routing whose gates are part of the model, or the view of a task with --task"
        )
    if (facts := facts_of(models, name)) is None:
        raise ValueError(
            f"expected model files that say what they are, got those of an older version of clmerge: remove "
            f"{folder.path / 'model'}, and `clmerge fit --resume {folder.path}` writes them again"
        )
    if not objects.model.head.open_vocabulary:
        objects.model.head.build(objects.model.backbone, len(facts.classes), ())
    found = final_model(models, objects.model, RunClasses.of_facts(facts), facts, task)
    return found, Results.from_dict(folder.manifest.results)


def _models(folder: "RunFolder", config: Any, objects: Any, model: str | None) -> "tuple[FinalPredictors, str]":
    from clmerge.deploy.naming import name_mergers
    from clmerge.runs.final_predictors import FinalPredictors
    from clmerge.weights.parametrization import running_statistics

    statistics = running_statistics(objects.model)  # of theta_0: the state is loaded later
    models = FinalPredictors(
        folder,
        name_mergers(objects.mergers),
        buffers=config.learner.buffers,
        statistics=statistics,
        routings=objects.learner.routings or (),
    )
    return models, models.resolve(model or config.learner.deploy or models.names[0])


def _built(path: str, allow: Sequence[str]) -> "tuple[RunFolder, Any, Any]":
    """Return a run folder, its configuration, and the objects that this describes."""
    from lightning.pytorch import seed_everything

    from clmerge.cli.fit import build_parser as build_fit_parser
    from clmerge.results.run_folder import RunFolder

    folder = RunFolder.open(path, writes=False)
    if not folder.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {folder.config}, got none")
    parser = build_fit_parser()
    config = read_config(parser, folder.config, folder.manifest.options_in_force(), allow)
    seed_everything(config.seed, workers=True, verbose=False)
    objects = parser.instantiate(config)
    objects.data.seed = config.seed
    objects.stream.turned_into(objects.transforms)
    return folder, config, objects


def read_config(
    parser: "CommandParser", file: Path, options: Sequence[str], allow: Sequence[str], *, as_written: bool = False
) -> Any:
    """Parse a run's configuration; import only known and allowed packages.

    Args:
        parser: The parser of ``clmerge fit``.
        file: The configuration.
        options: Options that override it.
        allow: Packages, beside the known ones, whose code it may name.
        as_written: Whether to keep devices and loggers, which are otherwise those of one process that logs nothing.
    """
    from jsonargparse import ArgumentError

    from clmerge.cli.named_code import KNOWN_PACKAGES, importing_only, refused_path

    single = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
    unwanted = ("--logging.extra=[]", "--trainer.profiler=null")  # they write to paths of their own
    ours = () if as_written else (*single, *unwanted)
    parser.exit_on_error = False
    try:
        with importing_only([*KNOWN_PACKAGES, *allow]):
            return parser.parse_args(["--config", str(file), *options, *ours])
    except ArgumentError as error:
        if (refused := refused_path(str(error))) is None:
            raise ValueError(f"expected the configuration of a run of `clmerge fit` in {file}, got: {error}") from error
        named, key = refused
        raise ValueError(
            f"expected classes of {', '.join(KNOWN_PACKAGES)} in {file}, got {named} at {key}, which was neither "
            f"imported nor run; if you trust it: --allow {named.partition('.')[0]}"
        ) from error
