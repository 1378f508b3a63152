"""``clmerge rebase``: carry a run over to a new base model."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.learner import Learner

EPILOG = """\
examples:
  clmerge rebase runs/digits --backbone OpenClip --backbone.pretrained newer.safetensors --transport auto --out runs/new
  clmerge rebase runs/digits --backbone OpenClip --backbone.pretrained newer.safetensors --transport Permuted \\
      --out runs/new --oracle runs/trained-on-newer
  clmerge fit --resume runs/new      go on with the tasks that runs/digits had not trained
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge rebase``; imports the modules of all its types."""
    from clmerge.alignment import Aligner, Transport
    from clmerge.cli.named_code import set_policy
    from clmerge.cli.open_run import ALLOW_HELP
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses
    from clmerge.models import Backbone

    set_policy()
    CommandParser.class_names = known_subclasses((Backbone, Transport, Aligner))
    parser = CommandParser(
        prog="clmerge rebase",
        usage="clmerge rebase RUN --backbone CLASS [--backbone.…] --transport CLASS|auto --out RUN2 [options]",
        description="Carry a run over to a new base model: transport the task vectors of its bank one at a time, merge "
        "them again, evaluate, and write a run that fit --resume, compare and report read.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    backbone_help = "The new base model; all else is as in the run."
    transport_help = (
        "How task vectors reach the new base: Identity, Permuted, GradientSignMask, Procrustes, or auto, which chooses "
        "by the barrier between the bases."
    )
    oracle_help = "A run of the same stream that was trained from the new base, for the transfer ratio."
    few_help = "Images per class of the fine-tuning that is shown beside (0: none)."
    parser.add_argument("run", type=str, metavar="RUN", help="A run with a bank of task vectors, finished or not.")
    parser.add_subclass_arguments(Backbone, "backbone", required=True, help=backbone_help)
    parser.add_subclass_arguments(Transport, "transport", required=True, help=transport_help)
    parser.add_argument("--out", type=str, required=True, help="Folder of the new run; new or empty.")
    parser.add_argument("--oracle", type=str | None, default=None, metavar="RUN", help=oracle_help)
    parser.add_argument("--few_shot", type=int, default=2, help=few_help)
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=ALLOW_HELP)
    parser.add_argument("--json", action="store_true", help="Print the table as JSON.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge rebase``; return the exit code."""
    from clmerge.runs.rebase import run_path

    parser = build_parser()
    config = parser.parse_args(list(argv))
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return complain("rebase", FileExistsError(f"expected a new or empty folder for --out, got {out}"))
    try:
        document = _rebase(config, parser, out, run_path(out))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("rebase", error)
    _show(document, config)
    return 0


def _rebase(config: Any, parser: "CommandParser", out: Path, work: Path) -> dict[str, Any]:
    import shutil

    from clmerge.cli.fit import trainer_factory
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.rebase import OldRun, Rebase
    from clmerge.streams.data_check import RECORD, DataCheck, leave_out

    quiet_lightning()
    transport = parser.instantiate(config).transport
    folder = RunFolder.open(config.run, writes=False)
    old = OldRun(folder, _learner(folder, config.allow, None)[0].module)
    learner, run_config, text = _learner(folder, config.allow, config.backbone.as_dict())
    if check := DataCheck.load(folder.path / RECORD):
        leave_out(learner.stream, check)
    oracle = None if config.oracle is None else _oracle(config.oracle, learner, old.num_tasks)
    rebase = Rebase(old, transport, few_shot=config.few_shot)
    if work.parent.exists():  # what a killed rebase left: a new run is whole, or is not there
        shutil.rmtree(work.parent)
    try:
        run = RunFolder.create(work, config=text)
        if check:
            check.save(run.path / RECORD)
        learner.fit(run, trainer=trainer_factory(run_config), training=rebase.training, until=old.num_tasks)
        document = rebase.save(run, oracle)
        run.close()  # its lock is on the folder that is renamed
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)
    return document


def _learner(folder: "RunFolder", allow: Sequence[str], backbone: Any) -> "tuple[Learner, Any, str]":
    """Return the learner of a run's configuration, with another backbone if given; the configuration, also as text."""
    from lightning.pytorch import seed_everything

    from clmerge.cli.fit import build_parser as build_fit_parser
    from clmerge.cli.fit import config_text
    from clmerge.cli.open_run import read_config
    from clmerge.runs.learner import Learner

    if not folder.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {folder.config}, got none")
    parser = build_fit_parser()
    options = [*folder.manifest.options_in_force()]
    if backbone is not None:
        options.append(f"--model.backbone={json.dumps(backbone)}")
    text = config_text(parser, read_config(parser, folder.config, options, allow, as_written=True))
    config = read_config(parser, folder.config, options, allow)
    seed_everything(config.seed, workers=True, verbose=False)
    objects = parser.instantiate(config)
    objects.data.seed = config.seed
    parts = (objects.stream, objects.model, objects.mergers, objects.data)
    return Learner(*parts, seed=config.seed, **vars(objects.learner)), config, text


def _oracle(path: str, learner: "Learner", num_tasks: int) -> list[float]:
    """Return the accuracy of another run's experts, each on its own task."""
    from clmerge.results.results import EXPERT, Results
    from clmerge.results.run_folder import RunFolder

    found = Results.from_dict(RunFolder.open(path, writes=False).manifest.results)
    names = [task.name for task in learner.tasks]
    if found.tasks != names or found.num_finished < num_tasks:
        raise ValueError(
            f"expected a run of the same stream ({names}) with {num_tasks} evaluated tasks for --oracle, got "
            f"{path} with {found.num_finished} of {found.tasks}"
        )
    return [float(value) for value in found.matrix(EXPERT, learner.evaluation).diagonal()[:num_tasks]]


def _show(document: dict[str, Any], config: Any) -> None:
    if config.json:
        print(json.dumps(document, indent=2))
        return
    rows = document["rows"]
    ratio = any("transfer_ratio" in row for row in rows.values())
    width = max(len(name) for name in rows)
    print(
        f"{'':<{width}}  "
        + " ".join(f"task {task + 1:<3}" for task in range(len(rows["transported"]["accuracies"])))
        + "  mean"
        + "  ratio" * ratio
    )
    for name, row in rows.items():
        cells = " ".join(f"{100 * value:8.2f}" for value in row["accuracies"])
        share = row.get("transfer_ratio")
        print(
            f"{name:<{width}}  {cells} {100 * row['mean']:5.2f}"
            + ("" if not ratio else f"  {'-' if share is None else f'{share:.2f}'}")
        )
    chosen = f" chose {document['chosen']}" if document["chosen"] != document["transport"] else ""
    tell(
        f"transport {document['transport']}{chosen}, reads {document['data']}; {document['why']}".rstrip("; "),
        file=sys.stdout,
    )
    tell(f"run       {config.out}", file=sys.stdout)
