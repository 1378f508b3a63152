"""The options of a run's loggers, and the loggers that they ask for."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from clmerge.loggers import RunFacts
    from clmerge.results.run_folder import RunFolder


@dataclass
class Logging:
    """Options of the loggers of a run.

    Args:
        csv: Write the curves as CSV under ``logs/csv``.
        wandb: Log to W&B; offline, to be synchronised later, unless ``online`` or an API key says otherwise.
        project: W&B project.
        group: W&B group, for runs that are compared. Default: name, method, tuning and start policy, so that a group
            holds the seeds of one experiment.
        tags: W&B tags, beside those of scenario, tuning, start policy and mergers.
        online: Insist on W&B's server.
        artifacts: Give W&B base, task vectors and merged models as artifacts, with their lineage.
        extra: Any other Lightning loggers, for example ``TensorBoardLogger``; they write to ``logs`` in the run folder
            unless their ``save_dir`` says otherwise.
    """

    csv: bool = True
    wandb: bool = True
    project: str = "clmerge"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    online: bool = False
    artifacts: bool = False
    extra: "list[Logger]" = field(default_factory=list)


def build_loggers(options: Logging, extra: list[Any], facts: "RunFacts", run: "RunFolder") -> "list[Logger]":
    """Build the loggers of a run.

    Args:
        options: The options; ``extra`` of them is not used.
        extra: The configurations of other loggers, as parsed.
        facts: What the loggers are told of the run.
        run: The run folder.
    """
    from lightning.pytorch.loggers import CSVLogger

    from clmerge.loggers import build_wandb_logger, log_facts

    loggers: list[Logger] = []
    if options.csv:
        loggers.append(CSVLogger(run.logs, name="csv"))
    if options.wandb:
        logger = build_wandb_logger(
            run.logs,
            project=options.project,
            name=facts.name,
            group=options.group or facts.group,
            tags=list(dict.fromkeys([*options.tags, *facts.tags])),
            run_id=run.manifest.wandb_id,
            job_type="fit",
            config={**facts.settings, "run_dir": str(run.path)},
            online=options.online,
        )
        if run.writes:
            run.manifest.wandb_id = logger.experiment.id
            run.commit()
        loggers.append(logger)
    loggers += _others(extra, run)
    log_facts(loggers, facts)
    return loggers


def _others(extra: list[Any], run: "RunFolder") -> "list[Logger]":
    from lightning.pytorch.loggers import Logger

    from clmerge.cli.parser import CommandParser

    for logger in extra:
        given = logger.get("init_args")
        if given is not None and "save_dir" in given and given["save_dir"] is None:
            given["save_dir"] = str(run.logs)
    parser = CommandParser(exit_on_error=False)
    parser.add_argument("--extra", type=list[Logger])
    found: list[Logger] = parser.instantiate(parser.parse_object({"extra": extra})).extra
    return found
