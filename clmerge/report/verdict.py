"""State which merger is best and why, in sentences that use only numbers of the table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clmerge.figures.numbers import percent, plural, points, show
from clmerge.report.evidence import not_compared
from clmerge.report.study import EXPERT, ZERO_SHOT, Entry, Spread, Study
from clmerge.results.results import Setting
from clmerge.results.table import told_note


@dataclass(frozen=True)
class Tile:
    """One figure of the best merger, beside the other mergers'."""

    title: str
    value: str
    deviation: str
    unit: str
    note: str
    all_values: Sequence[float]
    best_value: float


@dataclass(frozen=True)
class Verdict:
    """The answer to "which merger should I use?".

    Attributes:
        best: The merger with the highest average accuracy; None if none is defined.
        tiles: Its figures.
        reasons: Sentences on why it is best.
        caution: Sentences on how reliable that is.
    """

    best: Entry | None
    tiles: Sequence[Tile] = ()
    reasons: Sequence[str] = ()
    caution: Sequence[str] = ()


def judge(study: Study, setting: Setting) -> Verdict:
    """Find the best merger, by average accuracy after the last task, with reasons and cautions."""
    ranking = study.ranking(setting)
    if not ranking:
        why = ["No merger has a defined average accuracy: there is nothing to compare.", *_told(study)]
        return Verdict(None, caution=why)
    best = ranking[0]
    return Verdict(
        best,
        list(_tiles(study, setting, ranking)),
        list(_reasons(study, setting, ranking)),
        list(_caution(study, setting, ranking)),
    )


def sampling_error(entry: Entry, other: Entry, samples: Sequence[int], setting: Setting) -> float:
    """Return the standard error of the difference of two average accuracies that comes from finite test sets.

    ``sqrt(sum_j (p_j (1 - p_j) + q_j (1 - q_j)) / n_j) / t`` with the accuracies p and q on task j and its n_j test
    images: binomial variances, as if the two were tested on different images. They are tested on the same images, so
    the true error is usually smaller.
    """
    num_tasks = len(entry.series("average_accuracy", setting))
    total = 0.0
    for model in (entry, other):
        for spread, count in zip(model.last_row(setting)[:num_tasks], samples, strict=False):
            total += spread.mean * (1 - spread.mean) / count if count else math.nan
    return math.sqrt(total) / num_tasks


def _tiles(study: Study, setting: Setting, ranking: Sequence[Entry]) -> Iterable[Tile]:
    best = ranking[0]

    def tile(title: str, found: dict[str, Spread], unit: str, note: str) -> Tile:
        spread = found[best.name]
        value, deviation = percent(spread.mean), "" if math.isnan(spread.std) else percent(spread.std)
        return Tile(title, value, deviation, unit, note, [found[e.name].mean for e in ranking], spread.mean)

    average = {entry.name: entry.figure("average_accuracy", setting) for entry in ranking}
    yield tile("Average accuracy", average, "%", f"highest of {plural(len(ranking), 'merger')}")
    forgetting = {entry.name: entry.figure("forgetting", setting) for entry in ranking}
    yield tile("Forgetting", forgetting, "points", _rank_low(best, forgetting))
    gap = {entry.name: entry.figure("gap_to_experts", setting) for entry in ranking}
    yield tile("Gap to the experts", gap, "points", "each expert on its own task")
    kept = {entry.name: _last(entry.bytes_kept()) for entry in ranking}
    first, last = _first(best.bytes_kept()), kept[best.name]
    note = "not known for these runs"
    if last.is_defined:
        same = first.mean == last.mean
        note = "whatever the number of tasks" if same else f"grows: {show(first.mean, 'bytes')} after task 1"
    value, _, unit = show(last.mean, "bytes").partition(" ")
    yield Tile("Kept between tasks", value, "", unit, note, [kept[e.name].mean for e in ranking], last.mean)


def _reasons(study: Study, setting: Setting, ranking: Sequence[Entry]) -> Iterable[str]:
    best = ranking[0]
    average = best.figure("average_accuracy", setting)
    done = study.num_finished
    yield (
        f"After {plural(done, 'task')}, {best.name} classifies {_shown(average)} of the {study.images} right, "
        f"averaged over the tasks."
    )
    if len(ranking) > 1:
        second = ranking[1]
        lead = average.mean - second.figure("average_accuracy", setting).mean
        yield f"That is {_lead(lead)} the runner-up, {second.name}{_where(study, best, second, setting)}."
    yield from _against_references(study, best, setting)
    yield from _forgetting(setting, ranking)


def _against_references(study: Study, best: Entry, setting: Setting) -> Iterable[str]:
    in_sequence = all(run.section("learner").get("start_policy") == "previous" for run in best.runs)
    unmerged = "fine-tuning one task after another" if in_sequence else "the model fine-tuned last"
    ends: dict[str, Spread] = {}
    for model, what in ((EXPERT, unmerged), (ZERO_SHOT, "the zero-shot model")):
        entry = study.reference(best, model)
        if entry is not None and entry.figure("average_accuracy", setting).is_defined:
            ends[what] = entry.figure("average_accuracy", setting)
    if ends:
        shown = " and ".join(f"{what} at {_shown(spread)}" for what, spread in ends.items())
        yield f"Without merging, {shown.replace(' at ', ' ends at ', 1)}."
    average = best.figure("average_accuracy", setting).mean
    if better := [what for what, spread in ends.items() if spread.mean > average]:
        yield f"So no merger does better than {' or '.join(better)}."


def _forgetting(setting: Setting, ranking: Sequence[Entry]) -> Iterable[str]:
    best = ranking[0]
    lost = best.figure("forgetting", setting).mean
    if math.isnan(lost):
        return
    least = min(ranking, key=lambda entry: _or_inf(entry.figure("forgetting", setting).mean))
    other = f"; the least forgetful is {least.name} with {points(least.figure('forgetting', setting).mean)}"
    what = f"forgotten {points(lost)} points of what it knew"
    if lost < 0:
        what = f"forgotten nothing on average: its tasks are {points(-lost)} points above the best they were before"
    yield f"It has {what}{'' if least is best else other}."


def _caution(study: Study, setting: Setting, ranking: Sequence[Entry]) -> Iterable[str]:
    best = ranking[0]
    seeds = sorted({run.results.seed for run in best.runs if run.results.seed is not None})
    named = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if seeds else ""
    if len(best.runs) == 1:
        yield f"One run{named}: how much another seed would change is not known."
    else:
        wins = _wins(best, ranking[1], setting) if len(ranking) > 1 else None
        won = f"; {best.name} beats {ranking[1].name} in {wins} of {len(best.runs)}" if wins is not None else ""
        yield f"Mean of {plural(len(best.runs), 'run')}{named}, ± is their standard deviation{won}."
    samples = study.samples
    if samples and len(ranking) > 1:
        tested = samples[: study.num_finished]
        errors = {entry.name: 1.96 * sampling_error(best, entry, tested, setting) for entry in ranking[1:]}
        average = best.figure("average_accuracy", setting).mean
        close = [e for e in ranking[1:] if average - e.figure("average_accuracy", setting).mean < errors[e.name]]
        if close:
            names = ", ".join(entry.name for entry in close)
            largest = points(max(errors[entry.name] for entry in close))
            yield (
                f"With {sum(tested)} {study.images}, differences up to about {largest} points can be chance: "
                f"{names} may be as good."
            )
        else:
            yield f"Its lead is larger than what {sum(tested)} {study.images} leave to chance."
    if len(ranking) > 1 and study.images == "test images":
        yield "Which one is best was read off the test images: choose by validation images before you report it."
    reading = (
        "all classes compete" if setting == "task_agnostic" else "only the classes of the image's own task compete"
    )
    yield f"Accuracies are {setting.replace('_', '-')}: {reading}."
    yield from not_compared(study, best, setting)
    yield from _told(study)


def _told(study: Study) -> Iterable[str]:
    if needy := [entry.name for entry in study.mergers if entry.needs_task]:
        yield f"{told_note(needy)}."


def _where(study: Study, best: Entry, second: Entry, setting: Setting) -> str:
    """Name the tasks on which the best merger gains and loses most."""
    rows = best.last_row(setting), second.last_row(setting)
    differences = [
        (first.mean - other.mean, name)
        for first, other, name in zip(*rows, study.tasks, strict=True)
        if first.is_defined and other.is_defined
    ][: study.num_finished]
    most, least = max(differences), min(differences)
    parts = [f"{points(most[0], signed=True)} on {most[1]}"] if most[0] > 0 else []
    parts += [f"{points(least[0], signed=True)} on {least[1]}"] if least[0] < 0 else []
    return f" ({' and '.join(parts)})" if parts else ""


def _lead(lead: float) -> str:
    text = points(lead)
    return "level with" if text == "0.0" else f"{text} points more than"


def _wins(best: Entry, second: Entry, setting: Setting) -> int | None:
    if best.runs != second.runs:
        return None
    pairs = zip(
        best.figure("average_accuracy", setting).values,
        second.figure("average_accuracy", setting).values,
        strict=True,
    )
    return sum(first > other for first, other in pairs)


def _rank_low(best: Entry, found: dict[str, Spread]) -> str:
    known = sorted(spread.mean for spread in found.values() if spread.is_defined)
    if not found[best.name].is_defined:
        return "needs two finished tasks"
    place = known.index(found[best.name].mean) + 1
    if len(known) == 1:
        return "of what was once known"
    if place in (1, len(known)):
        return f"{'lowest' if place == 1 else 'highest'} of {len(known)}"
    return f"{_ordinal(place)} lowest of {len(known)}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def _first(spreads: Sequence[Spread]) -> Spread:
    return spreads[0] if spreads else Spread((math.nan,))


def _last(spreads: Sequence[Spread]) -> Spread:
    return spreads[-1] if spreads else Spread((math.nan,))


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _shown(share: Spread) -> str:
    return show(share.mean, std=share.std)
