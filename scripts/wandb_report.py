"""Make a W&B report, or a saved view of a project's workspace, that lays clmerge's runs side by side.

pip install wandb-workspaces
python scripts/wandb_report.py ENTITY/PROJECT --models magmax ties expert zero_shot
python scripts/wandb_report.py ENTITY/PROJECT --models magmax ties expert zero_shot --view

Runs of ``clmerge fit`` are grouped as W&B's groups are: one line per experiment, with a band over its seeds.
Comparisons, which are in the groups of their runs, are left out: they would count twice.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from clmerge.loggers import TASK_KEY

HEADLINES = ("average_accuracy", "forgetting", "backward_transfer", "learning_accuracy")
TRAINING = ("train/loss", "val/loss", "val/accuracy")
STEP = "trainer/global_step"
KEYS = ("stream", "method", "tuning", "start_policy", "backbone", "seed")  # of the configuration
COLUMNS = ("cl/average_accuracy", "cl/forgetting", "cl/deployed", "cl/evaluation")  # of the summary
SORTED_BY = "cl/average_accuracy"
FITS = "JobType = 'fit'"


def sections(models: Sequence[str]) -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return the panels by section: their kind (``bar``, ``lines``, ``curves`` or ``pictures``), title and metrics.

    Args:
        models: Names of models in ``results.json``.
    """
    moving = [model for model in models if model != "zero_shot"]
    return {
        "Runs compared": [
            *(("bar", _title(name), [f"cl/{name}"]) for name in HEADLINES[:2]),
            *(("lines", _title(name), [f"cl/{name}"]) for name in HEADLINES[:2]),
        ],
        "Models compared": [("lines", _title(name), [f"cl_{name}/{model}" for model in models]) for name in HEADLINES],
        "Accuracy matrices": [("pictures", model, [f"cl_matrix/{model}"]) for model in moving],
        "Confused classes": [("pictures", model, [f"cl_confusion/{model}"]) for model in moving],
        "Training": [("curves", name, [name]) for name in TRAINING],
    }


def build_report(entity: str, project: str, models: Sequence[str]) -> Any:
    """Return the report, not saved yet."""
    import wandb_workspaces.reports.v2 as reports

    runs = reports.Runset(
        entity=entity,
        project=project,
        filters=FITS,
        groupby=["Group"],
        order=[reports.OrderBy(reports.SummaryMetric(SORTED_BY), ascending=False)],
    )
    blocks: list[Any] = [
        reports.P("Experiments are groups of runs that differ in their seed. " + ", ".join(KEYS) + " are config keys."),
        reports.TableOfContents(),
    ]
    for title, panels in sections(models).items():
        grid = reports.PanelGrid(runsets=[runs], panels=[panel(*each) for each in panels])
        blocks += [reports.H1(title), grid]
    description = "What merging keeps of every task, by method, tuning and start policy."
    return reports.Report(
        entity=entity, project=project, title="Continual learning by merging", description=description, blocks=blocks
    )


def build_view(entity: str, project: str, models: Sequence[str]) -> Any:
    """Return the saved view, not saved yet."""
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="clmerge",
        sections=[
            workspaces.Section(name=title, panels=[panel(*each) for each in panels], is_open=True)
            for title, panels in sections(models).items()
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=FITS,
            groupby=[workspaces.Metric("Group")],
            order=[workspaces.Ordering(workspaces.Summary(SORTED_BY), ascending=False)],
            pinned_columns=[*(f"summary:{name}" for name in COLUMNS), *(f"config:{key}" for key in KEYS)],
        ),
    )


def panel(kind: str, title: str, metrics: list[str]) -> Any:
    """Return one panel of W&B."""
    import wandb_workspaces.reports.v2 as reports

    if kind == "bar":
        return reports.BarPlot(title=title, metrics=list(metrics))
    if kind == "pictures":
        return reports.MediaBrowser(title=title, media_keys=list(metrics))
    on_tasks = kind == "lines"
    x = TASK_KEY if on_tasks else STEP
    return reports.LinePlot(title=title, x=x, y=list(metrics), title_x="tasks learned" if on_tasks else x)


def _title(name: str) -> str:
    return name.replace("_", " ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", help="ENTITY/PROJECT")
    parser.add_argument("--models", nargs="+", required=True, help="mergers, expert, zero_shot: names in results.json")
    parser.add_argument("--view", action="store_true", help="a saved view of the workspace instead of a report")
    options = parser.parse_args(arguments)
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project):
        parser.error(f"expected ENTITY/PROJECT, got {options.project!r}")
    made = (build_view if options.view else build_report)(entity, project, options.models)
    print(made.save().url)


if __name__ == "__main__":
    main()
