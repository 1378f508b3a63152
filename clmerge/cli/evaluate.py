"""``clmerge evaluate``: the accuracy of models of a finished run, or of a checkpoint, on any stream."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clmerge.cli.messages import complain
from clmerge.names import tell

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from clmerge.cli.parser import CommandParser
    from clmerge.deploy.predictors import Predictor
    from clmerge.evaluation.evaluator import Rows
    from clmerge.evaluation.probes import Probe
    from clmerge.models import Backbone
    from clmerge.results.model_facts import ModelFacts
    from clmerge.results.results import Results
    from clmerge.runs.session import Session
    from clmerge.training.module import ContinualClassifier

    Found = tuple[Results, Rows]

EPILOG = """\
examples:
  clmerge evaluate runs/digits
  clmerge evaluate runs/digits --models magmax expert --split val
  clmerge evaluate runs/digits --models magmax --stream ClassIncremental --stream.source ImageFolderSource \\
      --stream.source.root photos --stream.num_tasks 1 --split all --out photos-of-digits
  clmerge evaluate runs/digits/model/magmax.safetensors --stream ClassIncremental --stream.source SklearnDigits
  clmerge evaluate merged.safetensors --backbone OpenClip --stream ClassIncremental --stream.source SklearnDigits
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge evaluate``; imports the modules of all its types."""
    from clmerge.cli.named_code import set_policy
    from clmerge.cli.open_run import ALLOW_HELP
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses, load_all
    from clmerge.evaluation.probes import Probe
    from clmerge.models import Backbone
    from clmerge.streams import DataSource, Stream
    from clmerge.streams.plan import Evaluation
    from clmerge.streams.transforms import ImageChange

    load_all("clmerge.streams")
    set_policy()
    CommandParser.class_names = known_subclasses((Stream, DataSource, Backbone, Probe, ImageChange))
    parser = CommandParser(
        prog="clmerge evaluate",
        usage="clmerge evaluate RUN|CHECKPOINT [--models A B ...] [--stream CLASS ...] [options]",
        description="Evaluate the final models of a finished run on its own stream or another, or a checkpoint under a "
        "text head. A text head takes its classes from the stream; a learned head must know them.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    models_help = "Models of the run, by name or class of merger (default: all that can be evaluated)."
    stream_help = "The stream to evaluate on (default: the run's own)."
    backbone_help = (
        "The architecture of a checkpoint (default: the one that a file of a run names); needs a text tower."
    )
    split_help = (
        "Which images; all are those of training, validation and test, for a folder that nothing was trained on."
    )
    probes_help = "Numbers beside the accuracies, measured of every model, such as CalibrationError (default: none)."
    evaluation_help = "What the table shows: task_agnostic accuracy, or task_aware (default: what the stream does)."
    out_help = "Folder for results.json, with one row per model, the same after every task."
    parser.add_argument("target", type=str, metavar="RUN|CHECKPOINT", help="A finished run, or a file of weights.")
    parser.add_argument("--models", type=str, nargs="+", default=[], metavar="NAME", help=models_help)
    parser.add_subclass_arguments(Stream, "stream", required=False, help=stream_help)
    parser.add_subclass_arguments(Backbone, "backbone", required=False, help=backbone_help)
    parser.add_argument("--split", type=Literal["test", "val", "all"], default="test", help=split_help)
    parser.add_argument("--probes", type=list[Probe], default=[], help=probes_help)
    parser.add_argument("--evaluation", type=Evaluation | None, default=None, help=evaluation_help)
    parser.add_argument("--out", type=str | None, default=None, help=out_help)
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=ALLOW_HELP)
    parser.add_argument("--json", action="store_true", help="Print the document instead of the table.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge evaluate``; return the exit code."""
    parser = build_parser()
    config = parser.parse_args(list(argv))
    if not Path(config.target).exists():
        return complain("evaluate", FileNotFoundError(f"expected a run folder or a checkpoint, got {config.target}"))
    is_run = Path(config.target).is_dir()
    if is_run and config.backbone is not None:
        parser.error(f"expected --backbone with a checkpoint alone, got it with the run {config.target}")
    if not is_run and config.stream is None:
        parser.error(f"expected --stream with {config.target}, which is no run folder")
    if not is_run and config.models:
        parser.error(f"expected --models with a run, got it with {config.target}, which is one model")
    try:
        results, rows = _of_run(config, parser) if is_run else _of_checkpoint(config, parser)
        return _show(results, rows, config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("evaluate", error)


def _of_run(config: Any, parser: "CommandParser") -> "Found":
    from clmerge.cli.open_run import open_run
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.results.results import ZERO_SHOT
    from clmerge.runs.foreign_stream import on_stream
    from clmerge.runs.session import Session

    quiet_lightning()
    run, _ = open_run(config.target, name=Path(config.target).resolve().name, allow=config.allow, merges_again=False)
    own = config.stream is None
    probes = parser.instantiate(config).probes
    names = config.models or [name for name in run.models.names if own or not run.results.model(name).needs_task]
    if own:
        predictors = {run.models.resolve(name): run.predictor(name) for name in names}
        session: Session = run
        results = run.new_results(run.name)
    else:
        stream = parser.instantiate(config).stream
        session, predictors = on_stream(run, stream, names)
        results = session.new_results(f"{run.name} on {stream.name}")
    if config.split == "val" and not session.has_validation:
        raise ValueError(f"expected validation images for --split val, got a stream without: {session.stream.name}")
    trainer = partial(run.trainers.for_evaluation, f"{run.name}: {config.split} images")
    rows = _rows(
        session, predictors, config, probes, trainer, weights=run.models.weights(run.module), base=run.models.base
    )
    for name in predictors:
        found = run.results.model(name)
        if name != ZERO_SHOT:
            results.describe(name, kind=found.kind, rule=found.rule, data=found.data)
    results.path = str(run.folder.path)
    return _filled(results, session, rows, config, probes)


def _of_checkpoint(config: Any, parser: "CommandParser") -> "Found":
    from lightning.pytorch import Trainer, seed_everything

    from clmerge.deploy.predictors import Merged
    from clmerge.evaluation.probes import WeightProbe
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.models.backbone import load_weights
    from clmerge.runs.session import Session
    from clmerge.streams import StreamDataModule
    from clmerge.training.module import ContinualClassifier

    quiet_lightning()
    seed_everything(0, workers=True, verbose=False)
    objects = parser.instantiate(config)
    facts = _facts_of(config.target)
    stream, backbone = objects.stream, objects.backbone or _recorded_backbone(parser, config.target, facts)
    module = ContinualClassifier(backbone)
    of_weights = any(isinstance(probe, WeightProbe) for probe in objects.probes)
    base = _dense(module) if of_weights and not backbone.starts_random else {}
    load_weights(backbone, config.target)
    data = StreamDataModule()
    data.setup_stream(stream, backbone.train_transform, backbone.eval_transform)
    session = Session(stream, module, data)
    module.begin_stream(len(stream.class_names), stream.class_prompts)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    name = Path(config.target).stem

    def trainer(*, gradients: bool) -> Trainer:
        shown = sys.stderr.isatty()
        return Trainer(devices=1, enable_progress_bar=shown, inference_mode=not gradients, **quiet)  # type: ignore[arg-type]

    weights = {name: partial(_dense, module)}
    rows = _rows(session, {name: Merged()}, config, objects.probes, trainer, weights=weights, base=base)
    results = session.new_results(f"{name} on {stream.name}")
    if facts is not None:
        results.describe(name, data=facts.data)
    return _filled(results, session, rows, config, objects.probes)


def _rows(
    session: "Session",
    predictors: "Mapping[str, Predictor]",
    config: Any,
    probes: "Sequence[Probe]",
    trainer: "Callable[..., Trainer]",
    *,
    weights: "Mapping[str, Callable[[], Mapping[str, Tensor]]]",
    base: "Mapping[str, Tensor]",
) -> "Rows":
    """Return accuracies, answers by class and findings of every predictor."""
    from clmerge.evaluation.probes import check_probes
    from clmerge.evaluation.probes.measuring import needs_gradient

    if probes and config.split != "test":
        raise ValueError(f"expected --split test with --probes, which look at test images, got {config.split}")
    check_probes(probes, session.stream)
    last = len(session.tasks) - 1
    return session.evaluate(
        trainer(gradients=needs_gradient(probes)),
        predictors,
        last,
        split=config.split,
        confusion=True,
        probing=session.probing(probes, last, weights=weights, base=base),
    )


def _dense(module: "ContinualClassifier") -> "dict[str, Tensor]":
    """Return copies of the weights that are merged of a classifier, by name."""
    own = dict(module.named_parameters())
    return {name: own[name].detach().cpu().clone() for name in module.trained_names}


def _facts_of(file: str) -> "ModelFacts | None":
    """Return what a checkpoint says of itself; None if it says nothing."""
    from clmerge.results.model_facts import ModelFacts
    from clmerge.weights import load_metadata

    return ModelFacts.from_metadata(load_metadata(file), file) if Path(file).suffix == ".safetensors" else None


def _recorded_backbone(parser: "CommandParser", file: str, facts: "ModelFacts | None") -> "Backbone":
    """Return the backbone that the header of a model file of a run names, built as for the run."""
    from clmerge.cli.parser import known_subclasses
    from clmerge.models import Backbone, ZeroShotHead
    from clmerge.results.model_facts import KEY
    from clmerge.shapes import brief

    option = "name the architecture with --backbone, for example --backbone OpenClip"
    if facts is None:
        raise ValueError(
            f"expected a file in model/ of a run, whose header ({KEY}) names its backbone, got {file}: {option}"
        )
    name, settings = facts.backbone.get("class"), facts.backbone.get("settings")
    own = [each for each in known_subclasses((Backbone,)) if each == name]
    if not own or not isinstance(settings, dict):
        raise ValueError(
            f"expected a backbone of clmerge with its settings in the header of {file}, got {brief(name)}"
            f"{' without settings' if own else ''}: {option}"
        )
    if facts.head != ZeroShotHead.__name__:
        raise ValueError(
            f"expected a model with a text head, got {file}, whose {brief(facts.head)} is a file of its own: evaluate "
            "the run folder, which has both"
        )
    # A checkpoint that the run began with may be gone; its weights are all replaced.
    kept = {key: value for key, value in settings.items() if not (key == "pretrained" and _is_path(value))}
    found: Backbone = parser.instantiate(
        parser.parse_object({"target": file, "backbone": {"class_path": name, "init_args": kept}})
    ).backbone
    return found


def _is_path(pretrained: object) -> bool:
    return isinstance(pretrained, str) and bool(Path(pretrained).suffix)


def _filled(results: "Results", session: "Session", rows: "Rows", config: Any, probes: "Sequence[Probe]") -> "Found":
    from clmerge.evaluation.probes.measuring import add_findings
    from clmerge.runs.foreign_stream import final_rows

    results.evaluation = config.evaluation or session.evaluation
    results.set_samples([session.num_images(task.index, config.split) for task in session.tasks])
    results.split = config.split
    found = final_rows(results, rows)
    for name, row in rows.items():
        add_findings(found, name, row.get("probes", {}), probes)
    return found, rows


def _show(results: "Results", rows: "Rows", config: Any) -> int:
    import json

    from clmerge.results.probe_table import probe_text
    from clmerge.results.results import to_document
    from clmerge.results.table import final_text
    from clmerge.weights import write_json_atomic

    document = to_document([results])
    if config.out is not None:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_json_atomic(Path(config.out) / "results.json", document)
    if config.json:
        print(json.dumps(document, indent=2))
        return 0
    print(final_text(results, rows, split=config.split))
    if found := probe_text(results):
        print(f"\n{found}")
    if config.out is not None:
        tell(f"results   {Path(config.out) / 'results.json'}", file=sys.stdout)
    return 0
