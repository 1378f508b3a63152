"""Open a finished run: its stream, its classifier and its models, from the configuration in its folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clmerge.cli.parser import CommandParser
    from clmerge.results.results import Setting
    from clmerge.runs.stored_run import StoredRun


def open_run(
    path: str,
    *,
    name: str,
    allow: Sequence[str] = (),
    evaluation: "Setting | None" = None,
    merges_again: bool = True,
) -> "tuple[StoredRun, list[Any]]":
    """Open a finished run; return it and its mergers.

    Args:
        path: The run folder.
        name: Name of the run in the results.
        allow: Packages, beside the known ones, whose code the run's configuration may name.
        evaluation: Which reading of the logits counts; default that of the run.
        merges_again: Whether task vectors are needed, to merge them again.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the run is not finished, has no task vectors, or its configuration names code of other packages.
    """
    from lightning.pytorch import seed_everything

    from clmerge.cli.fit import build_parser as build_fit_parser
    from clmerge.cli.fit import trainer_factory
    from clmerge.deploy.naming import name_mergers
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.stored_run import StoredRun
    from clmerge.streams.data_check import RECORD, DataCheck, leave_out

    folder = RunFolder.open(path, writes=False)
    if not folder.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {folder.config}, got none")
    parser = build_fit_parser()
    config = read_config(parser, folder.config, folder.manifest.options_in_force(), allow)
    seed_everything(config.seed, workers=True, verbose=False)
    objects = parser.instantiate(config)
    objects.data.seed = config.seed
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
        progress=sys.stderr.isatty(),
        merges_again=merges_again,
    )
    return run, objects.mergers


def read_config(parser: "CommandParser", file: Path, options: Sequence[str], allow: Sequence[str]) -> Any:
    """Parse a run's configuration for one process, without its loggers; import only known and allowed packages."""
    from jsonargparse import ArgumentError

    from clmerge.cli.named_code import KNOWN_PACKAGES, importing_only, refused_path

    single = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
    unwanted = ("--logging.extra=[]", "--trainer.profiler=null")  # they write to paths of their own
    parser.exit_on_error = False
    try:
        with importing_only([*KNOWN_PACKAGES, *allow]):
            return parser.parse_args(["--config", str(file), *options, *single, *unwanted])
    except ArgumentError as error:
        if (refused := refused_path(str(error))) is None:
            raise ValueError(f"expected the configuration of a run of `clmerge fit` in {file}, got: {error}") from error
        named, key = refused
        raise ValueError(
            f"expected classes of {', '.join(KNOWN_PACKAGES)} in {file}, got {named} at {key}, which was neither "
            f"imported nor run; if you trust it: --allow {named.partition('.')[0]}"
        ) from error
