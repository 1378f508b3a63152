"""How often a model is right on tasks that were never trained."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import NO_TASK, AccuracyProbe, Occasion, Seen, View
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import Split, SplitPlan


class HeldOutAccuracy(AccuracyProbe):
    """Accuracy on the tasks that ``HeldOut`` has taken out of the stream, all classes competing.

    On domains it is the accuracy out of distribution (leave one domain out, DomainBed, arXiv 2007.01434); on tasks of
    other classes, under a text head, the zero-shot accuracy that fine-tuning and merging leave. Settings are chosen on
    validation images of the trained tasks ("training-domain validation"), which is what every search of clmerge looks
    at. ``values`` has every held-out task by name. Models with weights per task have none: nobody knows the task.

    Args:
        split: Which images of the held-out tasks; DomainBed reports on the larger part, ``train`` here.
        after: Measure after every task or the last.
    """

    name = "held_out_accuracy"
    better = "higher"
    sources = ("2007.01434",)

    def __init__(self, split: Split = "test", after: Literal["every", "last"] = "every") -> None:
        self.split, self.after = split, after

    @override
    def check(self, stream: Stream) -> None:
        check_held_out(stream, type(self).__name__)

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        return {task.name: {NO_TASK: stream.held_out_plan(task.index, self.split)} for task in stream.held_out}

    @override
    def hits(self, view: View) -> Tensor:
        return view.scores.argmax(dim=1) == view.labels

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        values = {name: float(one.rows.mean()) if len(one.rows) else math.nan for name, one in seen.items()}
        return Measured(
            sum(values.values()) / len(values), (), values, {name: len(one.rows) for name, one in seen.items()}
        )


def check_held_out(stream: Stream, probe: str) -> None:
    """Refuse a stream from which no task was taken out.

    Args:
        stream: The stream.
        probe: Who asks, for the message.

    Raises:
        ValueError: If there is none.
    """
    if not stream.held_out:
        raise ValueError(
            f"expected tasks that were taken out of the stream, for {probe}, got none: add HeldOut to --transforms"
        )
