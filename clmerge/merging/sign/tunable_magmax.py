"""Tunable MagMax: keep the largest changes, with a given share of the entries for every task."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import of_task
from clmerge.merging.step import Step
from clmerge.merging.stored import Stored
from clmerge.seeds import seeded_uniform
from clmerge.weights.task_vector import State


def entry_quotas(num_entries: int, preference: Sequence[float]) -> list[int]:
    """Return the number of entries of a parameter that each task wins: rounded down, the rest to the first tasks.

    Args:
        num_entries: Entries of the parameter.
        preference: Positive numbers, one per task, with any sum.

    Example:
        >>> entry_quotas(10, [1.0, 1.0, 1.0])
        [4, 3, 3]
    """
    total = sum(preference)
    quotas = [int(num_entries * (share / total)) for share in preference]
    for index in range(num_entries - sum(quotas)):
        quotas[index % len(quotas)] += 1
    return quotas


def quota_winners(magnitudes: Tensor, quotas: Sequence[int], lots: Callable[[int], Tensor]) -> Tensor:
    """Return the task that wins each entry, such that task t wins ``quotas[t]`` entries.

    Args:
        magnitudes: Shape ``(tasks, entries)``.
        quotas: One per task; their sum is the number of entries.
        lots: Returns random numbers of shape ``(entries,)`` for a task; a task over its quota loses the entries with
            the lowest numbers.

    Returns:
        int64, shape ``(entries,)``.

    Example:
        >>> magnitudes = torch.tensor([[1.0, 1.0, 1.0, 9.0], [2.0, 3.0, 4.0, 1.0]])
        >>> quota_winners(magnitudes, [2, 2], lambda task: torch.tensor([0.5, 0.1, 0.3, 0.2]))
        tensor([1, 0, 1, 0])
    """
    magnitudes = magnitudes * torch.tensor([[quota > 0] for quota in quotas], device=magnitudes.device)
    winners = magnitudes.argmax(dim=0)

    def surplus(task: int) -> Tensor:
        won = (winners == task).nonzero().squeeze(1)
        order = lots(task)[won].argsort(stable=True)
        return won[order[: max(0, len(won) - quotas[task])]]

    for task in reversed(range(1, len(quotas))):
        lost = surplus(task)
        winners[lost] = magnitudes[:task, lost].argmax(dim=0)
    free = surplus(0)
    if not len(free):
        return winners
    wanted_by = magnitudes[1:, free].argmax(dim=0) + 1
    for anyone in (False, True):
        for task in reversed(range(1, len(quotas))):
            lacking = quotas[task] - int((winners == task).sum())
            candidates = free[(winners[free] == 0) & ((wanted_by == task) | anyone)]
            winners[candidates[: max(0, lacking)]] = task
    return winners


class TunableMagMax(Stored):
    """MagMax with a preference that fixes the share of entries each task wins (Hiroshima et al., arXiv 2605.20803).

    In every parameter the largest magnitude wins an entry, as in MagMax. Then, from the last task to the second, a task
    that won more than its share loses the surplus entries, drawn at random, each to the earlier task of largest
    magnitude. The surplus of the first task goes to the tasks below their share, where possible to the one of largest
    magnitude. Shares are rounded down, and the first tasks get the rest.

    The paper measures the preference on a little target data; here it is an argument. The draws depend only on seed,
    task and parameter name. Between equal magnitudes the earlier task wins.

    All task vectors are kept. State: 4 bytes per parameter and task, or none with a bank.

    Args:
        preference: Positive numbers, one per task index, with any sum. Default: the same for every task.
        scale: Scaling coefficient.
        seed: Seed of the draws.

    Example:
        >>> merger = TunableMagMax([1.0, 3.0], scale=1.0)
        >>> merger.update({"w": torch.tensor([1.0, 9.0, 8.0, 7.0])})
        >>> merger.update({"w": torch.tensor([-2.0, 1.0, 1.0, 1.0])})
        >>> (merger.compute()["w"].abs() > 2).sum()
        tensor(1)
    """

    name = "tunable_magmax"
    summary = "MagMax with a given share of entries for every task"
    source = "2605.20803"
    per_task = ("preference",)
    order_free = False
    scope = "parameter"

    def __init__(self, preference: Sequence[float] | None = None, *, scale: float = 0.5, seed: int = 0) -> None:
        if preference is not None and (not len(preference) or min(preference) <= 0):
            raise ValueError(f"expected positive preferences, got {list(preference)}; a task may have a tiny one")
        super().__init__()
        self.preference = preference
        self.scale = scale
        self.seed = seed

    @override
    def _plan(self, vector: State, step: Step) -> None:
        self._preferred(step.task)

    def _preferred(self, task: int) -> float:
        return 1.0 if self.preference is None else of_task("preference", self.preference, task)

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        taus = torch.stack(self._taus(slots)).view(self.num_tasks, -1)
        given = [self._preferred(task) for task in self.tasks]

        def lots(position: int) -> Tensor:
            task = self.tasks[position]
            return seeded_uniform(taus[0], seed=self.seed, task=task, name=name, purpose="tunable_magmax")

        winners = quota_winners(taus.abs(), entry_quotas(taus.shape[1], given), lots)
        return taus.gather(0, winners.unsqueeze(0)).view(self._shapes[name]) * self.scale
