"""How several models differ, and how that makes up the error of their ensemble and of their average weights."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor


def ensemble_terms(probabilities: Sequence[Tensor], soup: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Decompose squared errors of predicted probabilities over several models of one problem.

    The error of a model on an image is its probabilities minus the one-hot label. With the mean over the images as
    expectation, the error of the members' mean prediction is ``bias + variance / M + (1 - 1 / M) covariance`` (Ueda and
    Nakano, 1996), and also ``member_error - ambiguity`` (Krogh and Vedelsby, 1995); both hold exactly. DiWA (arXiv
    2205.09739) takes the expectation over trainings instead, whose covariance one set of members cannot show, and
    bounds ``gap`` by the squared distance of the members from their average.

    Args:
        probabilities: Predicted probabilities of every member, ``(N, C)`` each, for two members or more.
        soup: Those of the model with the members' average weights, ``(N, C)``.
        labels: Class of every image, ``(N,)``.

    Returns:
        - ``member_error``, ``ensemble_error``, ``soup_error``: mean squared errors, of the members on average, of the
          mean of their predictions, and of the average of their weights;
        - ``bias``, ``variance``, ``covariance``, ``ambiguity``: the terms above;
        - ``gap``: mean squared difference of the soup's predictions from the ensemble's;
        - ``disagreement``: share of the images on which two members answer differently, over all pairs;
        - ``ratio_error``: images on which one of two members errs, per image on which both do, over all pairs; None
          where no two err together.

    Raises:
        ValueError: If there are fewer than two members, or shapes differ.

    Example:
        >>> sure, unsure = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> terms = ensemble_terms([sure, unsure], torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        >>> terms["member_error"], terms["ambiguity"], terms["ensemble_error"], terms["gap"]
        (0.25, 0.125, 0.125, 0.0)
    """
    if len(probabilities) < 2 or len({one.shape for one in (*probabilities, soup)}) > 1 or len(labels) != len(soup):
        raise ValueError(
            f"expected two members or more and a soup of one shape and a label of every image, got shapes "
            f"{[tuple(one.shape) for one in (*probabilities, soup)]} and {len(labels)} labels"
        )
    number = len(probabilities)
    truth = torch.nn.functional.one_hot(labels.long(), soup.shape[1]).double()
    mean = torch.stack(list(probabilities)).double().mean(dim=0)
    centred = [one.double() - truth for one in probabilities]
    biases = [error.mean(dim=0) for error in centred]
    centred = [error - bias for error, bias in zip(centred, biases, strict=True)]
    variance = sum(_size(error) for error in centred) / number
    whole = torch.stack(centred).sum(dim=0)
    wrong = [one.argmax(dim=1) != labels for one in probabilities]
    pairs = list(combinations(range(number), 2))
    single = sum(int((wrong[a] ^ wrong[b]).sum()) for a, b in pairs)
    shared = sum(int((wrong[a] & wrong[b]).sum()) for a, b in pairs)
    answers = [one.argmax(dim=1) for one in probabilities]
    differing = sum(float((answers[a] != answers[b]).double().mean()) for a, b in pairs)
    return {
        "member_error": sum(_size(one.double() - truth) for one in probabilities) / number,
        "ensemble_error": _size(mean - truth),
        "soup_error": _size(soup.double() - truth),
        "bias": float(torch.stack(biases).mean(dim=0).square().sum()),
        "variance": variance,
        "covariance": (_size(whole) - number * variance) / (number * (number - 1)),
        "ambiguity": sum(_size(one.double() - mean) for one in probabilities) / number,
        "gap": _size(soup.double() - mean),
        "disagreement": differing / len(pairs),
        "ratio_error": single / shared if shared else None,
    }


def locality(vectors: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the largest distance of a member's weights from the members' average, as DiWA measures locality.

    Args:
        vectors: The weights of every member, or their vectors from one base, with the same names.
    """
    squares = [0.0] * len(vectors)
    for name in vectors[0]:
        stacked = torch.stack([vector[name].double() for vector in vectors])
        distances = (stacked - stacked.mean(dim=0)).flatten(1).square().sum(dim=1).tolist()
        squares = [total + float(each) for total, each in zip(squares, distances, strict=True)]
    return math.sqrt(max(squares))


def _size(errors: Tensor) -> float:
    """Return the mean over the images of squared lengths."""
    return float(errors.square().sum(dim=1).mean())
