"""The document with a run's diagnostics, written by ``compare`` and drawn by ``report``."""

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = 1


def document(
    tasks: Sequence[str],
    *,
    vectors: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the diagnostics document, ready for JSON.

    Args:
        tasks: Names of the tasks, in order.
        vectors: Result of :func:`clmerge.evaluation.diagnostics.diagnose_vectors`, if it ran.
        models: Result of :func:`clmerge.evaluation.diagnostics.diagnose_models`, if it ran.
        layers: ``tasks``, the two tasks whose experts were compared, ``images`` and ``layers``, the result of
            :func:`clmerge.evaluation.diagnostics.diagnose_layers`, if it ran.

    Raises:
        ValueError: If a part has another number of tasks.

    Example:
        >>> document(["a", "b"])
        {'schema': 1, 'tasks': ['a', 'b'], 'vectors': None, 'models': None, 'layers': None}
    """
    counts = {
        **({} if vectors is None else {"vectors": len(vectors["whole"]["norm"])}),
        **({} if models is None else {"models": len(models["images"])}),
    }
    for part, count in counts.items():
        if count != len(tasks):
            raise ValueError(f"expected diagnostics of {len(tasks)} tasks, got {part} of {count}")
    return {
        "schema": SCHEMA,
        "tasks": list(tasks),
        "vectors": None if vectors is None else dict(vectors),
        "models": None if models is None else dict(models),
        "layers": None if layers is None else dict(layers),
    }
