"""``clmerge report``: write the results of finished runs as one page, or as a table for a paper."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clmerge.cli.messages import complain
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser

EPILOG = """\
examples:
  clmerge report runs/quickstart --out report.html
  clmerge report runs/seed0 runs/seed1 runs/seed2 --out report.html     # mean and standard deviation over seeds
  clmerge report runs/quickstart --out report.html --watch              # while it goes on, for a browser beside it
  clmerge report runs/quickstart --format latex --out table.tex
  clmerge report runs/quickstart --format md                            # to the terminal
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge report``."""
    from clmerge.cli.parser import CommandFormatter, CommandParser
    from clmerge.streams.plan import Evaluation

    parser = CommandParser(
        prog="clmerge report",
        usage="clmerge report RUN [RUN ...] --out report.html [options]",
        description="Show on one page which merger is best and why, with every figure also as PNG and CSV beside it.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    runs_help = (
        "Folders of clmerge fit or clmerge compare, over streams of the same length. Runs that differ in nothing but "
        "seed, name and mergers are taken as repetitions."
    )
    out_help = "The page (.html), with its figures in the folder NAME_figures beside it; or the file of the table."
    evaluation_help = "What is shown first: task_agnostic accuracy, or task_aware (default: as the first run does)."
    format_help = "A page, or the table in Markdown or LaTeX (booktabs), printed if there is no --out."
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help=runs_help)
    parser.add_argument("--out", type=str | None, default=None, help=out_help)
    parser.add_argument("--format", type=Literal["html", "md", "latex"], default="html", help=format_help)
    parser.add_argument("--evaluation", type=Evaluation | None, default=None, help=evaluation_help)
    watch_help = "Write the page anew after every evaluated task until the runs are complete; it reloads itself."
    parser.add_argument("--watch", action="store_true", help=watch_help)
    parser.add_argument(
        "--title", type=str | None, default=None, help="Heading of the page (default: the runs' names)."
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge report``; return the exit code."""
    parser = build_parser()
    config = parser.parse_args(list(argv))
    if config.format == "html" and (config.out is None or Path(config.out).suffix.lower() not in (".html", ".htm")):
        parser.error(f"expected --out with the name of a page, for example --out report.html, got {config.out}")
    if config.format != "html" and config.title is not None:
        parser.error(f"expected --title with a page, got it with --format {config.format}")
    if config.watch and config.format != "html":
        parser.error(f"expected --watch with a page, got it with --format {config.format}")
    try:
        if config.watch:
            from clmerge.cli.watch import watch

            watch(config.runs, config.out, evaluation=config.evaluation, title=config.title)
            return 0
        return _report(config)
    except (ValueError, OSError) as error:
        return complain("report", error)


def _report(config: Any) -> int:
    from clmerge.report import paper_table, read_study, write_report
    from clmerge.weights import write_text_atomic

    study = read_study(config.runs, evaluation=config.evaluation)
    for run in config.runs:
        if (Path(run) / "compare" / "results.json").is_file() and str(Path(run) / "compare") not in config.runs:
            tell(f"clmerge report: {run}/compare holds a comparison: name it as well to see it")
    for note in study.notes:
        tell(f"clmerge report: {note}")
    if config.format == "html":
        files = write_report(study, config.out, title=config.title)
        tell(f"page      {files[-1]}", file=sys.stdout)
        tell(f"figures   {files[0].parent}", file=sys.stdout)
        return 0
    text = "\n".join(paper_table(study, setting, config.format) for setting in study.settings)
    if config.out is None:
        print(text, end="")
    else:
        write_text_atomic(config.out, text)
        tell(f"table     {config.out}", file=sys.stdout)
    return 0
