"""The registry of merge rules: the subclasses of Merger themselves."""

import inspect

from clmerge.merging.merger import Merger


def registered_mergers() -> dict[str, type[Merger]]:
    """Return every merge rule by class name, found from the subclasses themselves.

    Abstract classes, the bases of rules, are left out.

    Returns:
        Classes by class name, sorted.

    Raises:
        RuntimeError: If two rules share a class name or a short name.

    Example:
        >>> registered_mergers()["MagMax"].name
        'magmax'
    """
    found: dict[str, type[Merger]] = {}
    names: dict[str, type[Merger]] = {}
    waiting = Merger.__subclasses__()
    while waiting:
        rule = waiting.pop()
        waiting.extend(rule.__subclasses__())
        if inspect.isabstract(rule):
            continue
        for key, registry in ((rule.__name__, found), (rule.name, names)):
            if registry.setdefault(key, rule) is not rule:
                raise RuntimeError(
                    f"expected one merger called {key!r}, got {registry[key]!r} and {rule!r}; rename one"
                )
    return dict(sorted(found.items()))
