"""Find the names of a base for names that have underscores in place of dots."""

from collections import Counter
from collections.abc import Iterator, Mapping

from clmerge.checkpoints.reader import Checkpoint

Shape = tuple[int, ...]
_END = ".weight"


def spelled(checkpoint: Checkpoint, wanted: Mapping[str, Shape], owner: str) -> dict[str, str | None]:
    """Return the name in ``wanted`` for every name ``PART.MODULE.weight`` of a checkpoint; None where there is none.

    Either side may have more before the names than the other. What is taken off before all names is what lets most
    tensors agree in name and shape.

    Args:
        checkpoint: The checkpoint.
        wanted: Shapes by wanted name.
        owner: Name of ``wanted`` in messages.

    Raises:
        ValueError: If no tensor fits, or two readings fit equally well.
    """
    ends: dict[str, list[tuple[str, str]]] = {}
    for name in wanted:
        if name.endswith(_END):
            for off, end in _ends(name.removesuffix(_END), "."):
                ends.setdefault(end.replace(".", "_"), []).append((off, name))
    readings: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, entry in checkpoint.entries.items():
        for off, end in _ends(name.removesuffix(_END).partition(".")[2], "_"):
            for before, other in ends.get(end, ()):
                if wanted[other] == entry.shape and (not off or not before):
                    readings[off, before] += 1
                    found.setdefault((off, before), {})[name] = other
    best = readings.most_common(2)
    if not best:
        raise ValueError(
            f"expected modules of {owner} in {checkpoint.source}, got none that fits: it has "
            f"{next(iter(checkpoint.entries))!r}, and {owner} has {next(iter(wanted), 'nothing')!r}; name the base "
            "that the adapter was trained on, or another part of the adapter with --weights"
        )
    if len(best) > 1 and best[0][1] == best[1][1]:
        first, second = [next(iter(found[reading].items())) for reading, _ in best]
        raise ValueError(
            f"expected one part of {owner} that the names of {checkpoint.source} fit, got {first[0]!r} for "
            f"{first[1]!r} as well as {second[0]!r} for {second[1]!r}; save the base with the names that are meant"
        )
    names = found[best[0][0]]
    return {name: names.get(name) for name in checkpoint.entries}


def _ends(name: str, separator: str) -> Iterator[tuple[str, str]]:
    """Yield a name split at its beginning and after every separator."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(separator, start) + 1
        if not start:
            return
