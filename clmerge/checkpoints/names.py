"""Align tensor names of one architecture: remove wrappers, and remove or add prefixes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from clmerge.checkpoints.flat_names import spelled
from clmerge.checkpoints.reader import Checkpoint
from clmerge.checkpoints.tied import same_bits

# Wrapper modules anywhere in a name: torch.compile, FSDP, fairscale, activation checkpoints, Fabric.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
# Wrappers of DataParallel, DDP, AveragedModel, Opacus; a part of a network may also have one of these names.
_PERHAPS_WRAPPERS = ("module", "_module")


def clean_names(checkpoint: Checkpoint) -> None:
    """Remove wrappers from a checkpoint's names: ``_orig_mod.`` anywhere, ``module.`` if all names begin with it.

    Args:
        checkpoint: Changed in place.
    """
    text = "\n".join(checkpoint.entries)
    found = [part for part in _WRAPPERS if part in text and any(part in name.split(".") for name in checkpoint.entries)]
    spell = _without(found)
    if found and _are_distinct(checkpoint.entries, spell):
        checkpoint.rename(spell)
        checkpoint.renamed += [f"without '{part}.'" for part in found]
    for part in _PERHAPS_WRAPPERS * 2:
        if checkpoint.entries and all(name.startswith(f"{part}.") for name in checkpoint.entries):
            size = len(part) + 1
            checkpoint.rename(lambda name, size=size: name[size:])  # type: ignore[misc]
            checkpoint.renamed.append(f"without '{part}.'")


def align_names(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], owner: str) -> None:
    """Rename a checkpoint's tensors to the names in ``wanted``.

    ``module.`` in the middle of names is ignored. Either side may have a prefix, or both: Lightning's ``model.`` is
    removed, and ``visual.`` is added to the names of an image tower. The prefixes with which most tensors agree in name
    and shape are used. A tensor of the checkpoint whose name lacks the prefix keeps its name if that is in ``wanted``,
    else it is left out. Names with underscores in place of dots are spelled as in ``wanted``.

    Args:
        checkpoint: The checkpoint; changed in place.
        wanted: A mapping with the wanted names.
        owner: Name of ``wanted`` in messages.

    Raises:
        ValueError: If two prefixes match equally many tensors, and the tensors below them differ.
    """
    shapes = _shapes(wanted)
    if checkpoint.is_flat:
        names = spelled(checkpoint, shapes, owner)
        checkpoint.rename(names.__getitem__)
        checkpoint.renamed.append("with dots for underscores")
        checkpoint.is_flat = False
    if all(shapes.get(name) == shape for name, shape in _shapes(checkpoint).items()):
        return
    spell = _without(_PERHAPS_WRAPPERS)
    if not (_are_distinct(checkpoint.entries, spell) and _are_distinct(wanted, spell)):
        spell = _without(())
    ours, theirs = ({spell(name): name for name in names} for names in (checkpoint.entries, wanted))
    best = _best_reading(ours, theirs, checkpoint, wanted, owner)
    if best.off:
        checkpoint.renamed.append(f"without {best.off!r}")
    if best.before:
        checkpoint.renamed.append(f"below {best.before!r}")
    kept = {*best.found.values()}

    def new_name(name: str) -> str | None:
        plain = spell(name)
        if plain.startswith(best.off):
            plain = best.before + plain[len(best.off) :]
        elif plain not in theirs or plain in kept:
            return None
        return theirs.get(plain, plain)

    if any(new_name(name) != name for name in checkpoint.entries):
        checkpoint.rename(new_name)


@dataclass
class _Reading:
    """A way to align names: replace our prefix ``off`` by ``before``; ``found`` maps our names to theirs."""

    off: str
    before: str
    found: dict[str, str] = field(default_factory=dict)


def _best_reading(
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    checkpoint: Checkpoint,
    wanted: Mapping[str, Tensor],
    owner: str,
) -> _Reading:
    """Return the reading that aligns most tensors of equal shape; the names unchanged if none aligns most names.

    Args:
        ours: The names in the checkpoint by their names without wrappers.
        theirs: The wanted names, likewise.
        checkpoint: The checkpoint.
        wanted: A mapping with the wanted names.
        owner: Name of ``wanted`` in messages.
    """
    readings = {("", ""): _Reading("", "", {name: name for name in ours if name in theirs})}
    fewer = min(len(ours), len(theirs))
    counts = Counter(prefix for name in ours for prefix in _prefixes(name))
    for off in (prefix for prefix, count in counts.items() if 2 * count > fewer):
        last = _last_part(off)
        for name in theirs:
            for before in _prefixes(name):
                # If both prefixes end in one part, the reading without it aligns the same names.
                if off + name[len(before) :] in ours and (off or before) and (not off or _last_part(before) != last):
                    reading = readings.setdefault((off, before), _Reading(off, before))
                    reading.found[off + name[len(before) :]] = name
    as_they_are, *others = readings.values()
    our_shapes, their_shapes = _shapes(checkpoint), _shapes(wanted)

    def fitting(reading: _Reading) -> int:
        return sum(our_shapes[ours[a]] == their_shapes[theirs[b]] for a, b in reading.found.items())

    def is_likely(reading: _Reading) -> bool:
        if not (reading.off and reading.before):
            return 2 * len(reading.found) > fewer
        # Every layer has a weight: to replace a prefix, names of two parts and shapes must agree.
        return any("." in name[len(reading.off) :] for name in reading.found) and 2 * fitting(reading) > fewer

    likely = (as_they_are, *filter(is_likely, others))
    scores = [((fitting(reading), len(reading.found)), reading) for reading in likely]
    most, best = max(scores, key=lambda item: (item[0], -len(item[1].off) - len(item[1].before)))
    if best is as_they_are:  # with the names of ``wanted`` a user chooses between equal readings
        return best
    for score, other in scores:
        if score != most or other is best or _are_equal(best, other, ours, theirs, checkpoint, wanted):
            continue
        if best.before == other.before:
            raise ValueError(
                f"expected one set of weights in {checkpoint.source}, got different ones below {best.off!r} and "
                f"{other.off!r}; choose one with --weights {(best.off or other.off)[:-1]}"
            )
        raise ValueError(
            f"expected one part of {owner} that the names of {checkpoint.source} fit, got {next(iter(best.found))!r} "
            f"for {next(iter(best.found.values()))!r} as well as {next(iter(other.found))!r} for "
            f"{next(iter(other.found.values()))!r}; save the model with the names that are meant"
        )
    return best


def _are_equal(
    one: _Reading,
    other: _Reading,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    checkpoint: Checkpoint,
    wanted: Mapping[str, Tensor],
) -> bool:
    """Return whether two readings align tensors of the same bits."""

    def same(a: str, b: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
        return a == b or same_bits(tensors[names[a]], tensors[names[b]])

    first, second = ({a[len(reading.off) :]: (a, b) for a, b in reading.found.items()} for reading in (one, other))
    return first.keys() == second.keys() and all(
        same(a, second[end][0], ours, checkpoint) and same(b, second[end][1], theirs, wanted)
        for end, (a, b) in first.items()
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name, without reading a checkpoint's tensors."""
    if isinstance(tensors, Checkpoint):
        return {name: entry.shape for name, entry in tensors.entries.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _last_part(prefix: str) -> str:
    return prefix[prefix.rfind(".", 0, -1) + 1 :]


def _prefixes(name: str) -> Iterator[str]:
    """Yield the possible prefixes of a name: none, and any number of its leading parts except all."""
    end = 0
    while True:
        yield name[:end]
        end = name.find(".", end) + 1
        if not end:
            return


def _without(parts: Collection[str]) -> Callable[[str], str]:
    def spell(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in parts)

    return spell


def _are_distinct(names: Collection[str], spell: Callable[[str], str]) -> bool:
    return len({spell(name) for name in names}) == len(names)
