"""Choose one set of weights from a file with several: by default averaged weights first."""

from collections.abc import Collection

from clmerge.checkpoints.reader import Checkpoint

# Keys under which training scripts save weights, in order of preference: averages over training steps come before the
# weights of the last step (as in timm).
KNOWN = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "weights")


def choose_set(sets: Collection[str], weights: str | None) -> str | None:
    """Return the name of the set to read from a file; None if none has a known name.

    Args:
        sets: Names under which the file holds mappings with tensors.
        weights: The requested set.

    Example:
        >>> choose_set(["state_dict", "state_dict_ema"], None), choose_set(["state_dict", "ema"], "ema")
        ('state_dict_ema', 'ema')
    """
    if weights in sets:
        return weights
    return next((key for key in KNOWN if key in sets), None)


def keep_chosen(checkpoint: Checkpoint, weights: str) -> None:
    """Keep only the tensors of the requested set, if one state dict holds several sets.

    Args:
        checkpoint: An open checkpoint; changed in place.
        weights: The set: its key in the file, or the first part of its tensors' names.

    Raises:
        ValueError: If the file holds several sets and none has this name.
    """
    prefix = f"{weights}."
    if checkpoint.weights == weights:
        return
    if any(name.startswith(prefix) for name in checkpoint.entries):
        checkpoint.rename(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
        checkpoint.renamed.append(f"without {prefix!r}")
        checkpoint.weights = weights
    elif len(checkpoint.sets) > 1:
        raise ValueError(
            f"expected weights that {checkpoint.source} holds, got {weights!r}; there are "
            f"{', '.join(map(repr, checkpoint.sets))}"
        )
