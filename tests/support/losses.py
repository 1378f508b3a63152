"""The loss of a training step, as the module computes it."""

from clmerge.training.regularizers import regularized_logits


def regularized_loss(module, regularizers, images, labels):
    """Return the task's loss, and the term of every regularizer by name."""
    logits, terms = regularized_logits(module, regularizers, images)
    return module.loss(logits, labels), terms
