"""Make a W&B report, or a saved view of a project's workspace, that lays clmerge's runs side by side.

pip install wandb-workspaces
python scripts/wandb_report.py ENTITY/PROJECT --models magmax ties expert zero_shot
python scripts/wandb_report.py ENTITY/PROJECT --models magmax ties expert zero_shot --view

Runs are grouped as W&B's groups are: one line per experiment, with a band over its seeds.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from clmerge.loggers import TASK_KEY

HEADLINES = ("average_accuracy", "forgetting", "backward_transfer", "learning_accuracy")
TRAINING = ("train/loss", "val/loss", "val/accuracy")
KEYS = ("stream", "method", "tuning", "start_policy", "backbone", "seed")


def line(title: str, names: Sequence[str], x: str = TASK_KEY) -> reports.LinePlot:
    """Return a panel with one line per metric and group of runs."""
    return reports.LinePlot(title=title, x=x, y=list(names), title_x="tasks learned" if x == TASK_KEY else x)


def sections(models: Sequence[str]) -> dict[str, list[Any]]:
    """Return the panels by section."""
    return {
        "Runs compared": [
            *(reports.BarPlot(title=name.replace("_", " "), metrics=[f"cl/{name}"]) for name in HEADLINES[:2]),
            line("average accuracy", ["cl/average_accuracy"]),
            line("forgetting", ["cl/forgetting"]),
        ],
        "Models compared": [
            line(name.replace("_", " "), [f"cl_{name}/{model}" for model in models]) for name in HEADLINES
        ],
        "Accuracy matrices": [
            reports.MediaBrowser(media_keys=[f"cl_matrix/{model}"]) for model in models if model != "zero_shot"
        ],
        "Training": [
            line(name, [name], x="trainer/global_step") for name in ("train/loss", "val/loss", "val/accuracy")
        ],
    }


def build_report(entity: str, project: str, models: Sequence[str]) -> reports.Report:
    """Return the report, not saved yet."""
    runs = reports.Runset(
        entity=entity,
        project=project,
        groupby=["Group"],
        order=[reports.OrderBy(reports.SummaryMetric("cl/average_accuracy"), ascending=False)],
    )
    blocks: list[Any] = [
        reports.P("Experiments are groups of runs that differ in their seed. " + ", ".join(KEYS) + " are config keys."),
        reports.TableOfContents(),
    ]
    for title, panels in sections(models).items():
        blocks += [reports.H1(title), reports.PanelGrid(runsets=[runs], panels=panels)]
    description = "What merging keeps of every task, by method, tuning and start policy."
    return reports.Report(
        entity=entity, project=project, title="Continual learning by merging", description=description, blocks=blocks
    )


def build_view(entity: str, project: str, models: Sequence[str]) -> workspaces.Workspace:
    """Return the saved view, not saved yet."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="clmerge",
        sections=[
            workspaces.Section(name=title, panels=panels, is_open=True) for title, panels in sections(models).items()
        ],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            order=[workspaces.Ordering(workspaces.Summary("cl/average_accuracy"), ascending=False)],
            pinned_columns=["summary:cl/average_accuracy", "summary:cl/forgetting", *(f"config:{key}" for key in KEYS)],
        ),
    )


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
