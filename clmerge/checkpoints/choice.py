"""Which weights are read of a file that holds several sets: averaged ones first, unless told otherwise."""

from collections.abc import Collection

from clmerge.checkpoints.reader import Checkpoint

# Where training scripts keep weights inside of what they save, in the order in which one set is preferred to another:
# averages over the steps of training, which exist to be used, before the weights of the last step (as timm does).
KNOWN = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "weights")


def choose_set(sets: Collection[str], weights: str | None) -> str | None:
    """Return the set to read of a file; None if none of them is known to be one of weights.

    Args:
        sets: Names under which the file holds mappings with tensors.
        weights: The set that is asked for.

    Example:
        >>> choose_set(["state_dict", "state_dict_ema"], None), choose_set(["state_dict", "ema"], "ema")
        ('state_dict_ema', 'ema')
    """
    if weights in sets:
        return weights
    return next((key for key in KNOWN if key in sets), None)


def keep_chosen(checkpoint: Checkpoint, weights: str) -> None:
    """Leave out what does not belong to the weights that are asked for, where all sets are in one state dict.

    Args:
        checkpoint: An open checkpoint; changed in place.
        weights: The set: what a file has it under, or the first part of its tensors' names.

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
