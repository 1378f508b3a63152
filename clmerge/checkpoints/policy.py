"""The policy of a merge: which tensors of the base are merged or copied, and which of the models are ignored."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase, translate

from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.checkpoints.tied import resolve_ties, twins

# Statistics of batch normalisation, which are not parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SHOWN = 3
_MERGED = ("merged", "in the base and in every model", False)

Treatment = tuple[str, str, str, bool]
"""The treatment of one tensor: action, reason, detail, and whether it is a problem."""


@dataclass(frozen=True)
class Row:
    """One line of the table: tensors with the same treatment.

    Attributes:
        action: ``"merged"``, ``"tied"`` (merged under another name), ``"copied"`` (from the base), ``"ignored"``, or
            the treatment of running statistics.
        reason: Reason of the action.
        names: The tensors.
        detail: Further description of the first tensor, such as its shape; may be empty.
        is_problem: Whether ``--strict`` refuses it.
    """

    action: str
    reason: str
    names: list[str]
    detail: str = ""
    is_problem: bool = False


@dataclass(frozen=True)
class Policy:
    """The treatment of every tensor.

    Attributes:
        merged: The tensors that are merged, in the base's order.
        tied: Further names of merged tensors, each with the tensor's name in ``merged``.
        rows: The table.
    """

    merged: list[str]
    tied: dict[str, str]
    rows: list[Row]

    @property
    def problems(self) -> list[Row]:
        """The rows that ``--strict`` refuses."""
        return [row for row in self.rows if row.is_problem]


def decide(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    left: Collection[str] = (),
    patterns: Sequence[str] = (),
    treatments: Mapping[str, Treatment] | None = None,
) -> Policy:
    """Decide the treatment of every tensor from names, shapes, dtypes and ties.

    A floating-point tensor is merged if the base and every model have it in one shape. All others are copied from the
    base: integers, bools, running statistics, tensors that no pattern includes, and tensors that a model lacks or has
    in another shape (a head for other classes). Tensors that only a model has are ignored. Names of one tensor in the
    base and in all models are merged once.

    Args:
        base: The base model.
        models: Models and task vectors; names of tied tensors are added to them.
        include: Glob patterns, one of which must match a merged tensor's name, if there are any.
        exclude: Glob patterns that no merged tensor's name may match.
        strict: Whether missing, extra and mismatched tensors are errors.
        left: Tensors without a rule.
        patterns: Further patterns that must match at least one tensor.
        treatments: Treatment of tensors for which it is decided already: statistics and heads that are not the base's.

    Raises:
        ValueError: If a pattern matches nothing, nothing is left to merge, or ``strict`` is violated.
    """
    for pattern in (*include, *exclude, *patterns):
        if not any(map(re.compile(translate(pattern)).match, base.entries)):
            near = get_close_matches(pattern.strip("*"), base.entries, n=1, cutoff=0.3)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"expected a pattern that matches a tensor of {base.source}, got {pattern!r}{hint}")
    tied = resolve_ties(base, models)
    merged: set[str] = set()
    groups: dict[tuple[str, str, bool], list[str]] = {}
    details: dict[tuple[str, str, bool], str] = {}
    for name in base.entries:
        action, reason, detail, is_problem = _treatment(name, base, models, include, exclude)
        if treatments and name in treatments:
            action, reason, detail, is_problem = treatments[name]
        if name in left and (action == "merged" or is_problem):
            action, reason, detail, is_problem = "copied", "no rule is given for it", "", False
        if action == "merged" and name in tied and tied[name] in merged:
            action, reason, detail = "tied", "one tensor with another, merged once", f"with {tied[name]}"
        key = (action, reason, is_problem)
        groups.setdefault(key, []).append(name)
        if key == _MERGED:
            merged.add(name)
        details.setdefault(key, detail)
    rows = [
        Row(action, reason, names, details[action, reason, bad], bad) for (action, reason, bad), names in groups.items()
    ]
    rows.sort(key=lambda row: (row.action != "merged", row.action != "tied", row.is_problem))
    for model in models:
        rows += _extra_rows(model, base)
    further = {name: tied[name] for row in rows if row.action == "tied" for name in row.names}
    policy = Policy(groups.get(_MERGED, []), further, rows)
    wanted = [
        name
        for name, entry in base.entries.items()
        if entry.dtype.is_floating_point and name not in left and not is_left_out(name, include, exclude)
    ]
    _check_fit(base, models, wanted, [*policy.merged, *policy.tied])
    if strict and policy.problems:
        text = "\n".join(f"  {line}" for line in describe_rows(policy.problems))
        raise ValueError(
            f"expected the same tensors in the base and in every model (--strict), got\n{text}\n"
            "leave them out with --exclude, or merge without --strict to take the base's"
        )
    return policy


def describe_rows(rows: Sequence[Row]) -> list[str]:
    """Return the table as aligned lines.

    Example:
        >>> describe_rows([Row("copied", "not floating-point", ["position_ids"])])
        ['copied       1  not floating-point: position_ids']
    """
    lines = []
    for row in rows:
        shown = "" if row.action == "merged" else f": {', '.join(row.names[:_SHOWN])}"
        more = f" and {len(row.names) - _SHOWN} more" if shown and len(row.names) > _SHOWN else ""
        detail = f" ({row.detail})" if row.detail else ""
        lines.append(f"{row.action:<8}{len(row.names):>6}  {row.reason}{shown}{more}{detail}")
    return lines


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a running statistic of batch normalisation, by its name."""
    return name.endswith(_STATISTICS)


def _treatment(
    name: str, base: Checkpoint, models: Sequence[Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> Treatment:
    entry = base.entries[name]
    if not entry.dtype.is_floating_point:
        return "copied", "integer, bool or complex", "", False
    if is_statistic(name):
        return "copied", "running statistics", "", False
    if is_left_out(name, include, exclude):
        return "copied", "left out by --include or --exclude", "", False
    if models and all(model.is_task_vector and name not in model.entries for model in models):
        return "copied", "in no task vector", "", False
    for model in models:
        found = model.entries.get(name)
        if found is None and model.rest_is_zero:
            continue
        if found is None:
            return "copied", "missing in a model", f"not in {model.source}", True
        if found.shape != entry.shape:
            detail = f"{entry.shape} in the base, {found.shape} in {model.source}"
            return "copied", "another shape in a model", detail, True
        if not found.dtype.is_floating_point:
            return "copied", "another kind of number in a model", f"{found.dtype} in {model.source}", True
    return *_MERGED[:2], "", False


def is_left_out(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether the patterns exclude a tensor from the merge."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return not included or any(fnmatchcase(name, pattern) for pattern in exclude)


def _extra_rows(model: Checkpoint, base: Checkpoint) -> list[Row]:
    """Return the rows of tensors that only a model has; a further name of a tensor in the base is no problem."""
    extras = [name for name in model.entries if name not in base.entries]
    same = twins(model) if extras and not model.rest_is_zero else {}
    groups = {same.get(name, name) for name in model.entries if name in base.entries}
    known = [name for name in extras if same.get(name, name) in groups]
    unknown = [*(name for name in extras if same.get(name, name) not in groups), *model.left_out]
    # The fingerprint in a task vector covers all of its tensors.
    unchecked = ", so whether it began with this base cannot be checked" if model.base else ""
    rows = [Row("ignored", f"one tensor with another that the base has, of {model.source}", known)]
    rows.append(Row("ignored", f"not in the base, of {model.source}{unchecked}", unknown, is_problem=True))
    return [row for row in rows if row.names]


def _check_fit(base: Checkpoint, models: Sequence[Checkpoint], wanted: Sequence[str], merged: Sequence[str]) -> None:
    """Refuse models of another architecture, in which only a few tensors match the base by chance.

    Args:
        base: The base model.
        models: The models.
        wanted: Tensors of the base that may be merged.
        merged: Tensors that are merged.
    """
    room = {name: base.entries[name].numel for name in wanted}
    fitting = []
    for model in models:
        found = {name: numel for name, numel in room.items() if _fits(model.entries.get(name), base.entries[name])}
        offered = {name: entry.numel for name, entry in model.entries.items() if entry.dtype.is_floating_point}
        fitting.append(sum(found.values()))
        smaller = min(sum(room.values()), sum(offered.values()))
        if 10 * len(found) < min(len(room), len(offered)) or 10 * fitting[-1] < smaller:
            ours, theirs = (", ".join(map(repr, [*names][:_SHOWN])) for names in (offered, room))
            raise ValueError(
                f"expected a model with the base's tensors, got {model.source}, of which {len(found)} of "
                f"{len(offered)} fit: it has {ours}, and {base.source} has {theirs}; use models of one architecture, "
                "or leave out with --exclude what is meant to differ"
            )
    if not merged or 10 * sum(room[name] for name in merged) < min(fitting, default=0):
        raise ValueError(
            f"expected floating-point tensors that {base.source} and every model have, got {len(merged)} of them; "
            "widen --include or use models of one architecture"
        )


def _fits(entry: Entry | None, wanted: Entry) -> bool:
    return entry is not None and entry.shape == wanted.shape and entry.dtype.is_floating_point
