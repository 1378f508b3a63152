"""Draw accuracy against the bytes that a method keeps between tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from rows import READINGS, SEEN, STREAMS, Row

COLOURS = {
    "looked at no images beside the training": "#0f766e",
    "at validation images, or the task's own once more": "#b45309",
    "at kept images, or all data": "#7c3aed",
}
NAMED = 7  # best models of a panel that get their names
GAP = 0.05  # of the axes, from name to name


def kind_of(row: Row) -> str:
    """Return what a row looked at beside the training of each task."""
    kept = row.label in SEEN or "buffer" in row.data
    return list(COLOURS)[2 if kept else row.data != "none"]


def draw(table: Mapping[tuple[str, str, str], Row], file: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(STREAMS), figsize=(13, 4.6), layout="constrained", dpi=130)
    for axes, (stream, name) in zip(panels, STREAMS.items(), strict=True):
        found = [row for (one, _, change), row in table.items() if one == stream and not change and row.values()]
        placed = sorted(
            ((statistics.mean(row.values().values()), row) for row in found), key=lambda one: one[0], reverse=True
        )
        for kind, colour in COLOURS.items():
            dots = [(bytes_of(row), 100 * value) for value, row in placed if kind_of(row) == kind]
            axes.scatter(*zip(*dots, strict=True) if dots else ([], []), s=22, color=colour, alpha=0.75, label=kind)
        low, high = axes.get_ylim()
        place = 1.0
        for value, row in placed[:NAMED]:
            place = min(place - GAP, (100 * value - low) / (high - low))
            axes.annotate(
                row.label.removeprefix("full, base: "),
                (bytes_of(row), 100 * value),
                xytext=(1.03, place),
                textcoords="axes fraction",
                fontsize=7,
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#888888", "relpos": (0, 0.5)},
                va="center",
                annotation_clip=False,
            )
        axes.set_ylim(low, high)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_ylabel(f"accuracy in %, {READINGS[found[0].evaluation]}", fontsize=8)
        axes.set_xlabel("MB kept between tasks", fontsize=8)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.2, 100)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    keys = panels[0].get_legend_handles_labels()
    figure.legend(*keys, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)


def bytes_of(row: Row) -> float:
    """Return the megabytes that a row keeps."""
    return statistics.mean(one["bytes"] or 0 for one in row.by_seed.values()) / 1e6
