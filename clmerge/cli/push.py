"""``clmerge push``: put a model of a finished run on Hugging Face's hub, with its card."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import clmerge
from clmerge.cli.messages import complain
from clmerge.names import shown, tell, visible

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser

EPILOG = """\
examples:
  clmerge push runs/digits --repo USER/NAME --dry-run
  clmerge push runs/digits --model TIES --repo USER/NAME
"""
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge push``."""
    from clmerge.cli.open_run import add_model_options
    from clmerge.cli.parser import CommandFormatter, CommandParser
    from clmerge.runs.exported import Target

    parser = CommandParser(
        prog="clmerge push",
        usage="clmerge push RUN --repo USER/NAME [--dry-run] [options]",
        description="Write a model of a finished run as clmerge export does, and put the files into a repository on "
        "Hugging Face's hub, which is made if there is none.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    to_help = "What is written, as for clmerge export (default: the folder that the backbone's library loads)."
    dry_help = "Show the card and the files; nothing is sent."
    parser.add_argument("run", type=str, metavar="RUN", help="A finished run.")
    parser.add_argument("--repo", type=str, required=True, metavar="USER/NAME", help="The repository.")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help=dry_help)
    parser.add_argument("--to", type=Target, default="hf-folder", help=to_help)
    add_model_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge push``; return the exit code."""
    config = build_parser().parse_args(list(argv))
    try:
        return _push(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("push", error)


def _push(config: Any) -> int:
    from clmerge.cli.export import exported

    if not _REPO.fullmatch(config.repo) or ".." in config.repo or "--" in config.repo:
        raise ValueError(f"expected --repo USER/NAME in letters, digits, '-', '_' and '.', got {config.repo}")
    with TemporaryDirectory(prefix="clmerge-") as place:
        folder = Path(place) / "model"
        files = exported(config, config.to, folder, repo=config.repo)
        if config.dry_run:
            print(visible((folder / "README.md").read_text(encoding="utf-8"), keep="\n"))
        for file in files:
            size = file.stat().st_size
            tell(f"{size:>13,} bytes  {shown(str(file.relative_to(folder)))}", file=sys.stdout)
        if config.dry_run:
            tell(f"nothing was sent to {config.repo}", file=sys.stdout)
            return 0
        tell(f"pushed    {_upload(config.repo, folder, config.run)}", file=sys.stdout)
    return 0


def _upload(repo: str, folder: Path, run: str) -> str:
    """Send a folder to the hub in one commit; return its address."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="clmerge", library_version=clmerge.__version__)
    message = f"Model of {Path(run).resolve().name}, written by clmerge {clmerge.__version__}"
    try:
        api.create_repo(repo, exist_ok=True)
        sent = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of the network and of the hub; their classes share no base
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RuntimeError(
            f"expected the hub to take {repo}, got: {reason}; `hf auth login` stores a token that may write"
        ) from error
    return str(getattr(sent, "commit_url", sent))
