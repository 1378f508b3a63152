"""Selection of the parameters to merge: trainable floating-point ones, by glob patterns."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

COMPILE_PREFIX = "_orig_mod."  # added to parameter names by torch.compile


def select_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Select the trainable floating-point parameters that match the patterns.

    A pattern is a shell glob over the whole parameter name, in which ``*`` also matches dots: ``"visual.*"``
    is the image tower of a CLIP model. A parameter that several names share is selected once, under its first
    name, if any of its names matches.

    Args:
        module: The module with the parameters, compiled or not.
        include: Patterns of which at least one must match. Default: every trainable parameter.
        exclude: Patterns of which none may match.

    Returns:
        The parameters themselves (not copies) by name, in the module's order.

    Raises:
        ValueError: If a pattern matches no parameter, an include pattern matches only frozen parameters, or
            nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> list(select_parameters(model, include=["0.*"], exclude=["*.bias"]))
        ['0.weight']
    """
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name.replace(COMPILE_PREFIX, ""))
    chosen = choose(
        {group[0]: (group, _is_mergeable(parameter)) for parameter, group in aliases.items()},
        include,
        exclude,
        owner=type(module).__name__,
    )
    first = {group[0]: parameter for parameter, group in aliases.items()}
    return {name: first[name] for name in chosen}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, with ``torch.compile``'s ``_orig_mod.`` removed from the names."""
    return {name.replace(COMPILE_PREFIX, ""): p for name, p in module.named_parameters() if p.requires_grad}


def is_included(name: str, include: Sequence[str] | None) -> bool:
    """Return whether a name matches one of the patterns; every name does if there are none."""
    return include is None or _any_match([name], include)


def choose(
    groups: Mapping[str, tuple[Sequence[str], bool]],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    *,
    owner: str,
) -> list[str]:
    """Select names by glob patterns, as in ``select_parameters``.

    Args:
        groups: Name -> all names of the same tensor, and whether the tensor can be selected.
        include: Patterns of which at least one must match; None for all.
        exclude: Patterns of which none may match.
        owner: Owner of the names, for the error messages.

    Raises:
        ValueError: As ``select_parameters`` does.
    """
    include = None if include is None else _as_list(include)
    exclude = _as_list(exclude)
    names = [name for group, _ in groups.values() for name in group]
    for pattern in (include or []) + exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"expected a pattern that matches a parameter, got {pattern!r}; {_hint(pattern, names)}")

    mergeable = {name: group for name, (group, trained) in groups.items() if trained}
    for pattern in include or []:
        if not any(_any_match(group, [pattern]) for group in mergeable.values()):
            raise ValueError(
                f"expected a pattern that matches a trainable parameter, got {pattern!r}, which matches only "
                "frozen or integer ones; set requires_grad or drop the pattern"
            )
    selected = [
        name
        for name, group in mergeable.items()
        if (include is None or _any_match(group, include)) and not _any_match(group, exclude)
    ]
    if not selected:
        raise ValueError(
            f"expected at least one trainable parameter to merge in {owner}, got none "
            f"(include={include}, exclude={exclude}); widen the patterns or unfreeze parameters"
        )
    return selected


def _as_list(patterns: Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _is_mergeable(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_floating_point()


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _hint(pattern: str, names: list[str]) -> str:
    prefix = pattern.rstrip(".*")
    if any(fnmatchcase(name, f"{prefix}.*") for name in names):
        return f"patterns cover the whole name: did you mean {prefix + '.*'!r}?"
    # A typo may be in any part of a name, so whole names and their leading parts are both candidates.
    parts = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    close = get_close_matches(pattern, [*names, *sorted(parts)], n=3, cutoff=0.5)
    nearest = ", ".join(repr(name) for name in close or names[:3])
    return f"the nearest names are {nearest}" if nearest else "the module has no parameters"
