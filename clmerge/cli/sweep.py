"""``clmerge sweep``: the runs of several seeds and settings, each in its own folder, some at a time."""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clmerge.cli.messages import complain
from clmerge.names import file_name, tell

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.runs.launching import Job, Launcher

EPILOG = """\
examples:
  clmerge sweep --config configs/quickstart.yaml --seeds 0 1 2 --out runs/seeds
  clmerge sweep --config configs/quickstart.yaml --grid learner.start_policy=previous,base --out runs/starts
  clmerge sweep --config configs/quickstart.yaml --seeds 0 1 --launcher=local --launcher.jobs=2 --out runs/both
"""
_OWN = ("seeds", "grid", "out", "launcher")
_OF_A_RUN = ("run_dir", "resume", "auto_resume", "auto-resume", "seed", "seeds")


def build_parser() -> "CommandParser":
    """Return the parser of the options that ``clmerge fit`` lacks."""
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses
    from clmerge.runs.launching import Launcher

    CommandParser.class_names = known_subclasses((Launcher,))
    parser = CommandParser(
        prog="clmerge sweep",
        usage="clmerge sweep --config FILE [--seeds 0 1 ...] [--grid NAME=A,B ...] [options of clmerge fit]",
        description="Run clmerge fit for all combinations of seeds and settings, each in a folder of its own. The same "
        "command again continues what is not complete. All other options are those of clmerge fit.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=list[int], default=[0], help="Seeds of the runs.")
    grid_help = "An option of clmerge fit and its values, separated by commas; may be repeated."
    parser.add_argument("--grid", type=list[str], default=[], help=grid_help)
    parser.add_argument(
        "--out", type=str | None, default=None, help="Folder of the runs (default: runs/NAME-TIMESTAMP)."
    )
    launcher_help = "What the runs are started by: local (processes of this machine, the default), or ray."
    parser.add_subclass_arguments(Launcher, "launcher", required=False, help=launcher_help)
    return parser


def split_sweep(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of the sweep from those of its runs.

    Args:
        words: The command line, lists as one word.

    Example:
        >>> split_sweep(["--config", "a.yaml", "--seeds=[0, 1]", "--grid", "seed=1,2", "--launcher.jobs=2"])
        (['--seeds=[0, 1]', '--grid=seed=1,2', '--launcher.jobs=2'], ['--config', 'a.yaml'])
    """
    own: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, given, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.split(".")[0].removesuffix("+") not in _OWN:
            others.append(word)
        else:
            own.append(word if given else f"{word}={next(rest, '')}")
    return own, others


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge sweep``; return the exit code."""
    from clmerge.cli.launch import build_launcher

    own, others = split_sweep(argv)
    grids = [word.partition("=")[2] for word in own if word.startswith("--grid=")]
    parser = build_parser()
    config = parser.parse_args([word for word in own if not word.startswith("--grid=")])
    if taken := [word for word in others if word.removeprefix("--").partition("=")[0] in _OF_A_RUN]:
        parser.error(f"expected --seeds and --out in place of {taken[0]}, which belongs to one run")
    try:
        return run_all(others, config.seeds, read_grids(grids), config.out, build_launcher(config.launcher))
    except (ValueError, OSError, RuntimeError) as error:
        return complain("sweep", error)


def out_for_run_dir(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--run_dir`` as ``--out``, the folder of several runs.

    Example:
        >>> out_for_run_dir(["--run_dir", "runs/a", "--seeds=[0, 1]"])
        ['--out', 'runs/a', '--seeds=[0, 1]']
    """
    return [word.replace("--run_dir", "--out", 1) if word.partition("=")[0] == "--run_dir" else word for word in argv]


def read_grids(grids: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of every option.

    Raises:
        ValueError: If an option has no values, or is named twice.

    Example:
        >>> read_grids(["learner.start_policy=base,previous"])
        {'learner.start_policy': ['base', 'previous']}
    """
    found: dict[str, list[str]] = {}
    for grid in grids:
        name, _, values = grid.removeprefix("--").partition("=")
        if not name or not values or name in found:
            raise ValueError(f"expected --grid NAME=A,B once for every option of clmerge fit, got {grid!r}")
        found[name] = [value.strip() for value in values.split(",")]
    return found


def run_all(
    words: Sequence[str],
    seeds: Sequence[int],
    grids: Mapping[str, Sequence[str]],
    out: str | None,
    launcher: "Launcher | None",
) -> int:
    """Run all combinations of seeds and settings; return the exit code.

    Args:
        words: The command line of ``clmerge fit`` that they share.
        seeds: Their seeds.
        grids: Values of options.
        out: Folder of the runs.
        launcher: Starts the runs; default one after the other.

    Raises:
        ValueError: If a setting is wrong; nothing is trained then.
    """
    from clmerge.cli.fit import build_parser as build_fit_parser
    from clmerge.runs.launching import LocalLauncher

    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"expected seeds that differ, got {[*seeds]}")
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    parser = build_fit_parser()
    for settings in combinations:  # a wrong one ends the command here
        config = parser.parse_args([*words, *(f"--{name}={value}" for name, value in settings.items())])
    folder = Path(out or f"runs/{file_name(config.name)}-{time.strftime('%Y%m%d-%H%M%S')}")
    jobs = [_job(folder, words, settings, seed) for settings in combinations for seed in seeds]
    if len({job.commit for job in jobs}) < len(jobs):
        raise ValueError(f"expected values that name different folders, got {dict(grids)}")
    launcher = launcher or LocalLauncher(jobs=1)
    left = [job for job in jobs if not job.done]
    tell(f"running {len(left)} of {len(jobs)} runs by {type(launcher).__name__}, in {folder}")
    failures = []
    for number, (job, code) in enumerate(launcher.run(left), start=1):
        if code:
            failures.append(job.failure(code))
        tell(f"{'failed' if code else 'finished'} {job.name}: {number} of {len(left)}")
    for failure in failures:
        tell(f"clmerge sweep: {failure}")
    if failures:
        tell(f"clmerge sweep: {len(failures)} of {len(jobs)} runs failed; the same command with --out {folder} goes on")
        return 1
    runs = " ".join(str(Path(job.commit).parent) for job in jobs)
    tell(f"report    clmerge report {runs} --out {folder}/report.html", file=sys.stdout)
    return 0


def _job(folder: Path, words: Sequence[str], settings: Mapping[str, str], seed: int) -> "Job":
    from clmerge.runs.launching import RunJob
    from clmerge.weights.checksums import MANIFEST

    short = [f"{name.rpartition('.')[2]}-{value}" for name, value in settings.items()]
    name = file_name("_".join([*short, f"seed{seed}"]))
    given = [*(f"--{option}={value}" for option, value in settings.items()), f"--seed={seed}"]
    run = (folder / name).resolve()
    command = (sys.executable, "-m", "clmerge", "fit", *words, *given, f"--run_dir={folder / name}", "--auto_resume")
    return RunJob(name, command, log=f"{run}.log", commit=str(run / MANIFEST), folder=str(Path.cwd()))
