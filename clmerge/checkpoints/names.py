"""Names of one architecture in several spellings: wrappers are taken out, prefixes are taken off or put before."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from clmerge.checkpoints.reader import Checkpoint
from clmerge.checkpoints.tied import same_bits

# Modules around a module, anywhere in a name: torch.compile, FSDP, fairscale, activation checkpoints, Fabric.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
# DataParallel, DDP, AveragedModel, Opacus; but also what a part of a network may be called.
_PERHAPS_WRAPPERS = ("module", "_module")


def clean_names(checkpoint: Checkpoint) -> None:
    """Take wrappers out of a checkpoint's names: ``_orig_mod.`` anywhere, ``module.`` if all names begin with it.

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
    """Give a checkpoint's tensors the names that ``wanted`` has for them.

    ``module.`` in the middle of names makes no difference. One side may have a prefix, as with Lightning's ``model.``:
    the one with which most names agree. Tensors of the checkpoint whose names do not begin with it are left out.

    Args:
        checkpoint: The checkpoint; changed in place.
        wanted: What has the wanted names.
        owner: What ``wanted`` is called in messages.

    Raises:
        ValueError: If two prefixes do equally well, and the tensors below them differ.
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
    """Return what is before most names of ours that end like one of theirs; nothing if that is not most of them."""
    ends: dict[str, set[str]] = {"": set()}
    for name in ours:
        for prefix in _prefixes(name):
            if name[len(prefix) :] in theirs:
                ends.setdefault(prefix, set()).add(name[len(prefix) :])
    # Names that agree as they are keep agreeing: a tower under another name is no prefix of the whole.
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
    """Yield what may be taken off a name: nothing, and every number of its parts but all."""
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
