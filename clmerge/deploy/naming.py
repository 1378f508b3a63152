"""Names of the mergers of one run, and checks of their requirements."""

from collections.abc import Iterable, Mapping, Sequence

from clmerge.merging import Merger
from clmerge.results.results import ADAPTERS, BASE, HEAD, is_reference
from clmerge.statistics.provided import PROVIDED
from clmerge.weights.task_vector import State


def name_mergers(mergers: Merger | Sequence[Merger] | Mapping[str, Merger]) -> dict[str, Merger]:
    """Name mergers by class, or by class and settings if a class occurs twice.

    Raises:
        ValueError: If there is no merger, or two have the same class and settings.
    """
    if isinstance(mergers, Merger):
        mergers = [mergers]
    if isinstance(mergers, Mapping):
        named = dict(mergers)
    else:
        names = [merger.name for merger in mergers]
        labels = [m.name if names.count(m.name) == 1 else m.label for m in mergers]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"expected different mergers, got {twice[0]!r} twice; drop one or change a setting")
        named = dict(zip(labels, mergers, strict=True))
    if not named:
        raise ValueError("expected at least one merger, got none; pass for example MagMax(scale=0.5)")
    return named


def by_class(name: str, mergers: Mapping[str, Merger]) -> str:
    """Return the name of the only merger of the class ``name``, as options give it (``TIES``); else ``name`` itself.

    Args:
        name: Name of a merger, or of a class.
        mergers: Mergers by name.

    Example:
        >>> from clmerge.merging import MagMax, TIES
        >>> by_class("TIES", name_mergers([MagMax(), TIES()])), by_class("expert", {})
        ('ties', 'expert')
    """
    found = [own for own, merger in mergers.items() if type(merger).__name__ == name]
    return found[0] if name not in mergers and len(found) == 1 else name


def check_names(names: Iterable[str], calibrations: Iterable[str] = ()) -> None:
    """Refuse names of mergers that are already used in results, diagnostics or the files of models.

    Args:
        names: Names of mergers.
        calibrations: Names of the calibrations, each of which adds a model ``MERGER+NAME`` for every merger.

    Raises:
        ValueError: If a name is that of a reference model (``"expert"``, ``"zero_shot"``, ...), of the ``"base"``, of
            the ``"head"``, or of a calibrated model.
    """
    names, calibrations = [*names], [*calibrations]
    ends = ("", f"-{HEAD}", f"-{ADAPTERS}")
    made = {f"{name}+{kind}{end}" for name in names for kind in calibrations for end in ends}
    if taken := [name for name in names if is_reference(name) or name in {BASE, HEAD, *made}]:
        raise ValueError(f"expected another name for a merger than {taken[0]!r}, which results give something else")


def check_requirements(mergers: Mapping[str, Merger], *, score: bool, losses: bool, statistics: bool) -> None:
    """Refuse mergers whose required score or statistics a run does not provide.

    Args:
        mergers: Mergers by name.
        score: Whether there is a held-out metric.
        losses: Whether there are losses on adaptation images.
        statistics: Whether statistics of the task's data are measured.

    Raises:
        ValueError: If a requirement is missing.
    """
    for name, merger in mergers.items():
        if merger.requires_score and not score:
            raise ValueError(
                f"expected score= for merger {name!r}, got none: pass a function that evaluates the model "
                "on held-out data"
            )
        if merger.requires_gradient and not losses:
            raise ValueError(
                f"expected losses= for merger {name!r}, which learns, got none: pass a function that yields its losses "
                "on adaptation images"
            )
        if (needed := sorted(merger.requires - PROVIDED)) and not statistics:
            raise ValueError(
                f"expected statistics= for merger {name!r}, which requires {needed}, got none: pass a function "
                "that measures them on the task's data"
            )


def check_settings(mergers: Mapping[str, Merger], parameters: State, num_tasks: int) -> None:
    """Refuse mergers whose settings do not fit the model or the stream, before anything is trained or read.

    Args:
        mergers: Mergers by name.
        parameters: The parameters to merge; only names and shapes are used.
        num_tasks: Number of tasks, as far as known.

    Raises:
        ValueError: If a setting has too few entries, or a pattern matches nothing.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    for name, merger in mergers.items():
        try:
            merger.check_tasks(num_tasks)
            merger.check_names(shapes)
        except ValueError as error:
            raise ValueError(f"merger {name!r}: {error}") from error
