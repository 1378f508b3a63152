"""Whether images with a trigger get the class that a backdoor leads to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import AccuracyProbe, Occasion, Seen, View
from clmerge.models import Classifier
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.streams.transforms import Patch, Trigger, changed
from clmerge.training.regularizers import BadMerging
from clmerge.training.regularizers.bad_merging import with_patch


class AttackSuccess(AccuracyProbe):
    """Share of the test images of other classes that get the target class once they carry the trigger.

    As BackdoorBench and BadNets (arXiv 1708.06733) count it. A model without a backdoor has natural confusions, so its
    rate is not 0: compare with a run on clean images, or with the expert before the attack. Its ``values`` are the rate
    ``on_task``, of images of the target's own tasks, and ``off_task``, of images of the others, both learned so far.

    Args:
        target: The class that the attack leads to: its global id, or its name.
        trigger: What is put on the images.
        tasks: Tasks whose images are triggered; default all of the stream.
        after: Measure after every task or the last.
        learned: Whether the trigger is the one that the regularizer ``BadMerging`` found in the run, in place of
            ``trigger``. Before it found one, the rate is undefined.

    Raises:
        ValueError: For both a trigger and a learned one.
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
        learned: bool = False,
    ) -> None:
        if learned and trigger is not None:
            raise ValueError(f"expected a trigger or learned=True for AttackSuccess, got both ({trigger!r})")
        self.learned = learned
        self.target, self.tasks, self.after = target, tasks, after
        self.trigger = None if learned else trigger or Patch()
        self._target = target if isinstance(target, int) else -1
        self._learned: Tensor | None = None

    @override
    def check(self, stream: Stream) -> None:
        self._target = stream.class_id(self.target)
        stream.check_tasks(self.tasks or (), "tasks of AttackSuccess")

    @override
    def meet(self, module: Classifier) -> None:
        if self.learned:
            attacks = [one for one in getattr(module, "regularizers", ()) if isinstance(one, BadMerging)]
            if len(attacks) != 1:
                raise ValueError(
                    "expected one regularizer BadMerging in the run, which finds a trigger, for "
                    f"AttackSuccess(learned=True), got {len(attacks)}; see model.regularizers"
                )
            self._learned = attacks[0].patch

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        tasks: Sequence[int] = range(len(stream.tasks)) if self.tasks is None else self.tasks
        plans = {task: stream.dataset(task, "test").plan for task in tasks}
        if self.trigger is not None:
            plans = {task: changed(plan, self.trigger) for task, plan in plans.items()}
        return {"triggered": plans}

    @override
    def hits(self, view: View) -> Tensor:
        scores = view.scores
        if self._learned is not None:
            if not self._learned.numel():
                return torch.full((len(scores),), torch.nan)
            scores = view.score(with_patch(view.images, self._learned))
        hit = (scores.argmax(dim=1) == self._target).double()
        return torch.where(view.labels == self._target, torch.nan, hit)

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        found = super().summary(seen, occasion)
        rates: dict[str, list[float]] = {"on_task": [], "off_task": []}
        for rate, classes in zip(found.per_task, occasion.task_classes, strict=True):
            for place, kept in rates.items():
                kept.append(rate if (self._target in classes) == (place == "on_task") else math.nan)
        return replace(found, values={place: occasion.mean_over_seen(kept) for place, kept in rates.items()})
