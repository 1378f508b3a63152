"""The contract of the diagnostics document (docs/diagnostics.md)."""

from typing import Any

from clmerge.shapes import Check, count, keyed, listed, maybe, number, one_of, record, text


def validate_diagnostics(document: Any, where: str) -> None:
    """Check a diagnostics document.

    Args:
        document: The result of :func:`clmerge.evaluation.diagnostics.document`, read back from JSON.
        where: Place of the document in the file.

    Raises:
        ValueError: If something is missing, misshapen, or not finite; the message names the place.
    """
    record({"tasks": listed(text, filled=True)})(document, where)
    size = len(document["tasks"])
    record({}, {"vectors": maybe(_vectors(size)), "models": maybe(_models(size)), "layers": maybe(_layers)})(
        document, where
    )


def _layers(value: Any, where: str) -> None:
    figures = dict.fromkeys(("barrier", "barrier_of_second", "llfc", "features_apart", "coefficient"), maybe(number))
    layer = record({"name": text, **figures})
    tangent = record({"localisation": maybe(number), "alignment": maybe(number), "images": count})
    wanted = {"tasks": listed(count, 2), "images": count, "layers": listed(layer)}
    record(wanted, {"tangent": listed(tangent, 2)})(value, where)


def _vectors(size: int) -> Check:
    row = listed(maybe(number), size)
    square = listed(row, size)
    pairs = {"norm": row, "cosine": square, "sign_conflict": square}
    overlaps = {"effective_rank": row, "left_overlap": square, "right_overlap": square}
    return record(
        {
            "whole": record(pairs),
            "layers": listed(record({"name": text, **pairs})),
            "matrices": listed(record({"name": text, "layer": text, **overlaps})),
            "rank": count,
        }
    )


def _models(size: int) -> Check:
    row = listed(maybe(number), size)
    known = record({"n": count, "remembered": keyed(maybe(number))})

    def checked(value: Any, where: str) -> None:
        record({"positions": listed(number, filled=True)})(value, where)
        error = listed(maybe(number), len(value["positions"]))
        record(
            {
                "setting": text,
                "images": listed(count, size),
                "models": keyed(record({"disagreement": row, "representation_bias": row})),
                "segments": listed(record({"from": text, "to": text, "error": error})),
            },
            {
                "split": one_of(("val", "test")),
                "disentanglement": maybe(record({"xi": listed(row, size)})),
                "knowledge": record({"shared": known, "unshared": known}),
            },
        )(value, where)

    return checked
