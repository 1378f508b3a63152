"""``clmerge export``: write a model of a finished run as the files that other libraries load."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmerge.cli.messages import complain
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser

EPILOG = """\
examples:
  clmerge export runs/digits --to open_clip --out exported
  clmerge export runs/digits --model TIES --to safetensors --out exported
  clmerge export runs/digits --model EMR --task 1 --to onnx --out exported
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge export``."""
    from clmerge.cli.open_run import add_model_options
    from clmerge.cli.parser import CommandFormatter, CommandParser
    from clmerge.runs.exported import Target

    parser = CommandParser(
        prog="clmerge export",
        usage="clmerge export RUN --to TARGET --out FOLDER [options]",
        description="Write a model of a finished run as the files that other libraries load, with a model card.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    to_help = (
        "safetensors: the weights; open_clip, timm: a folder that the library loads; hf-folder: the one of these two "
        "that fits; onnx: from transformed images to logits."
    )
    parser.add_argument("run", type=str, metavar="RUN", help="A finished run.")
    parser.add_argument("--to", type=Target, required=True, help=to_help)
    parser.add_argument("--out", type=str, required=True, metavar="FOLDER", help="New or empty folder to write to.")
    add_model_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge export``; return the exit code."""
    config = build_parser().parse_args(list(argv))
    try:
        return _export(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("export", error)


def _export(config: Any) -> int:
    for file in exported(config, config.to, Path(config.out)):
        tell(f"wrote     {file}", file=sys.stdout)
    return 0


def exported(config: Any, target: Any, folder: Path, *, repo: str | None = None) -> list[Path]:
    """Write a model and its card; return the files.

    Args:
        config: The command's ``run``, ``model``, ``task`` and ``allow``.
        target: What to write.
        folder: Where.
        repo: Where it will be on the hub, for the card.
    """
    from clmerge.cli.open_run import open_final_model
    from clmerge.lightning_compat import quiet_lightning
    from clmerge.runs.exported import export, require_empty
    from clmerge.runs.model_card import model_card
    from clmerge.weights import write_text_atomic

    quiet_lightning()
    require_empty(folder)
    model, results = open_final_model(config.run, model=config.model, task=config.task, allow=config.allow)
    try:
        card = model_card(model, results, export(model, target, folder), repo=repo)
        write_text_atomic(folder / "README.md", card)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half of a model is of no use, and it was empty before
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())
