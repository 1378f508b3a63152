"""Made-up but plausible results for tests of tables, plots and loggers."""

import numpy as np

from clmerge.results.confusion import Confusion
from clmerge.results.results import Results


def make_results(
    num_tasks=3,
    models=("magmax", "ties_density0.1", "expert"),
    *,
    finished=None,
    growing=False,
    names="task {}",
):
    """Results of a run: mergers forget slowly, the expert fast; ``growing``: tasks not seen are undefined."""
    generator = np.random.default_rng(0)
    finished = num_tasks if finished is None else finished
    results = Results(
        [names.format(task + 1) for task in range(num_tasks)],
        classes=[[f"class {2 * task}", f"class {2 * task + 1}"] for task in range(num_tasks)],
        samples=[100 + task for task in range(num_tasks)],
    )
    zero_shot = generator.uniform(0.3, 0.6, num_tasks)
    results.set_zero_shot(zero_shot, zero_shot + 0.2)
    for model in models:
        row = zero_shot.copy()
        for task in range(finished):
            row[:task] *= 0.6 if model == "expert" else 0.97
            row[task] = 0.98 if model == "expert" else 0.9 - 0.02 * models.index(model)
            shown = np.where(np.arange(num_tasks) > task, np.nan, row) if growing else row
            results.add_row(model, shown, np.minimum(shown + 0.1, 1))
    return results


def answer(results, seed=0):
    """Count answers by class for all models but zero-shot, with the task-aware ones right more often; return them."""
    generator = np.random.default_rng(seed)
    size = len(results.class_names)
    for index, model in enumerate(name for name in results.models if name != "zero_shot"):
        found = {}
        for setting, share in (("task_agnostic", 0.4), ("task_aware", 0.8)):
            counts = np.zeros((size, size + 1), dtype=np.int64)
            for true in range(size):
                for _ in range(20 + index):
                    taken = true if generator.random() < share else int(generator.integers(size + 1))
                    counts[true, taken] += 1
            found[setting] = Confusion.of_counts(counts, range(size))
        results.set_confusion(model, found)
    return results
