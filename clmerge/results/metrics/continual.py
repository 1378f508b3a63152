"""Continual-learning figures as pure functions of the accuracy matrix R.

``R[i, j]`` is the accuracy on task j after training (and merging) task i. A matrix has one row per *finished*
task and one column per task of the stream, so a run in progress has fewer rows than columns. Every function
then describes the stream cut after the last finished task: it reads the leading square block, n rows and n
columns, and the n in its formula is the number of rows. Tasks are counted from 1 in the formulas, from 0 in
the code.

Undefined entries are NaN (or None in nested lists). A figure that needs an undefined entry is NaN; nothing is
skipped, because a mean over fewer tasks than it claims cannot be compared with another. Means over tasks give
every task the same weight unless sample counts are passed. Frameworks disagree about several of these names:
docs/metrics.md says how.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.float64]
Row: TypeAlias = Sequence[float | None] | Array | Tensor
Matrix: TypeAlias = Sequence[Sequence[float | None]] | Array | Tensor


def average_accuracy(matrix: Matrix, *, samples: Row | None = None) -> list[float]:
    """Return the mean accuracy on the tasks seen so far, after every task.

    ``A_t = 1/t * sum_{j<=t} R[t, j]`` (GEM, https://arxiv.org/abs/1706.08840, calls the last one ACC); with
    sample counts ``A_t = sum_{j<=t} n_j R[t, j] / sum_{j<=t} n_j``, the share of all test samples seen so far
    that is classified rightly (the running curve of iCaRL, https://arxiv.org/abs/1611.07725).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.
        samples: Number of test samples per task, ``(num_tasks,)``. Every task counts the same by default.

    Returns:
        One accuracy per row.

    Raises:
        ValueError: If the matrix or the counts have the wrong shape.

    Example:
        >>> average_accuracy([[0.8, 0.2], [0.6, 1.0]])
        [0.8, 0.8]
        >>> average_accuracy([[0.8, 0.2], [0.6, 1.0]], samples=[300, 100])
        [0.8, 0.7]
    """
    block = _block(matrix)
    weights = np.ones(len(block)) if samples is None else _vector(samples, "samples", len(block))
    return [
        float(block[t, : t + 1] @ weights[: t + 1] / total) if (total := weights[: t + 1].sum()) > 0 else float("nan")
        for t in range(len(block))
    ]


def average_incremental_accuracy(matrix: Matrix, *, samples: Row | None = None) -> float:
    """Return the mean over time of the average accuracy, one number for the whole run.

    ``A = 1/n * sum_{t<=n} A_t`` with ``A_t`` of :func:`average_accuracy` (iCaRL,
    https://arxiv.org/abs/1611.07725).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.
        samples: Number of test samples per task, ``(num_tasks,)``, for the sample-weighted ``A_t``.

    Returns:
        The mean, NaN without a finished task.

    Raises:
        ValueError: If the matrix or the counts have the wrong shape.

    Example:
        >>> average_incremental_accuracy([[0.9, 0.2], [0.4, 1.0]])
        0.8
    """
    return _mean(average_accuracy(matrix, samples=samples))


def forgetting_per_task(matrix: Matrix) -> list[float]:
    """Return how far each task's accuracy is below its best since the task was learned.

    ``f_j = max_{j<=l<n} R[l, j] - R[n, j]`` for ``j < n`` (Chaudhry et al.,
    https://arxiv.org/abs/1801.10112). It is negative when the last task improved task j. The maximum starts
    at row j: earlier rows are zero-shot accuracies, which for a CLIP model can beat everything after, and are
    not something the run has learned.

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        One number per task of the stream, NaN for the task learned last and for tasks not learned yet.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> forgetting_per_task([[0.8, 0.2], [0.5, 0.9]])
        [0.30000000000000004, nan]
    """
    values = _matrix(matrix)
    last = len(values) - 1
    drops = [float(values[j:last, j].max() - values[last, j]) for j in range(last)]
    return drops + [float("nan")] * (values.shape[1] - len(drops))


def forgetting(matrix: Matrix) -> float:
    """Return the mean forgetting of all tasks except the last one learned.

    ``F = 1/(n-1) * sum_{j<n} f_j`` with ``f_j`` of :func:`forgetting_per_task` (Chaudhry et al.,
    https://arxiv.org/abs/1801.10112), in [-1, 1] and not clipped at zero.

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN before two tasks are finished.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> round(forgetting([[0.8, 0.2, 0.1], [0.9, 0.7, 0.3], [0.6, 0.8, 0.9]]), 4)
        0.1
    """
    return _mean(forgetting_per_task(matrix)[: max(len(matrix) - 1, 0)])


def backward_transfer(matrix: Matrix) -> float:
    """Return the mean change of earlier tasks' accuracy by learning later ones; negative means forgetting.

    ``BWT = 1/(n-1) * sum_{j<n} (R[n, j] - R[j, j])`` (GEM, https://arxiv.org/abs/1706.08840).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN before two tasks are finished.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> round(backward_transfer([[0.8, 0.2], [0.5, 0.9]]), 4)
        -0.3
    """
    block = _block(matrix)
    return _mean((block[-1:] - block.diagonal()).ravel()[:-1])


def forward_transfer(matrix: Matrix, baseline: Row) -> float:
    """Return how much better a task is before it is learned than it was before anything was learned.

    ``FWT = 1/(n-1) * sum_{2<=j<=n} (R[j-1, j] - b_j)`` (GEM, https://arxiv.org/abs/1706.08840).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.
        baseline: Accuracy b of the untrained (here: zero-shot) model on each task, ``(num_tasks,)``.

    Returns:
        The mean, NaN before two tasks are finished.

    Raises:
        ValueError: If the matrix or the baseline has the wrong shape.

    Example:
        >>> round(forward_transfer([[0.8, 0.4], [0.5, 0.9]], baseline=[0.1, 0.3]), 4)
        0.1
    """
    block = _block(matrix)
    before = _vector(baseline, "baseline", len(block))
    return _mean(block.diagonal(offset=1) - before[1:])


def learning_accuracy(matrix: Matrix) -> float:
    """Return the mean accuracy on tasks right after they are learned (plasticity).

    ``LA = 1/n * sum_{j<=n} R[j, j]`` (Riemer et al., https://arxiv.org/abs/1810.11910).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN without a finished task.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> round(learning_accuracy([[0.8, 0.2], [0.5, 0.9]]), 4)
        0.85
    """
    return _mean(_block(matrix).diagonal())


def transfer(matrix: Matrix) -> float:
    """Return the mean accuracy on tasks not learned yet: the remaining zero-shot ability.

    ``Transfer = 1/(n-1) * sum_{2<=j<=n} 1/(j-1) * sum_{i<j} R[i, j]`` (ZSCL,
    https://arxiv.org/abs/2303.06628).

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN before two tasks are finished or if the upper triangle is not known.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> round(transfer([[0.8, 0.4, 0.3], [0.7, 0.9, 0.5], [0.7, 0.8, 0.9]]), 4)
        0.4
    """
    block = _block(matrix)
    return _mean([_mean(block[:j, j]) for j in range(1, len(block))])


def average(matrix: Matrix) -> float:
    """Return the accuracy over all tasks and all points in time.

    ``Avg = 1/n * sum_{j<=n} 1/n * sum_{i<=n} R[i, j]`` (ZSCL, https://arxiv.org/abs/2303.06628). Not to be
    confused with :func:`average_accuracy`, which leaves out the tasks not learned yet.

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN without a finished task or if the upper triangle is not known.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> round(average([[0.8, 0.4], [0.7, 0.9]]), 4)
        0.7
    """
    return _mean(_block(matrix).ravel())


def last(matrix: Matrix) -> float:
    """Return the mean accuracy on all tasks after the last one.

    ``Last = 1/n * sum_{j<=n} R[n, j]`` (ZSCL, https://arxiv.org/abs/2303.06628), the same as the last entry
    of :func:`average_accuracy`.

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        The mean, NaN without a finished task.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> last([[0.8, 0.4], [0.5, 1.0]])
        0.75
    """
    return _mean(_block(matrix)[-1:].ravel())


def normalised_accuracy(matrix: Matrix, reference: Row) -> float:
    """Return the share of each task's own expert's accuracy that the final model keeps.

    ``1/n * sum_{j<=n} R[n, j] / a_j`` (task arithmetic, https://arxiv.org/abs/2212.04089).

    Args:
        matrix: Accuracy matrix R of the merged model, ``(num_rows, num_tasks)``.
        reference: Accuracy a of each task's expert on its task, before merging, ``(num_tasks,)``.

    Returns:
        The mean ratio, above 1 when merging helps, NaN without a finished task or where a reference is zero.

    Raises:
        ValueError: If the matrix or the reference has the wrong shape.

    Example:
        >>> round(normalised_accuracy([[0.8, 0.4], [0.4, 0.9]], reference=[0.8, 0.9]), 4)
        0.75
    """
    block = _block(matrix)
    expert = _vector(reference, "reference", len(block))
    return _mean(block[-1:].ravel() / np.where(expert == 0, np.nan, expert))


def merge_gap(expert: Matrix, merged: Matrix) -> list[float]:
    """Return the accuracy that each task loses by merging, right after it is merged.

    ``g_t = R_expert[t, t] - R_merged[t, t]``: the expert has just been trained on task t, so this is lost by
    merging, whereas a fall of the expert's own later rows is forgetting by training.

    Args:
        expert: Accuracy matrix of the un-merged model, ``(num_rows, num_tasks)``.
        merged: Accuracy matrix of the merged model, same shape.

    Returns:
        One number per row, positive where merging lost accuracy.

    Raises:
        ValueError: If the matrices have different shapes.

    Example:
        >>> merge_gap([[0.75, 0.2], [0.1, 1.0]], [[0.5, 0.2], [0.6, 0.875]])
        [0.25, 0.125]
    """
    first, second = _matrix(expert), _matrix(merged)
    if first.shape != second.shape:
        raise ValueError(f"expected the merged matrix to have the expert's shape {first.shape}, got {second.shape}")
    return [float(gap) for gap in first.diagonal() - second.diagonal()]


def gap_to_experts(matrix: Matrix, reference: Row) -> list[float]:
    """Return how far the model is below the tasks' own experts, after every task.

    ``1/t * sum_{j<=t} (a_j - R[t, j])``.

    Args:
        matrix: Accuracy matrix R of the model, ``(num_rows, num_tasks)``.
        reference: Accuracy a of each task's expert on its task, just trained, ``(num_tasks,)``.

    Returns:
        One number per row, positive where the experts are better.

    Raises:
        ValueError: If the matrix or the reference has the wrong shape.

    Example:
        >>> gap_to_experts([[0.75, 0.5], [0.25, 1.0]], reference=[0.75, 1.0])
        [0.0, 0.25]
    """
    values = _matrix(matrix)
    expert = _vector(reference, "reference", len(values))
    return [float((expert[: t + 1] - values[t, : t + 1]).mean()) for t in range(len(values))]


def worst_task(matrix: Matrix) -> list[float]:
    """Return the lowest accuracy among the tasks so far, after every task: ``min_{j<=t} R[t, j]``.

    Args:
        matrix: Accuracy matrix R, ``(num_rows, num_tasks)``.

    Returns:
        One number per row, NaN where one of the accuracies is.

    Raises:
        ValueError: If the matrix has the wrong shape.

    Example:
        >>> worst_task([[0.75, 0.5], [0.25, 1.0]])
        [0.75, 0.25]
    """
    values = _matrix(matrix)
    return [float(values[t, : t + 1].min()) for t in range(len(values))]


def to_array(values: Matrix | Row) -> Array:
    """Return nested lists, an array or a tensor as float64, None as NaN.

    Args:
        values: Numbers of any shape.

    Returns:
        A new array of the same shape.

    Example:
        >>> to_array([[1, None], [0.5, 2]])
        array([[1. , nan],
               [0.5, 2. ]])
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    return np.array(values, dtype=np.float64)


def _matrix(matrix: Matrix) -> Array:
    values = to_array(matrix)
    if values.size == 0:
        return values.reshape(0, values.shape[1] if values.ndim == 2 else 0)
    if values.ndim != 2 or values.shape[0] > values.shape[1]:
        raise ValueError(
            "expected an accuracy matrix of shape (finished tasks, tasks of the stream), no more rows "
            f"than columns, got {values.shape}"
        )
    return values


def _block(matrix: Matrix) -> Array:
    values = _matrix(matrix)
    return values[:, : len(values)]


def _vector(values: Row, name: str, num_rows: int) -> Array:
    vector = to_array(values)
    if vector.ndim != 1 or len(vector) < num_rows:
        raise ValueError(f"expected {name} to hold one number per task, at least {num_rows}, got shape {vector.shape}")
    return vector[:num_rows]


def _mean(values: Sequence[float] | Array) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
