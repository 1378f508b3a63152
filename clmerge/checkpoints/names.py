"""Align tensor names of one architecture: remove wrappers, and remove or add prefixes."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

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

    ``module.`` in the middle of names is ignored. One side may have a prefix, such as Lightning's ``model.``; the
    prefix with which most names agree is used. Tensors of the checkpoint whose names lack it are left out.

    Args:
        checkpoint: The checkpoint; changed in place.
        wanted: A mapping with the wanted names.
        owner: Name of ``wanted`` in messages.

    Raises:
        ValueError: If two prefixes match equally many names, and the tensors below them differ.
    """
    if checkpoint.entries.keys() <= wanted.keys():
        return
    spell = _without(_PERHAPS_WRAPPERS)
    if not (_are_distinct(checkpoint.entries, spell) and _are_distinct(wanted, spell)):
        spell = _without(())
    ours, theirs = ({spell(name): name for name in names} for names in (checkpoint.entries, wanted))
    off = _prefix(ours, theirs, checkpoint, checkpoint.source)
    before = "" if off else _prefix(theirs, ours, wanted, owner)
    if off:
        checkpoint.renamed.append(f"without {off!r}")
    if before:
        checkpoint.renamed.append(f"below {before!r}")

    def new_name(name: str) -> str | None:
        plain = spell(name)
        return theirs.get(before + plain[len(off) :], before + plain[len(off) :]) if plain.startswith(off) else None

    if any(new_name(name) != name for name in checkpoint.entries):
        checkpoint.rename(new_name)


def _prefix(ours: Mapping[str, str], theirs: Collection[str], tensors: Mapping[str, Tensor], owner: str) -> str:
    """Return the prefix without which most of our names are theirs; empty if at most half of the names then agree."""
    ends: dict[str, set[str]] = {"": set()}
    for name in ours:
        for prefix in _prefixes(name):
            if name[len(prefix) :] in theirs:
                ends.setdefault(prefix, set()).add(name[len(prefix) :])
    # A prefix must keep all names that agree without one: the name of a part, such as a tower, is not a prefix.
    whole = {prefix: found for prefix, found in ends.items() if found >= ends[""]}
    best = max(whole, key=lambda prefix: (len(whole[prefix]), -len(prefix)))
    if not best or 2 * len(whole[best]) <= min(len(ours), len(theirs)):
        return ""
    for other in whole:
        if len(whole[other]) == len(whole[best]) and not _are_equal(ours, theirs, tensors, best, other):
            raise ValueError(
                f"expected one set of weights in {owner}, got different ones below {best!r} and {other!r}; choose one "
                f"with --weights {best[:-1]}"
            )
    return best


def _are_equal(
    ours: Mapping[str, str], theirs: Collection[str], tensors: Mapping[str, Tensor], one: str, other: str
) -> bool:
    pairs = [(ours.get(one + name), ours.get(other + name)) for name in theirs]
    return all(a == b or (a is not None and b is not None and same_bits(tensors[a], tensors[b])) for a, b in pairs)


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
