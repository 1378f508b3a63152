"""What is left of the tasks to forget, and what of the others."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import TEST, ImageProbe, Occasion, Seen, View
from clmerge.results.measured import Measured
from clmerge.streams import Stream


class ForgetControl(ImageProbe):
    """Accuracy on the tasks to forget, beside the accuracy on the others, the control (arXiv 2212.04089).

    The value is the mean accuracy on the tasks to forget, of those learned so far; it is to be low. ``values`` holds
    ``control``, the mean over the other tasks learned so far, which is to stay, and ``unseen``, the mean over tasks
    that are not learned yet: what is left of the zero-shot knowledge. It looks at the test images, which are evaluated
    anyway, and costs nothing.

    Args:
        tasks: Indices of the tasks to forget.
        after: Measure after every task or the last.

    Raises:
        ValueError: If there is no task to forget.
    """

    name = "forget_control"
    better = "lower"
    is_share = True
    sources = ("2212.04089",)

    def __init__(self, tasks: list[int], after: Literal["every", "last"] = "every") -> None:
        if not tasks:
            raise ValueError("expected tasks to forget, got none")
        self.tasks, self.after = tasks, after

    @override
    def check(self, stream: Stream) -> None:
        stream.check_tasks(self.tasks, "tasks of ForgetControl")

    @override
    def look(self, view: View) -> Tensor:
        return (view.scores.argmax(dim=1) == view.labels).double().unsqueeze(1)

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        per_task, counts = seen[TEST].per_task(seen[TEST].rows[:, 0], occasion.num_tasks)
        learned, later = range(occasion.num_seen), range(occasion.num_seen, occasion.num_tasks)
        groups = {
            "value": [task for task in learned if task in self.tasks],
            "control": [task for task in learned if task not in self.tasks],
            "unseen": [*later],
        }
        values = {name: _mean([per_task[task] for task in group]) for name, group in groups.items()}
        n = {name: sum(counts[task] for task in group) for name, group in groups.items()}
        return Measured(values.pop("value"), per_task, values, n)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
