"""Whether images with a trigger get the class that a backdoor leads to."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import AccuracyProbe, View
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.streams.transforms import Patch, Trigger, changed


class AttackSuccess(AccuracyProbe):
    """Share of the test images of other classes that get the target class once they carry the trigger.

    As BackdoorBench and BadNets (arXiv 1708.06733) count it. A model without a backdoor has natural confusions, so its
    rate is not 0: compare with a run on clean images, or with the expert before the attack.

    Args:
        target: The class that the attack leads to: its global id, or its name.
        trigger: What is put on the images.
        tasks: Tasks whose images are triggered; default all of the stream.
        after: Measure after every task or the last.
    """

    name = "attack_success"
    better = "lower"
    sources = ("1708.06733",)

    def __init__(
        self,
        target: int | str = 0,
        trigger: Trigger | None = None,
        tasks: list[int] | None = None,
        after: Literal["every", "last"] = "every",
    ) -> None:
        self.target, self.trigger, self.tasks, self.after = target, trigger or Patch(), tasks, after
        self._target = target if isinstance(target, int) else -1

    @override
    def check(self, stream: Stream) -> None:
        self._target = stream.class_id(self.target)
        stream.check_tasks(self.tasks or (), "tasks of AttackSuccess")

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        tasks: Sequence[int] = range(len(stream.tasks)) if self.tasks is None else self.tasks
        plans = {task: stream.dataset(task, "test").plan for task in tasks}
        return {"triggered": {task: changed(plan, self.trigger) for task, plan in plans.items()}}

    @override
    def hits(self, view: View) -> Tensor:
        hit = (view.scores.argmax(dim=1) == self._target).double()
        return torch.where(view.labels == self._target, torch.nan, hit)
